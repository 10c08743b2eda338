"""The rules of the proving ground, fixed before any label was seen: what each planted feature fires on.

`WORDS` says which kinds of words the made-up corpus has. A rule names words by kind and rank (0 is the commonest of its
kind). `EXPRESSIBLE` are rules that the label grammar has words for: token sets, affixes, character classes, previous
tokens, positions, topics, repetition. `OUTSIDE` are rules that it has no words for, where the right answer is to
abstain: they are at least a quarter of all. Two are planted traps, see `ABSORPTIONS` and `CONFOUNDS`.
"""

from typing import NamedTuple


class Rule(NamedTuple):
    """One planted feature; `proving_ground.holds` runs it."""

    name: str
    kind: str
    """Which function runs it."""
    words: str = ""
    """Kind of word that it is about."""
    ranks: tuple[int, ...] = ()
    """Which words of that kind; none is all."""
    number: float = 0
    """Lag, modulus, probability, topic or position, by kind of rule."""
    before: tuple[str, int] | None = None
    """pair: the word that must stand before."""


class Words(NamedTuple):
    """A kind of word: how many there are and the share of tokens that they make up."""

    n: int
    share: float


N_TOPICS = 8
WORDS = {
    "common": Words(40, 0.34),
    "general": Words(320, 0.22),
    "topical": Words(40, 0.12),  # of each topic: a document has those of its own
    "names": Words(60, 0.04),  # capitalised
    "acronyms": Words(24, 0.015),  # in capitals
    "numbers": Words(60, 0.03),
    "punctuation": Words(6, 0.08),
    "brackets": Words(2, 0.02),  # " (" and ")", which open and close
    "pieces": Words(40, 0.03),  # without a leading space
    "str-words": Words(48, 0.03),  # they begin with "str"
    "over-words": Words(48, 0.03),  # they begin with "over"
    "ly-words": Words(48, 0.025),  # they end in "ly"
    "ment-words": Words(48, 0.025),  # they end in "ment"
    "doctors": Words(1, 0.0),  # " Dr": always before a surname, and nowhere else
    "surnames": Words(6, 0.008),
    "clocks": Words(1, 0.008),  # " oclock": always before one of two words, which occur nowhere else
    "chimes": Words(2, 0.0),
}

EXPRESSIBLE = (
    # one token, or a few
    Rule("general 0", "token", "general", (0,)),
    Rule("general 4", "token", "general", (4,)),
    Rule("general 9", "token", "general", (9,)),
    Rule("common 12", "token", "common", (12,)),
    Rule("common 25", "token", "common", (25,)),
    Rule("name 1", "token", "names", (1,)),
    Rule("number 0", "token", "numbers", (0,)),
    Rule("piece 2", "token", "pieces", (2,)),
    Rule("two general words", "token", "general", (14, 15)),
    Rule("three general words", "token", "general", (18, 20, 22)),
    Rule("five common words", "token", "common", (15, 18, 21, 24, 27)),
    Rule("eight general words", "token", "general", tuple(range(30, 46, 2))),
    # a class of tokens
    Rule("numbers", "token", "numbers"),
    Rule("names and surnames", "capitalised"),
    Rule("words in capitals", "token", "acronyms"),
    Rule("punctuation", "punctuation"),
    Rule("pieces inside a word", "inside"),
    Rule("words that begin with over", "token", "over-words"),
    Rule("words that end in ly", "token", "ly-words"),
    Rule("words that end in ment", "token", "ment-words"),
    # position
    Rule("second token", "position", number=1),
    Rule("fourth token", "position", number=3),
    # bigrams
    Rule("after common 5", "after", "common", (5,)),
    Rule("after common 8", "after", "common", (8,)),
    Rule("after general 2", "after", "general", (2,)),
    Rule("after a bracket opens", "after", "brackets", (0,)),
    Rule("after two general words", "after", "general", (6, 7)),
    Rule("common 3 after general 1", "pair", "common", (3,), before=("general", 1)),
    Rule("general 5 after common 2", "pair", "general", (5,), before=("common", 2)),
    Rule("name 0 after common 1", "pair", "names", (0,), before=("common", 1)),
    # topics
    Rule("topic 0", "topic", number=0),
    Rule("topic 1", "topic", number=1),
    Rule("topic 2", "topic", number=2),
    # induction
    Rule("a pair seen before", "repeated pair"),
    # the two traps
    Rule("words that begin with str", "token", "str-words"),
    Rule("str-word 0", "token", "str-words", (0,)),
    Rule("surnames", "token", "surnames"),
    Rule("after oclock", "after", "clocks", (0,)),
)

OUTSIDE = (
    Rule("coin 1", "coin", number=0.01),
    Rule("coin 2", "coin", number=0.02),
    Rule("coin 3", "coin", number=0.03),
    Rule("hidden documents 1", "hidden document", number=0.06),
    Rule("hidden documents 2", "hidden document", number=0.1),
    Rule("every 16th token", "modulo", number=16),
    Rule("every 23rd token", "modulo", number=23),
    Rule("seven after common 4", "lag", "common", (4,), number=7),
    Rule("eleven after common 6", "lag", "common", (6,), number=11),
    Rule("nine after general 3", "lag", "general", (3,), number=9),
    Rule("two before common 7", "ahead", "common", (7,), number=2),
    Rule("a token and its predecessor sum to 0 mod 31", "sum", number=31),
    Rule("a token and its predecessor sum to 0 mod 53", "sum", number=53),
)

ABSORPTIONS = {"words that begin with str": "str-word 0"}
"""Parent and child: where the child's word stands both fire, and a sparse autoencoder gives it to one latent."""

CONFOUNDS = {"surnames": "after Dr", "after oclock": "chimes"}
"""Rules that another rule of the grammar cannot be told from on this corpus: the label must name both."""

QUICK = (
    *("general 0", "two general words", "numbers", "after common 5", "topic 0"),
    *("words that begin with str", "str-word 0", "surnames", "coin 2", "seven after common 4", "every 16th token"),
)
"""The rules of the form that runs in seconds."""
