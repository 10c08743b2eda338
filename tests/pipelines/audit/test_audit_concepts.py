"""Concept files: what is refused and with which words, and the quality of the shipped ones."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from pipelines.audit.baselines import cross_validated_bag_of_words, text_length
from pipelines.audit.concepts import (
    Concept,
    ConceptError,
    concept_from_dict,
    examples_of,
    load_concept,
    topic_examples,
)
from pipelines.audit.examples import shared_ngrams, words
from pipelines.audit.statistics import auroc

SHIPPED = sorted((Path(__file__).parents[3] / "configs" / "concepts").glob("*.yaml"))
WRITTEN = [path for path in SHIPPED if "topic:" not in path.read_text()]


def raw(**changes):
    out = {
        "name": "demo",
        "positives": [f"positive text number {i}" for i in range(30)],
        "hard_negatives": [f"negative text number {i}" for i in range(30)],
    }
    return out | changes


def test_examples_are_their_own_groups_unless_a_group_is_given():
    positives = [*raw()["positives"], {"text": "one", "group": "a"}, {"text": "two", "group": "a"}]
    examples = examples_of(concept_from_dict(raw(positives=positives, negatives=["an ordinary text"])))
    assert len(examples) == 63
    assert len({e.group for e in examples}) == 62
    assert [e.role for e in examples if e.group == "a"] == ["positive", "positive"]
    assert examples[-1].role == "negative"
    assert not examples[-1].positive
    assert len({e.digest for e in examples}) == 63


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positves": []}, "unknown key 'positves'; the nearest valid key is 'positives'"),
        (
            {"positives": [{"text": "a", "grup": "b"}]},
            r"unknown key 'positives.0.grup'; the nearest valid key is 'group'",
        ),
        ({"topic": {"positve": "Arts"}}, r"unknown key 'topic.positve'; the nearest valid key is 'positive'"),
        ({"hard_negatives": []}, "hard_negatives and negatives: a concept needs both classes, and this one is empty"),
        (
            {"positives": ["a", "b", "c", "d"]},
            "4 texts in 4 groups are too few.*at least 30 groups are needed, 26 more",
        ),
        ({"positives": [*raw()["positives"], "  "]}, r"positives\[30\] is empty; write a text or remove it"),
        (
            {"positives": [*raw()["positives"], "Positive text, number 3!"]},
            r"positives\[3\], positives\[30\] are the same text; keep one",
        ),
        (
            {"negatives": ["positive text number 5"]},
            r"positives\[5\], negatives\[0\] are one text with contradictory labels",
        ),
        ({"positives": [*raw()["positives"], "bell \x07"]}, r"positives\[30\] holds control characters; remove them"),
        ({"positives": [*raw()["positives"], "word " * 9000]}, r"positives\[30\] has 45000 characters; at most 4000"),
        ({"kind": "behaviour"}, "behaviour needs the model's own responses.*use kind: text"),
        ({"kind": "behavior"}, "kind: Input should be 'text' or 'behaviour'"),
        ({"schema_version": 2}, "schema_version: Input should be 1"),
        ({"name": "../escape"}, "name: String should match pattern"),
        ({"topic": {"positive": "Arts"}}, "topic and positives, hard_negatives exclude each other; keep one"),
    ],
)
def test_a_concept_that_cannot_be_used_is_refused_with_the_fix(changes, message):
    with pytest.raises(ConceptError, match=message):
        concept_from_dict(raw(**changes))


def test_all_problems_are_listed_at_once_with_the_file(tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text(yaml.safe_dump(raw(positives=["", "a", "A"])))
    with pytest.raises(ConceptError) as caught:
        load_concept(path)
    for part in ("broken.yaml", "positives[0] is empty", "positives[1], positives[2]", "are too few"):
        assert part in str(caught.value)


def test_a_file_that_is_not_a_concept_is_refused(tmp_path):
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    (tmp_path / "bad.yaml").write_text("a: [")
    (tmp_path / "code.yaml").write_text("name: !!python/object/apply:os.getcwd []")
    with pytest.raises(ConceptError, match=r"list.yaml holds a list"):
        load_concept(tmp_path / "list.yaml")
    with pytest.raises(ConceptError, match=r"(?s)bad.yaml is not.*Fix the syntax"):
        load_concept(tmp_path / "bad.yaml")
    with pytest.raises(ConceptError, match=r"code.yaml is not"):
        load_concept(tmp_path / "code.yaml")
    with pytest.raises(ConceptError, match=r"gone.yaml does not. Concept files beside it: bad.yaml, code.yaml"):
        load_concept(tmp_path / "gone.yaml")


def topic(**changes) -> Concept:
    return concept_from_dict(
        {"name": "t", "topic": {"positive": "Arts", "exclude": ["Misc"], "n_per_class": 40} | changes}
    )


def documents(n=300):
    topics = [("Arts", "History", "Misc")[i % 3] for i in range(n)]
    return {"doc_ids": [f"d{i}" for i in range(n)], "topics": topics, "texts": [f"document {i}" for i in range(n)]}


def test_topic_examples_draw_both_classes_by_seed_and_leave_excluded_topics_out():
    examples = topic_examples(topic(), **documents(), seed=1)
    assert [e.role for e in examples] == ["positive"] * 40 + ["negative"] * 40
    assert {int(e.group[1:]) % 3 for e in examples[:40]} == {0}
    assert {int(e.group[1:]) % 3 for e in examples[40:]} == {1}
    assert examples == topic_examples(topic(), **documents(), seed=1)
    assert examples != topic_examples(topic(), **documents(), seed=2)


def test_topic_examples_refuse_unknown_topics_few_documents_and_written_concepts():
    with pytest.raises(ConceptError, match=r"do not have: Artz\. They have: Arts, History, Misc"):
        topic_examples(topic(positive="Artz"), **documents())
    with pytest.raises(ConceptError, match="needs 30 documents or more of each class; got 10 positive"):
        topic_examples(topic(), **documents(30))
    with pytest.raises(ConceptError, match="has its own examples; call examples_of"):
        topic_examples(concept_from_dict(raw()), **documents())
    with pytest.raises(ConceptError, match="takes its examples from the corpus; call topic_examples"):
        examples_of(topic())


def test_shared_ngrams_find_near_duplicates_across_groups_only():
    texts = [
        "one two three four five six seven eight nine",
        "zero one two three FOUR five, six seven eight!",
        "other words",
    ]
    assert shared_ngrams(texts, ["a", "b", "c"]) == [(0, 1)]
    assert shared_ngrams(texts, ["a", "a", "c"]) == []


def test_five_concepts_are_shipped_and_load():
    assert {path.stem for path in SHIPPED} >= {"deception", "privacy", "violence", "topic_biology", "topic_geography"}
    for path in SHIPPED:
        assert load_concept(path).name == path.stem


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.stem)
def test_shipped_concepts_are_large_balanced_and_without_near_duplicates(path):
    concept = load_concept(path)
    examples = examples_of(concept)
    assert min(len(concept.positives), len(concept.hard_negatives)) >= 80
    assert shared_ngrams([e.text for e in examples], [e.group for e in examples]) == []
    assert all(5 <= len(words(e.text)) <= 60 for e in examples)
    labels = np.array([e.positive for e in examples])
    assert 0.35 <= auroc(text_length([e.text for e in examples])[:, None], labels)[0] <= 0.65


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.stem)
def test_words_alone_hardly_separate_shipped_positives_from_hard_negatives(path):
    examples = examples_of(load_concept(path))
    labels = np.array([e.positive for e in examples])
    areas = [
        auroc(cross_validated_bag_of_words([e.text for e in examples], labels, seed=seed)[:, None], labels)[0]
        for seed in range(5)
    ]
    assert np.mean(areas) <= 0.75
