"""The shipped safety concepts as a set: which there are, and that no two of their texts repeat each other.

What each file must reach alone (size, length, words against hard negatives) stands in test_audit_concepts.py.
"""

import re
from pathlib import Path

import pytest

from pipelines.audit.concepts import Concept, examples_of, load_concept
from pipelines.audit.examples import shared_ngrams, words
from pipelines.audit.preflight import prepare

FOLDER = Path(__file__).parents[3] / "configs" / "concepts"
NAMES = (
    "deception",
    "hate",
    "illegal_activity",
    "jailbreak",
    "privacy",
    "refusal",
    "self_harm",
    "sycophancy",
    "violence",
    "weapons",
)
END = re.compile(r"""[.!?]["'”’)]*(?=\s+["'“‘(]?[A-Z0-9]|$)""")


@pytest.fixture(scope="module")
def concepts() -> dict[str, Concept]:
    return {name: load_concept(FOLDER / f"{name}.yaml") for name in NAMES}


def test_no_text_of_any_shipped_concept_shares_eight_words_with_another(concepts):
    texts = [e.text for concept in concepts.values() for e in examples_of(concept)]
    assert len(texts) >= 200 * len(NAMES)
    assert shared_ngrams(texts, [str(i) for i in range(len(texts))]) == []


def test_shipped_texts_have_one_to_three_sentences(concepts):
    for name, concept in concepts.items():
        long = [e.text for e in examples_of(concept) if not e.ood and len(END.findall(e.text)) > 3]
        assert long == [], name


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_concept_passes_its_preflight_with_24_of_each_class_to_confirm(concepts, name):
    examples = examples_of(concepts[name])
    assert len({e.group for e in examples}) == len(examples), "a text of its own is a group of its own"
    preflight = prepare(examples, seed=0).preflight
    assert preflight.stamps == preflight.notes == preflight.refusals == []
    confirm, ood = preflight.parts["confirm"], preflight.parts["ood"]
    assert min(confirm.positive, confirm.hard_negative) >= 24
    assert min(ood.positive, ood.negative) >= 20


def test_every_shipped_concept_has_a_word_list_that_occurs_in_its_texts_and_does_not_give_the_label_away(concepts):
    for name, concept in concepts.items():
        listed = set(concept.wordlist)
        hits = [bool(listed & set(words(e.text))) for e in examples_of(concept) if not e.ood]
        labels = [e.positive for e in examples_of(concept) if not e.ood]
        seen = [
            sum(h for h, y in zip(hits, labels, strict=True) if y is side) / labels.count(side)
            for side in (True, False)
        ]
        assert min(seen) > 0, name
        assert abs(seen[0] - seen[1]) < 0.35, name
