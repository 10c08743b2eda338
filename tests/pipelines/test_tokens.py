import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.config import CollectConfig, TextSource
from pipelines.errors import UsageError
from pipelines.tokens import plan_tokens

BOS = 1


@dataclass
class Letters:
    """A tokenizer with one token a character, the character's code."""

    bos_token_id: int | None = BOS

    def __call__(self, texts, *, add_special_tokens, verbose):
        assert not add_special_tokens
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


def source(folder: Path, lengths, *, name="a", topics=None, weight=1.0) -> TextSource:
    """Documents of the given lengths; a document's characters are its number's, then a running alphabet."""
    path = folder / f"{name}.json"
    records = [
        {
            "text": "".join(chr(200 + (13 * i + j) % 5000) for j in range(length)),
            "topic": "" if topics is None else topics[i],
        }
        for i, length in enumerate(lengths)
    ]
    path.write_text(json.dumps(records))
    return TextSource(path=str(path), topic_field="topic", weight=weight)


def settings_for(n_tokens, **kw) -> CollectConfig:
    return CollectConfig(**({"n_tokens": n_tokens, "context_length": 16, "heldout_fraction": 0.25} | kw))


def plan(sources, collect, seed=0, tokenizer=None):
    return plan_tokens(sources, collect, tokenizer or Letters(), seed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("texts")


lengths = st.lists(st.integers(1, 60), min_size=16, max_size=50)


@settings(max_examples=50, deadline=None)
@given(lengths=lengths, prepend_bos=st.booleans(), seed=st.integers(0, 1000), whole=st.booleans())
def test_packing_keeps_its_promises(folder, lengths, prepend_bos, seed, whole):
    lengths = [*lengths, *[40] * 8]  # enough for a context of each split
    n_tokens = sum(lengths) if whole else sum(lengths) * 3 // 4
    collect = settings_for(n_tokens, prepend_bos=prepend_bos)
    packed = plan([source(folder, lengths, topics=["xyz"[i % 3] for i in range(len(lengths))])], collect, seed)
    documents, spans, length = packed.documents, packed.spans, collect.context_length
    assert packed.tokens.shape == packed.document.shape == packed.position.shape == (len(packed.tokens), length)
    assert 0 < packed.n_train_contexts < len(packed.tokens)

    # A context holds documents of one split only.
    split = np.array(documents.split)
    assert (split[packed.document[: packed.n_train_contexts]] == "train").all()
    assert (split[packed.document[packed.n_train_contexts :]] == "heldout").all()

    # Positions restart at every span and count up inside it.
    joined = np.diff(packed.document, axis=1) == 0
    assert (packed.position[:, 0] == 0).all()
    assert (packed.position[:, 1:][~joined] == 0).all()
    assert (np.diff(packed.position, axis=1)[joined] == 1).all()

    # Spans tile the contexts and lead every token back to its document's text.
    found: dict[int, dict[int, int]] = {row: {} for row in range(len(documents))}
    covered = np.zeros(packed.tokens.shape, dtype=int)
    for context, start, n, row, first in zip(
        spans.context, spans.start, spans.length, spans.document, spans.document_token, strict=True
    ):
        covered[context, start : start + n] += 1
        tokens = packed.tokens[context, start : start + n]
        assert (packed.document[context, start : start + n] == row).all()
        if prepend_bos and n > 1:
            assert tokens[0] == BOS
            tokens = tokens[1:]
        assert "".join(map(chr, tokens)) == documents.text[row][first : first + len(tokens)]
        for i, token in enumerate(tokens):
            assert first + i not in found[row]
            found[row][first + i] = token
    assert (covered == 1).all()
    order = list(zip(spans.context.tolist(), spans.start.tolist(), strict=True))
    assert order == sorted(order)

    # Nothing is lost but the last partial context of each split.
    for row, tokens in found.items():
        assert sorted(tokens) == list(range(len(tokens)))
        assert documents.n_tokens[row] == (packed.document == row).sum()
    for name in ("train", "heldout"):
        rows = np.flatnonzero(split == name)
        lost = sum(len(documents.text[row]) - len(found[row]) for row in rows)
        assert 0 <= lost < length


def test_tokens_are_chosen_until_the_budget_is_met(folder):
    packed = plan([source(folder, [20] * 100)], settings_for(1000))
    assert len(packed.documents) == 50
    assert packed.documents.split.count("heldout") in (12, 13)


def test_weights_share_the_budget_between_sources(folder):
    sources = [source(folder, [20] * 100, name="one", weight=3), source(folder, [20] * 100, name="two", weight=1)]
    packed = plan(sources, settings_for(1600))
    assert packed.documents.source.count(sources[0].path) == 60
    assert packed.documents.source.count(sources[1].path) == 20
    assert [(p["origin"], p["weight"]) for p in packed.text_provenance] == [(s.path, s.weight) for s in sources]
    assert all(len(p["sha256"]) == 64 for p in packed.text_provenance)


def test_sorted_topics_reach_both_splits_in_proportion(folder):
    topics = ["rare"] * 20 + ["common"] * 180
    packed = plan([source(folder, [20] * 200, topics=topics)], settings_for(2000, heldout_fraction=0.2))
    split, topic = np.array(packed.documents.split), np.array(packed.documents.topic)
    assert abs((topic == "rare").sum() - 10) <= 1
    assert abs((split[topic == "rare"] == "heldout").sum() - 2) <= 1


def test_same_seed_gives_the_same_bytes_and_another_seed_other_contexts(folder):
    sources, collect = [source(folder, range(1, 80))], settings_for(2500)

    def as_bytes(seed):
        packed = plan(sources, collect, seed)
        arrays = (packed.tokens, packed.document, packed.position)
        return [a.tobytes() for a in arrays] + [packed.documents.to_parquet(), packed.spans.to_parquet()]

    assert as_bytes(3) == as_bytes(3)
    assert as_bytes(3)[0] != as_bytes(4)[0]


def test_contexts_are_shuffled_inside_their_split(folder):
    packed = plan([source(folder, [16] * 400)], settings_for(6400))
    first = packed.document[: packed.n_train_contexts, 0]
    assert sorted(first) != first.tolist()
    assert abs(np.corrcoef(first, np.arange(len(first)))[0, 1]) < 0.2


def test_prepend_bos_puts_it_before_every_span_with_room_for_it(folder):
    # Documents of 14 letters in contexts of 16: BOS + 14, then one slot left, too small for a BOS and a letter.
    packed = plan([source(folder, [14] * 12)], settings_for(14 * 12, prepend_bos=True))
    starts = packed.position == 0
    room = 16 - np.nonzero(starts)[1]
    assert ((packed.tokens[starts] == BOS) == (room > 1)).all()
    assert (packed.tokens[~starts] != BOS).all()
    assert 1 in room


def test_prepend_bos_without_a_bos_token_is_refused(folder):
    with pytest.raises(
        UsageError, match=r"collect\.prepend_bos is on, but this model's tokenizer has no BOS token: turn it off"
    ):
        plan([source(folder, [20] * 40)], settings_for(400, prepend_bos=True), tokenizer=Letters(bos_token_id=None))
    assert plan([source(folder, [20] * 40)], settings_for(400), tokenizer=Letters(bos_token_id=None)).n_train_contexts


def test_too_little_text_says_how_much_there_is_and_what_to_change(folder):
    with pytest.raises(
        UsageError,
        match=r"text source .*a\.json holds 800 tokens, the config asks for 5,000: "
        r"lower collect\.n_tokens or the source's weight, or add a source",
    ):
        plan([source(folder, [20] * 40)], settings_for(5000))


def test_split_without_a_whole_context_says_what_to_change(folder):
    with pytest.raises(
        UsageError,
        match=r"the heldout split has 10 tokens, fewer than one context of 16: raise collect\.n_tokens, "
        r"give more documents, or lower collect\.context_length",
    ):
        plan([source(folder, [10] * 12)], settings_for(120, heldout_fraction=0.1))


def test_documents_without_tokens_are_left_out(folder):
    class NoA(Letters):
        def __call__(self, texts, **kw):
            return {
                "input_ids": [
                    ids if "A" not in t else []
                    for t, ids in zip(texts, super().__call__(texts, **kw)["input_ids"], strict=True)
                ]
            }

    (folder / "some.json").write_text(json.dumps(["A" * 20, *["b" * 20] * 40]))
    packed = plan([TextSource(path=str(folder / "some.json"))], settings_for(800), tokenizer=NoA())
    assert "0" not in packed.documents.id
    assert len(packed.documents) == 40
