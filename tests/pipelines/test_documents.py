import dataclasses
import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines.documents import Documents, Spans, documents_of

DOCUMENTS = Documents.of(
    id=["a", "b"],
    source=["one.txt", "two.txt"],
    title=["A", "Ünïcode – 日本"],
    topic=["", "rivers"],
    split=["train", "heldout"],
    n_tokens=[3, 0],
    text=["line one\nline two\u2028end", ""],
)
SPANS = Spans(
    context=np.array([0, 0, 1], np.int32),
    start=np.array([0, 5, 0], np.int32),
    length=np.array([5, 3, 8], np.int32),
    document=np.array([1, 0, 0], np.int32),
    document_token=np.array([0, 0, 3], np.int32),
)


def test_documents_round_trip():
    read = Documents.from_parquet(DOCUMENTS.to_parquet())
    assert read.table.equals(DOCUMENTS.table)
    assert len(read) == 2
    assert read.row(1) == {
        **{"id": "b", "source": "two.txt", "title": "Ünïcode – 日本", "topic": "rivers", "split": "heldout"},
        **{"n_tokens": 0, "text": ""},
    }
    assert read.columns == []


def test_documents_are_plain_parquet_with_one_row_a_document():
    table = pq.read_table(io.BytesIO(DOCUMENTS.to_parquet()))
    assert table.column_names == ["id", "source", "title", "topic", "split", "n_tokens", "text"]
    assert table.to_pylist()[1]["title"] == "Ünïcode – 日本"


def test_no_documents_round_trip():
    empty = Documents.of(id=[], source=[], title=[], topic=[], split=[], n_tokens=[], text=[])
    assert Documents.from_parquet(empty.to_parquet()).table.equals(empty.table)


def test_further_columns_keep_plain_types_and_others_become_json():
    records = [
        {"url": "https://a", "year": 1999, "score": 1, "tags": ["x", "é"], "mixed": 1},
        {"url": None, "year": 2001, "score": 0.5, "tags": None, "mixed": "one"},
        {},
    ]
    three = {key: ["a", "b", "c"] for key in ("id", "source", "title", "topic", "split", "text")}
    documents = Documents.of(**three, n_tokens=[1, 2, 3], columns=[json.dumps(record) for record in records])
    read = Documents.from_parquet(documents.to_parquet())
    assert read.columns == ["url", "year", "score", "tags", "mixed"]
    assert read.column("url") == ["https://a", None, None]
    assert read.column("year") == [1999, 2001, None]
    assert read.column("score") == [1.0, 0.5, None]
    assert read.column("tags") == ['["x", "é"]', None, None]
    assert read.column("mixed") == ["1", '"one"', None]
    with pytest.raises(ValueError, match=r"no column 'licence'; it has \['id', .*'mixed'\]"):
        read.column("licence")


def test_values_are_reached_from_rows_of_activations(store):
    documents, length = documents_of(store), store.spec.context_length
    rows = np.array([5 * length + 3, 0, 7 * length + 31, 5 * length + 4])
    expected = [documents.title[store.document[row // length, row % length]] for row in rows]
    assert documents.values_at(store, rows, "title") == expected
    assert documents.values_at(store, rows[:0], "title") == []


def test_spans_round_trip_with_their_types():
    read = Spans.from_parquet(SPANS.to_parquet())
    for field in dataclasses.fields(Spans):
        array = getattr(read, field.name)
        assert array.dtype == np.int32
        np.testing.assert_array_equal(array, getattr(SPANS, field.name))


def test_bytes_depend_on_the_content_alone():
    assert DOCUMENTS.to_parquet() == DOCUMENTS.to_parquet()
    other = Documents(DOCUMENTS.table.set_column(2, "title", [["A", "B"]]))
    assert DOCUMENTS.to_parquet() != other.to_parquet()
    assert SPANS.to_parquet() == SPANS.to_parquet()
