import dataclasses
import io

import numpy as np
import pyarrow.parquet as pq

from pipelines.documents import Documents, Spans

DOCUMENTS = Documents(
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
    assert Documents.from_parquet(DOCUMENTS.to_parquet()) == DOCUMENTS
    assert len(DOCUMENTS) == 2


def test_documents_are_plain_parquet_with_one_row_a_document():
    table = pq.read_table(io.BytesIO(DOCUMENTS.to_parquet()))
    assert table.column_names == ["id", "source", "title", "topic", "split", "n_tokens", "text"]
    assert table.to_pylist()[1]["title"] == "Ünïcode – 日本"


def test_no_documents_round_trip():
    empty = Documents([], [], [], [], [], [], [])
    assert Documents.from_parquet(empty.to_parquet()) == empty


def test_spans_round_trip_with_their_types():
    read = Spans.from_parquet(SPANS.to_parquet())
    for field in dataclasses.fields(Spans):
        array = getattr(read, field.name)
        assert array.dtype == np.int32
        np.testing.assert_array_equal(array, getattr(SPANS, field.name))


def test_bytes_depend_on_the_content_alone():
    assert DOCUMENTS.to_parquet() == DOCUMENTS.to_parquet()
    assert DOCUMENTS.to_parquet() != dataclasses.replace(DOCUMENTS, title=["A", "B"]).to_parquet()
    assert SPANS.to_parquet() == SPANS.to_parquet()
