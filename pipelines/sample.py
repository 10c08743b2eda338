"""A small text of many kinds, for checking that a dictionary fits a model without any data set."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

CONTEXT = 64
"""Tokens of a text: short, so that a check takes seconds."""

TEXT = """\
The ferry to the island leaves at seven in the morning and comes back when the tide allows it. In winter that may \
be three hours later or the next day, and nobody on the quay seems to mind. The captain keeps a tin of biscuits \
for the children who travel to school, and a list of everybody's birthdays is pinned above the wheel.

Researchers at the university reported on Tuesday that glaciers in the northern range lost about four per cent of \
their ice in a single summer. "We expected a bad year," said the leader of the survey, "but not one like this." \
The ministry said that it would publish its own figures in March. Farmers in the valley, who depend on the \
meltwater, have asked for new reservoirs since 2011.

def moving_average(values, width):
    if width < 1:
        raise ValueError("width must be positive")
    total = sum(values[:width])
    result = [total / width]
    for i in range(width, len(values)):
        total += values[i] - values[i - width]
        result.append(total / width)
    return result

To make the dough, mix 500 g of flour with a teaspoon of salt and 20 g of fresh yeast. Add 300 ml of lukewarm \
water and knead for ten minutes, until it no longer sticks to the bowl. Let it rest under a cloth for an hour. \
Heat the oven to 230 degrees, shape two loaves, and bake them for 35 minutes; they are done when they sound \
hollow.

Q: Why does the sky look blue during the day and red in the evening?
A: Air scatters short wavelengths more strongly than long ones. At noon we see the scattered blue light from all \
directions. In the evening sunlight crosses much more air, so most of the blue has been scattered out of the beam \
before it reaches us, and the reds are left.

The treaty was signed in 1648 after four years of talks in two cities, because the parties would not sit in one \
room. It ended a war that had begun as a quarrel about a throne and had become one about religion, trade and the \
borders of half a continent. Historians still argue whether the modern idea of a sovereign state starts there.

"You never told me that you had a brother," she said.
"You never asked." He put the kettle on and looked for two clean cups. "He went to Lisbon when I was nine. He \
sends a card at Christmas, sometimes with a stamp that I like."
She laughed, and then saw that he was not joking.

Dear Ms Okafor, thank you for your order of 12 June. Unfortunately two of the five items are out of stock until \
the end of the month. We can send the others today, or everything together on 1 July. Please let us know by Friday \
which you prefer. We have taken 10% off the price for the delay. Kind regards, Peter Lindqvist, Customer Service

A group is a set with an operation that is associative, has a neutral element, and gives every element an inverse. \
The integers under addition form a group; the natural numbers do not, since 3 has no inverse among them. If the \
order of the two operands never matters the group is called abelian, after Niels Henrik Abel, who died at twenty- \
six.

SELECT city, COUNT(*) AS n_orders, AVG(amount) AS mean_amount
FROM orders JOIN customers ON orders.customer_id = customers.id
WHERE orders.placed_at >= '2024-01-01'
GROUP BY city HAVING COUNT(*) > 100 ORDER BY mean_amount DESC;

The patient, a 54-year-old man, came in with chest pain that had begun two hours earlier and spread to the left \
arm. Blood pressure was 150/95, pulse 102. The first electrocardiogram was normal. He was given aspirin and kept \
for observation; a second test after six hours showed a rise of the enzyme, and he was moved to the cardiac ward.

Slowly the light went out of the garden. First the roses lost their red, then the wall its warmth, and at last \
only the white gravel of the path could be made out, winding between dark shapes towards the house where somebody \
had lit a lamp.

The home side took the lead after eleven minutes, when Hartmann headed in a corner at the near post. They should \
have had a second before the break, but the goalkeeper saved well from Diallo, and Ortega hit the bar from twenty \
metres. The visitors equalised late: 1-1, and a point that neither manager seemed to want.

Under clause 7.2 either party may end this agreement with ninety days' written notice. Fees that have been paid \
for a period after that date are returned in proportion. Clauses 9 (confidentiality) and 12 (applicable law) \
remain in force. Nothing in this agreement limits liability for intent or gross negligence.

The kingfisher nests in burrows that it digs into steep river banks. Both parents dig, taking turns, and the \
tunnel may be almost a metre long. Six or seven white eggs are laid on a bed of fish bones. The young leave after \
about twenty-four days and within a week must catch their own minnows and sticklebacks.
"""


def sample_tokens(tokenizer: Any) -> Int[Tensor, "batch seq"]:
    """The text as rows of `CONTEXT` tokens, without BOS; what does not fill a row is left out."""
    ids = torch.tensor(tokenizer(TEXT, add_special_tokens=False, verbose=False)["input_ids"])
    n_rows = len(ids) // CONTEXT
    return ids[: n_rows * CONTEXT].reshape(n_rows, CONTEXT)
