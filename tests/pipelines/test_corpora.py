import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipelines.config import TextSource
from pipelines.corpora import describe, documents_of, heldout_mask, stratified_order
from pipelines.errors import UsageError
from pipelines.sources import sha256_of

topics = st.lists(st.integers(0, 6), min_size=1, max_size=120).map(lambda xs: [f"t{x}" for x in xs])


def read_source(source):
    """All documents of a source, and its provenance without the kind of content."""
    provenance = describe(source)
    documents = list(documents_of(source, revision=provenance.get("revision"), n_vocab=100))
    return documents, {key: value for key, value in provenance.items() if key not in ("kind", "field")}


def text_of(document):
    return document.content.decode()


def texts_of(source):
    return [text_of(document) for document in read_source(source)[0]]


# -- formats -----------------------------------------------------------------------------------------------------------


def test_txt_has_one_document_a_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("first line\n\n   \nsecond\fline\u2028still second\n")
    documents, provenance = read_source(TextSource(path=str(path)))
    assert [(d.id, text_of(d)) for d in documents] == [
        ("a.txt:1", "first line"),
        ("a.txt:4", "second\fline\u2028still second"),
    ]
    assert {d.title for d in documents} == {"a.txt:1", "a.txt:4"}
    assert provenance == {"origin": str(path), "sha256": sha256_of(path)}


def test_jsonl_takes_fields_by_name_and_keeps_unusual_line_breaks_inside_a_text(tmp_path):
    path = tmp_path / "a.jsonl"
    records = [
        {"id": 7, "body": "one\u2028two\x85three", "name": "T", "kind": "x"},
        {"body": "without id", "name": None, "kind": None},
        {"body": "number", "name": 3, "kind": 0},
    ]
    path.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n\n")
    documents, _ = read_source(TextSource(path=str(path), text_field="body", title_field="name", topic_field="kind"))
    assert [(d.id, text_of(d), d.title, d.topic) for d in documents] == [
        ("7", "one\u2028two\x85three", "T", "x"),
        ("a.jsonl:2", "without id", "a.jsonl:2", ""),
        ("a.jsonl:3", "number", "3", "0"),
    ]


@pytest.mark.parametrize(
    ("data", "ids"),
    [
        ({"a": {"text": "x"}, "b": {"text": "y"}}, ["a", "b"]),
        ({"a": "x", "b": "y"}, ["a", "b"]),
        ([{"text": "x"}, {"text": "y"}], ["0", "1"]),
        (["x", "y"], ["0", "1"]),
    ],
)
def test_json_may_be_an_object_or_a_list_of_texts_or_records(tmp_path, data, ids):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(data))
    documents, _ = read_source(TextSource(path=str(path)))
    assert [(d.id, text_of(d)) for d in documents] == list(zip(ids, ["x", "y"], strict=True))


def test_parquet_numbers_rows_through_all_batches(tmp_path):
    path = tmp_path / "a.parquet"
    n = 70_000  # more than one batch of the reader
    pq.write_table(pa.table({"text": [str(i) for i in range(n)]}), path)
    documents, _ = read_source(TextSource(path=str(path)))
    assert [text_of(d) for d in documents] == [str(i) for i in range(n)]
    assert len({d.id for d in documents}) == n
    assert documents[-1].id == f"a.parquet:{n - 1}"


def test_parquet_takes_ids_and_topics_from_columns(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": ["p", "q"], "text": ["x", "y"], "topic": ["t", None]}), path)
    documents, _ = read_source(TextSource(path=str(path), topic_field="topic"))
    assert [(d.id, d.topic) for d in documents] == [("p", "t"), ("q", "")]


def test_package_file_is_found_without_importing_the_package(tmp_path, monkeypatch):
    package = tmp_path / "texts_in_a_package"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "data" / "a.txt").write_text("hello\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert texts_of(TextSource(path="package://texts_in_a_package/data/a.txt")) == ["hello"]


def test_topics_file_gives_topics_by_document_id(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"a": "x", "b": "y"}))
    (tmp_path / "topics.json").write_text(json.dumps({"a": "rivers"}))
    source = TextSource(path=str(tmp_path / "a.json"), topics_path=str(tmp_path / "topics.json"))
    documents, provenance = read_source(source)
    assert [d.topic for d in documents] == ["rivers", ""]
    assert provenance["topics_sha256"] == sha256_of(tmp_path / "topics.json")


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_missing_file_is_named(tmp_path):
    with pytest.raises(
        UsageError, match=r"nowhere\.txt: there is no file .*nowhere\.txt; check the path in the config"
    ):
        read_source(TextSource(path=str(tmp_path / "nowhere.txt")))


def test_missing_package_is_named():
    with pytest.raises(UsageError, match="the package 'no_such_package' is not installed; `make demo` installs"):
        read_source(TextSource(path="package://no_such_package/a.txt"))


def test_other_digest_than_expected_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    found = sha256_of(tmp_path / "a.txt")
    with pytest.raises(
        UsageError, match=f"its SHA-256 is {found}, the config expects {'0' * 64}; install the pinned file"
    ):
        read_source(TextSource(path=str(tmp_path / "a.txt"), sha256="0" * 64))
    assert texts_of(TextSource(path=str(tmp_path / "a.txt"), sha256=found)) == ["hello"]


def test_other_topics_digest_than_expected_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "t.json").write_text("{}")
    source = TextSource(path=str(tmp_path / "a.txt"), topics_path=str(tmp_path / "t.json"), topics_sha256="0" * 64)
    with pytest.raises(UsageError, match=r"t\.json: its SHA-256 is"):
        read_source(source)


@pytest.mark.parametrize(("content", "kind"), [("[1]", "list"), ("{", "cannot be read as JSON")])
def test_topics_file_must_be_a_json_object(tmp_path, content, kind):
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(UsageError, match=rf"topics_path .*t\.json .*{kind}"):
        read_source(TextSource(path=str(tmp_path / "a.txt"), topics_path=str(tmp_path / "t.json")))


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.csv", b"x", r"unknown format '\.csv'; use \.txt, \.jsonl, \.json or \.parquet"),
        ("a.txt", b"\xff\xfe", r"cannot be read as \.txt: 'utf-8' codec"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"cannot be read as \.jsonl: "),
        ("a.jsonl", b'["x"]\n', r"cannot be read as \.jsonl: line 1 must be a JSON object, not list"),
        ("a.json", b"{", r"cannot be read as \.json: "),
        (
            "a.json",
            b'"one string"',
            r"cannot be read as \.json: it must hold an object or a list of documents, not str",
        ),
        ("a.parquet", b"not parquet at all", r"cannot be read as \.parquet: "),
    ],
)
def test_unreadable_file_is_named_with_the_reason(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=f"text source .*{name}.*{reason}"):
        read_source(TextSource(path=str(tmp_path / name)))


def test_missing_field_names_the_document_and_its_fields(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"body": "x", "also": 1}]))
    with pytest.raises(
        UsageError, match=r"document '0' has no field 'text'; it has \['also', 'body'\]: set `text_field`"
    ):
        read_source(TextSource(path=str(tmp_path / "a.json")))


def test_field_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"text": 3}]))
    with pytest.raises(UsageError, match="field 'text' of document '0' is int, not text"):
        read_source(TextSource(path=str(tmp_path / "a.json")))


# -- folders, tokens, columns ------------------------------------------------------------------------------------------


def test_folder_of_txt_has_one_document_a_file_and_may_be_read_by_line(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("one\ntwo\n")
    (tmp_path / "sub" / "a.txt").write_text("three\n")
    (tmp_path / "notes.md").write_text("not a text of this folder")
    documents, provenance = read_source(TextSource(path=str(tmp_path)))
    assert [(d.id, text_of(d)) for d in documents] == [("b.txt", "one\ntwo\n"), ("sub/a.txt", "three\n")]
    by_line = read_source(TextSource(path=str(tmp_path), document="line"))[0]
    assert [(d.id, text_of(d)) for d in by_line] == [("b.txt:1", "one"), ("b.txt:2", "two"), ("sub/a.txt:1", "three")]
    whole = read_source(TextSource(path=str(tmp_path / "b.txt"), document="file"))[0]
    assert [(d.id, text_of(d)) for d in whole] == [("b.txt", "one\ntwo\n")]
    (tmp_path / "sub" / "a.txt").rename(tmp_path / "sub" / "c.txt")
    renamed = describe(TextSource(path=str(tmp_path)))
    assert renamed["sha256"] != provenance["sha256"]
    assert texts_of(TextSource(path=str(tmp_path), sha256=renamed["sha256"])) == ["one\ntwo\n", "three\n"]
    with pytest.raises(UsageError, match=f"its SHA-256 is {renamed['sha256']}, the config expects {'0' * 64}"):
        describe(TextSource(path=str(tmp_path), sha256="0" * 64))


def test_folder_of_jsonl_is_read_file_by_file(tmp_path):
    for name, texts in (("b", ["x", "y"]), ("a", ["z"])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    assert texts_of(TextSource(path=str(tmp_path))) == ["z", "x", "y"]


def test_tokens_are_kept_as_they_are_and_empty_ones_left_out(tmp_path):
    pq.write_table(pa.table({"ids": [[1, 99, 0], [], [7]], "id": ["a", "b", "c"]}), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text('{"ids": [1, 99, 0], "id": "a"}\n{"ids": []}\n{"ids": [7], "id": "c"}\n')
    for name in ("a.parquet", "a.jsonl"):
        documents, _ = read_source(TextSource(path=str(tmp_path / name), tokens_field="ids"))
        found = [(d.id, np.frombuffer(d.content, np.int32).tolist()) for d in documents]
        assert found == [("a", [1, 99, 0]), ("c", [7])]


def test_messages_are_kept_as_pairs_of_role_and_content(tmp_path):
    chat = [{"role": "user", "content": "Hi é"}, {"role": "assistant", "content": "Hello", "weight": 1}]
    schema = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
    pq.write_table(pa.table({"chat": pa.array([chat], schema)}), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text(json.dumps({"chat": chat}))
    for name in ("a.parquet", "a.jsonl"):
        documents, _ = read_source(TextSource(path=str(tmp_path / name), messages_field="chat"))
        assert [json.loads(d.content) for d in documents] == [[["user", "Hi é"], ["assistant", "Hello"]]]


def test_further_columns_are_kept(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([{"text": "x", "url": "https://a", "tags": ["é"]}]))
    (document,) = read_source(TextSource(path=str(tmp_path / "a.json"), columns=("url", "tags")))[0]
    assert json.loads(document.columns) == {"url": "https://a", "tags": ["é"]}
    with pytest.raises(UsageError, match=r"document '0' has no field 'licence'; .*: correct `columns`"):
        read_source(TextSource(path=str(tmp_path / "a.json"), columns=("url", "licence")))


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ([], r"it holds no \.txt, \.jsonl, \.json, \.parquet file"),
        (["a.txt", "b.json"], r"it holds \.json, \.txt files"),
    ],
)
def test_folder_must_hold_text_files_of_one_kind(tmp_path, names, reason):
    for name in names:
        (tmp_path / name).write_text("x")
    with pytest.raises(UsageError, match=f"a folder must hold text files of one kind, but {reason}"):
        describe(TextSource(path=str(tmp_path)))


USER = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("text", [USER], "has messages in the field 'f', not text: use `messages_field`"),
        ("text", "\ud800", "has text that is not Unicode"),
        ("messages", "plain", "its messages must be a list of .* not str: use `text_field` for plain text"),
        ("messages", USER, "its messages must be a list of {role, content}, not dict"),
        ("messages", [], "it must have 1 to 32767 messages, not 0"),
        ("messages", [USER, "x"], "message 1 must have a role and a content, but is str"),
        ("messages", [{"from": "user", "value": "x"}], r"message 0 must have .*, but is \['from', 'value'\]"),
        ("messages", [{"role": "assistent", "content": "x"}], "the role 'assistent'; the nearest .* is 'assistant'"),
        ("messages", [USER, {"role": "assistant", "content": " "}], r"message 1 \(assistant\) has an empty content"),
        ("messages", [{"role": "user", "content": None}], "the content of message 0 must be text, not NoneType"),
        ("messages", [{**USER, "tool_calls": [1]}], "message 0 holds tool calls"),
        ("messages", [{"role": "user", "content": "\ud800"}], "cannot be used as a chat, since .*surrogates"),
        ("tokens", "1 2", "has str in the field 'f', not a list of token ids"),
        ("tokens", 3, "has int in the field 'f', not a list of token ids"),
        ("tokens", [1, 2.5], "has values in the field 'f' that are not whole numbers"),
        ("tokens", [[1], [2, 3]], "has values in the field 'f' that are not whole numbers"),
        ("tokens", [3, 100], "token ids from 3 to 100, but the tokenizer knows 0 to 99"),
        ("tokens", [-1, 5], "token ids from -1 to 5, but the tokenizer knows 0 to 99"),
    ],
)
def test_content_that_is_not_what_the_source_says_is_refused(tmp_path, field, value, reason):
    (tmp_path / "a.jsonl").write_text(json.dumps({"id": "d7", "f": value}))
    with pytest.raises(
        UsageError, match=rf"text source .*a\.jsonl: document 'd7' {'.*' if field != 'text' else ''}{reason}"
    ):
        read_source(TextSource(path=str(tmp_path / "a.jsonl"), **{f"{field}_field": "f"}))


@pytest.mark.parametrize(("field", "advice"), [("messages_field", "messages_field"), ("tokens_field", "tokens_field")])
def test_missing_field_of_messages_or_tokens_names_the_setting(tmp_path, field, advice):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}')
    with pytest.raises(UsageError, match=rf"has no field 'f'; it has \['text'\]: set `{advice}`"):
        read_source(TextSource(path=str(tmp_path / "a.jsonl"), **{field: "f"}))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"weight": 0}, "greater than 0"),
        ({"text_field": "a", "messages_field": "b"}, "one kind of document: give one of text_field, messages_field"),
        ({"tokenizer_sha256": "a"}, "tokenizer_sha256 belongs to `tokens_field`"),
        ({"path": None, "dataset": "a/b", "document": "file"}, "`document` is for `.txt` files"),
        ({"columns": ["url", "topic"]}, r"`columns` lists \['topic'\], which documents.parquet has anyway"),
        ({"columns": ["url", "url"]}, "`columns` lists a field twice"),
        ({"dataset": "a/b"}, "exactly one of `path` and `dataset`"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(settings, reason):
    with pytest.raises(ValidationError, match=reason):
        TextSource(**{"path": "a.txt", **settings})


# -- order and split ---------------------------------------------------------------------------------------------------


@given(topics=topics, seed=st.integers(0, 2**32 - 1))
def test_every_prefix_holds_the_same_share_of_each_topic_to_within_one_document(topics, seed):
    order = stratified_order(topics, np.random.default_rng(seed))
    assert sorted(order) == list(range(len(topics)))
    names, label = np.unique(topics, return_inverse=True)
    size = np.bincount(label)
    count = np.zeros(len(names), dtype=int)
    for document in order:
        count[label[document]] += 1
        # Some x has n x - 1 < count < n x + 1 for every topic at once.
        assert ((count - 1) / size).max() < ((count + 1) / size).min()


@given(sizes=st.lists(st.integers(1, 40), min_size=2, max_size=2), seed=st.integers(0, 2**32 - 1))
def test_every_prefix_of_two_topics_holds_each_in_proportion_to_within_one_document(sizes, seed):
    topics = ["a"] * sizes[0] + ["b"] * sizes[1]
    order = stratified_order(topics, np.random.default_rng(seed))
    is_a = np.array([topics[row] == "a" for row in order])
    proportional = np.arange(1, len(order) + 1) * sizes[0] / sum(sizes)
    assert (np.abs(np.cumsum(is_a) - proportional) < 1 + 1e-9).all()


def test_order_favours_no_topic_and_no_document_and_follows_the_seed():
    topics = ["a"] * 5 + ["b"] * 20 + [f"single {i}" for i in range(15)]
    first = [stratified_order(topics, np.random.default_rng(seed))[:8].tolist() for seed in range(2000)]
    share = np.bincount(np.concatenate(first), minlength=40) / 2000
    # Each document is among the first fifth with probability near 1/5, whatever its topic's size (sd 0.009).
    np.testing.assert_allclose(share, 0.2, atol=0.05)
    assert first[3] == stratified_order(topics, np.random.default_rng(3))[:8].tolist()


@given(topics=topics, fraction=st.floats(0.02, 0.9))
def test_heldout_mask_takes_its_fraction_of_each_topic_in_every_prefix(topics, fraction):
    mask = heldout_mask(topics, fraction)
    assert abs(mask.sum() - fraction * len(topics)) <= 0.5 + 1e-9
    for topic in set(topics):
        rows = [i for i, t in enumerate(topics) if t == topic]
        held = np.cumsum(mask[rows])
        assert (np.abs(held - fraction * np.arange(1, len(rows) + 1)) < 1 + 1e-9).all()


def test_heldout_mask_holds_out_its_share_of_topics_with_one_document_each():
    assert heldout_mask([f"topic {i}" for i in range(1000)], 0.1).sum() == 100


def test_heldout_mask_by_hand():
    assert heldout_mask(["a"] * 8, 0.25).tolist() == [False, True, False, False, False, True, False, False]
    # Counted a a b b: the first of each pair crosses a half.
    assert heldout_mask(["a", "b", "a", "b"], 0.5).tolist() == [True, True, False, False]
