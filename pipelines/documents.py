"""Documents and where they stand in the store: the sidecar files `documents.parquet` and `spans.parquet`.

`document` in the store is a row of `documents.parquet`. A span is a run of tokens of one document inside one context,
so that any row of activations leads back to its text: context and offset → span → document and token of the document.

    documents = documents_of(store)
    documents.values_at(store, rows, "url")      # of rows of activations; row = context * context_length + offset
"""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.config import DOCUMENT_COLUMNS
from storage import ActivationStore

DOCUMENTS_FILE = "documents.parquet"
SPANS_FILE = "spans.parquet"


@dataclass(frozen=True)
class Documents:
    """The documents of a store, in the order that the store's `document` array counts them."""

    table: pa.Table
    """id, source, title, topic, split, n_tokens, text, then the sources' further columns."""

    @classmethod
    def of(
        cls,
        *,
        id: Sequence[str],
        source: Sequence[str],
        title: Sequence[str],
        topic: Sequence[str],
        split: Sequence[str],
        n_tokens: Sequence[int],
        text: Sequence[str] | pa.ChunkedArray,
        columns: Sequence[str] = (),
    ) -> "Documents":
        """From one value a document each.

        Args:
            columns: JSON objects of further fields. A field whose values are all of one plain type keeps it; of others,
                lists for example, the JSON is kept.
        """
        strings = {"id": id, "source": source, "title": title, "topic": topic, "split": split}
        made: dict[str, Any] = {name: pa.array(values, pa.string()) for name, values in strings.items()}
        made["n_tokens"] = pa.array(n_tokens, pa.int64())
        made["text"] = text if isinstance(text, pa.ChunkedArray) else pa.array(text, pa.large_string())
        return cls(pa.table(made | _typed_columns(columns)))

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def _list(self, name: str) -> list[Any]:
        return list(self.table[name].to_pylist())

    @cached_property
    def id(self) -> list[str]:
        """Ids; unique within a source."""
        return self._list("id")

    @cached_property
    def source(self) -> list[str]:
        """Path or data set that each comes from."""
        return self._list("source")

    @cached_property
    def title(self) -> list[str]:
        """Titles; the id where there is none."""
        return self._list("title")

    @cached_property
    def topic(self) -> list[str]:
        """Topics; empty where there is none."""
        return self._list("topic")

    @cached_property
    def split(self) -> list[str]:
        """`train` or `heldout`."""
        return self._list("split")

    @cached_property
    def n_tokens(self) -> list[int]:
        """Tokens of each document that the store holds."""
        return self._list("n_tokens")

    @cached_property
    def text(self) -> list[str]:
        """The text; of a chat, as its template gives it; of a pre-tokenised source, decoded."""
        return self._list("text")

    @property
    def columns(self) -> list[str]:
        """Names of the sources' further columns."""
        return [name for name in self.table.column_names if name not in DOCUMENT_COLUMNS]

    def column(self, name: str) -> list[Any]:
        """One value a document; None where a document's source does not have the column.

        Raises:
            ValueError: no such column.
        """
        if name not in self.table.column_names:
            raise ValueError(f"documents.parquet has no column {name!r}; it has {self.table.column_names}.")
        return self._list(name)

    def row(self, document: int) -> dict[str, Any]:
        """Everything known of one document."""
        return dict(self.table.slice(document, 1).to_pylist()[0])

    def values_at(self, store: ActivationStore, rows: NDArray[np.integer[Any]], name: str) -> list[Any]:
        """A column's value for each of some rows of the store's activations."""
        length = store.spec.context_length
        values = self.column(name)
        contexts, inverse = np.unique(np.asarray(rows) // length, return_inverse=True)
        found = np.concatenate(
            [store.contexts(context, context + 1).document for context in contexts.tolist()]
            or [np.empty((0, length), np.int32)]
        )
        return [values[document] for document in found[inverse.reshape(-1), np.asarray(rows) % length].tolist()]

    def to_parquet(self) -> bytes:
        """Parquet file as bytes."""
        return _to_bytes(self.table)

    @classmethod
    def from_parquet(cls, data: bytes) -> "Documents":
        """Read what `to_parquet` wrote."""
        return cls(pq.read_table(io.BytesIO(data)))


def documents_of(store: ActivationStore) -> Documents:
    """The documents of a store that `collect` made."""
    return Documents.from_parquet(store.sidecar(DOCUMENTS_FILE))


def _typed_columns(columns: Sequence[str]) -> dict[str, pa.Array]:
    records = [json.loads(record) if record else {} for record in columns]
    typed = {}
    for name in dict.fromkeys(name for record in records for name in record):
        values = [record.get(name) for record in records]
        kinds = {type(value) for value in values if value is not None}
        if kinds == {int, float}:
            kinds, values = {float}, [None if value is None else float(value) for value in values]
        if len(kinds) > 1 or not kinds <= {str, int, float, bool}:
            values = [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
        typed[name] = pa.array(values)
    return typed


@dataclass(frozen=True)
class Spans:
    """Runs of tokens of one document inside one context, sorted by (context, start).

    Where the run prepends BOS, a span of two tokens or more begins with one; it is no token of the document, unless the
    document has one of its own there.
    """

    context: NDArray[np.int32]
    start: NDArray[np.int32]
    """First offset inside the context."""
    length: NDArray[np.int32]
    document: NDArray[np.int32]
    document_token: NDArray[np.int32]
    """Which token of the document the span begins with, after its BOS."""

    def to_parquet(self) -> bytes:
        """Parquet file as bytes."""
        return _to_bytes(pa.table({name: getattr(self, name) for name in self.__dataclass_fields__}))

    @classmethod
    def from_parquet(cls, data: bytes) -> "Spans":
        """Read what `to_parquet` wrote."""
        table = pq.read_table(io.BytesIO(data))
        return cls(**{name: table[name].to_numpy() for name in cls.__dataclass_fields__})


def _to_bytes(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()
