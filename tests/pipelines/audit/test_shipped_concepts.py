"""The shipped safety concepts as a set: which there are, and that no two of their texts repeat each other.

What each file must reach alone (size, length, words against hard negatives) stands in test_audit_concepts.py.
"""

import re
from pathlib import Path

import numpy as np
import pytest

from pipelines.audit.concepts import Concept, examples_of, load_concept, shared_ngrams
from pipelines.audit.splits import split_by_group

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
    assert len(texts) >= 160 * len(NAMES)
    assert shared_ngrams(texts, [str(i) for i in range(len(texts))]) == []


def test_shipped_texts_have_one_to_three_sentences(concepts):
    for name, concept in concepts.items():
        long = [e.text for e in examples_of(concept) if len(END.findall(e.text)) > 3]
        assert long == [], name


@pytest.mark.parametrize("seed", [0, 1])
def test_a_split_leaves_24_positives_and_24_hard_negatives_of_each_concept_to_confirm(concepts, seed):
    for name, concept in concepts.items():
        examples = examples_of(concept)
        assert len({e.group for e in examples}) == len(examples), f"{name}: a text of its own is a group of its own"
        roles = np.array([e.role for e in examples])[split_by_group(examples, seed=seed).confirm]
        assert min((roles == "positive").sum(), (roles == "hard_negative").sum()) >= 24, name
