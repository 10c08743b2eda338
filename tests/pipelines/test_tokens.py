import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from chats import CHATML, INST, SPECIAL, letters
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

from pipelines.config import CollectConfig, TextSource
from pipelines.errors import UsageError
from pipelines.tokenising import TextTokenizer
from pipelines.tokens import plan_tokens


@cache
def tokenizer_of(bos: str | None = "<s>", template: str | None = None) -> TextTokenizer:
    return TextTokenizer.of(letters(bos=bos, template=template))


BOS = 0


def code(letter: str) -> int:
    return ord(letter) + len(SPECIAL)


def text_of(tokens) -> str:
    return "".join(chr(token - len(SPECIAL)) for token in tokens)


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
    return plan_tokens(sources, collect, tokenizer or tokenizer_of(), seed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("texts")


lengths = st.lists(st.integers(1, 60), min_size=16, max_size=50)


@settings(max_examples=25, deadline=None)
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
        assert text_of(tokens) == documents.text[row][first : first + len(tokens)]
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
        plan([source(folder, [20] * 40)], settings_for(400, prepend_bos=True), tokenizer=tokenizer_of(None))
    assert plan([source(folder, [20] * 40)], settings_for(400), tokenizer=tokenizer_of(None)).n_train_contexts


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
    # A tokenizer may drop what it does not know; this one drops the letter A.
    tokenizer = letters()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("A", "")
    (folder / "some.json").write_text(json.dumps(["A" * 20, *["b" * 20] * 40]))
    packed = plan(
        [TextSource(path=str(folder / "some.json"))], settings_for(800), tokenizer=TextTokenizer.of(tokenizer)
    )
    assert "0" not in packed.documents.id
    assert len(packed.documents) == 40


def slow_pack(documents, bos, length):
    """Token by token: (token, document, position) of whole contexts."""
    rows = []
    for row, ids in documents:
        position = 0
        for i, token in enumerate(ids):
            if i == 0 or len(rows) % length == 0:
                position = 0
                if bos is not None and len(rows) % length < length - 1 and token != bos:
                    rows.append((bos, row, 0))
                    position = 1
            rows.append((token, row, position))
            position += 1
    return rows[: len(rows) // length * length]


@settings(max_examples=15, deadline=None)
@given(lengths=lengths, prepend_bos=st.booleans(), form=st.sampled_from([(INST, "<s>"), (CHATML, "<|im_start|>")]))
def test_packing_equals_a_slow_loop(folder, lengths, prepend_bos, form):
    template, bos_token = form
    hf, tokenizer = letters(bos=bos_token), tokenizer_of(bos_token, template)
    sources = [source(folder, [*lengths, *[40] * 8]), chat_source(folder, "slow")]
    packed = plan(sources, settings_for(600, prepend_bos=prepend_bos), tokenizer=tokenizer)
    length, n_train = packed.tokens.shape[1], packed.n_train_contexts
    got = np.stack([packed.tokens, packed.document, packed.position], axis=-1)
    for name, contexts in (("train", got[:n_train]), ("heldout", got[n_train:])):
        documents = [
            (row, hf(text, add_special_tokens=False)["input_ids"])
            for row, (text, split) in enumerate(zip(packed.documents.text, packed.documents.split, strict=True))
            if split == name
        ]
        expected = np.array(slow_pack(documents, tokenizer.bos if prepend_bos else None, length))
        assert sorted(contexts.tolist()) == sorted(expected.reshape(-1, length, 3).tolist())


def chat_source(folder, template_name, n=60, **settings):
    path = folder / f"chat-{template_name}.jsonl"
    chats = [
        [
            {"role": "system", "content": f"rules {i}"},
            {"role": "user", "content": f"ask {i}" * (i % 4 + 1)},
            {"role": "assistant", "content": f"answer {i}"},
        ]
        for i in range(n)
    ]
    path.write_text("\n".join(json.dumps({"id": str(i), "m": chat, "n": i}) for i, chat in enumerate(chats)))
    return TextSource(path=str(path), messages_field="m", columns=("n",), **settings)


@pytest.mark.parametrize("prepend_bos", [False, True])
@pytest.mark.parametrize(("name", "bos"), [("INST", "<s>"), ("CHATML", "<|im_start|>"), ("CHATML", None)])
def test_chats_carry_role_turn_source_and_flags_to_every_token(folder, name, bos, prepend_bos):
    if prepend_bos and bos is None:
        return
    template = {"INST": INST, "CHATML": CHATML}[name]
    sources = [source(folder, [20] * 100), chat_source(folder, name)]
    tokenizer = tokenizer_of(bos, template)
    packed = plan(sources, settings_for(2400, prepend_bos=prepend_bos), tokenizer=tokenizer)
    tables, documents, bos_id = packed.tables, packed.documents, tokenizer.bos
    is_chat = np.array([origin != sources[0].path for origin in documents.source])[packed.document]
    assert {name: table.dtype.name for name, table in tables.items()} == {
        **{"flags": "uint8", "source": "int16", "role": "int8", "turn": "int16"}
    }
    assert (tables["source"] == is_chat).all()
    assert (tables["role"][~is_chat] == 0).all()
    assert (tables["turn"][~is_chat] == 0).all()
    spans, seen = packed.spans, 0
    for row, number in enumerate(documents.column("n")):
        # A document's tokens in their order, however its contexts were shuffled.
        mine = np.flatnonzero(spans.document == row)
        mine = mine[np.argsort(spans.document_token[mine])]
        at = [(spans.context[i], spans.start[i] + k) for i in mine for k in range(spans.length[i])]
        if number is None:
            continue
        said = dict.fromkeys((1, 2, 3), "")
        for context, offset in at:
            role = int(tables["role"][context, offset])
            if role != 5:
                assert tables["turn"][context, offset] == role - 1
                said[role] += chr(packed.tokens[context, offset] - len(SPECIAL))
        expected = [f"rules {number}", f"ask {number}" * (number % 4 + 1), f"answer {number}"]
        seen += list(said.values()) == expected
        assert all(full.startswith(part) for full, part in zip(expected, said.values(), strict=True))
    assert seen > 10

    # BOS: one at the start of a chat whatever the template writes; flagged where it starts a span, else special.
    starts = packed.position == 0
    at_bos = packed.tokens == bos_id if bos_id is not None else np.zeros_like(starts)
    assert ((tables["flags"] == 1) == (starts & at_bos)).all()
    assert ((tables["flags"] == 4) == ((packed.tokens < len(SPECIAL)) & ~(starts & at_bos))).all()
    assert not (at_bos[:, 1:] & at_bos[:, :-1]).any()
    first = np.zeros_like(starts)
    whole = spans.document_token == 0
    first[spans.context[whole & (spans.length > 1)], spans.start[whole & (spans.length > 1)]] = True
    if prepend_bos or bos is not None:
        assert (at_bos[first & is_chat]).all()
    assert (at_bos[first & ~is_chat] == prepend_bos).all()
    if bos_id is not None:
        assert (tables["role"][at_bos & is_chat] == 5).all()


def test_chat_without_a_template_names_the_fix(folder):
    with pytest.raises(
        UsageError,
        match=r"text source .*chat-none\.jsonl holds chats, but this model's tokenizer has no chat template: set "
        r"collect\.chat_template_path to a Jinja file, or use the model's chat version",
    ):
        plan([chat_source(folder, "none")], settings_for(400))


def test_chat_that_the_template_refuses_is_named(folder):
    path = folder / "refused.jsonl"
    path.write_text(json.dumps({"id": "odd", "m": [{"role": "assistant", "content": "x"}]}))
    with pytest.raises(
        UsageError, match=r"document 'odd' cannot be used as a chat: the chat template refuses it \(roles"
    ):
        plan([TextSource(path=str(path), messages_field="m")], settings_for(400), tokenizer=tokenizer_of("<s>", INST))


def test_template_is_part_of_the_provenance(folder):
    sources = [chat_source(folder, "p")]
    found = []
    for template in (CHATML, INST):
        (provenance,) = plan(sources, settings_for(900), tokenizer=tokenizer_of("<s>", template)).text_provenance
        found.append(provenance["template_sha256"])
    assert len({*found}) == 2
    assert all(len(digest) == 64 for digest in found)


def test_tokens_go_through_as_they_are_and_record_their_tokenizer(folder):
    path = folder / "ids.jsonl"
    texts = [f"text number {i} " * 3 for i in range(60)]
    path.write_text("\n".join(json.dumps({"ids": [BOS, *map(code, text)]}) for text in texts))
    tokenizer = TextTokenizer.of(letters(), sha256="a" * 64)
    chosen = TextSource(path=str(path), tokens_field="ids", tokenizer_sha256="a" * 64, id="ids")
    packed = plan([chosen], settings_for(1500, prepend_bos=True), tokenizer=tokenizer)
    assert set(packed.documents.text) <= set(texts)  # decoded, without special tokens
    assert not ((packed.tokens[:, 1:] == BOS) & (packed.tokens[:, :-1] == BOS)).any()
    assert (packed.tables["role"] == 0).all()
    (provenance,) = packed.text_provenance
    assert provenance["tokenizer_sha256"] == "a" * 64
    assert (provenance["kind"], provenance["field"], provenance["id"]) == ("tokens", "ids", "ids")
    other = chosen.model_copy(update={"tokenizer_sha256": "b" * 64})
    with pytest.raises(UsageError, match=f"made with the tokenizer {'b' * 64}, but the model's is {'a' * 64}"):
        plan([other], settings_for(1500), tokenizer=tokenizer)
