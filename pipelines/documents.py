"""Documents and where they stand in the store: the sidecar files `documents.parquet` and `spans.parquet`.

`document` in the store is a row of `documents.parquet`. A span is a run of tokens of one document inside one context,
so that any row of activations leads back to its text: context and offset → span → document and token of the document.
"""

import io
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

DOCUMENTS_FILE = "documents.parquet"
SPANS_FILE = "spans.parquet"


@dataclass(frozen=True)
class Document:
    """One text before tokenising."""

    id: str
    source: str
    title: str
    topic: str
    text: str


@dataclass(frozen=True)
class Documents:
    """The documents of a store, in the order that the store's `document` array counts them."""

    id: list[str]
    source: list[str]
    title: list[str]
    topic: list[str]
    split: list[str]
    """`train` or `heldout`."""
    n_tokens: list[int]
    """Tokens of the document that the store holds."""
    text: list[str]

    def __len__(self) -> int:
        return len(self.id)

    def to_parquet(self) -> bytes:
        """Parquet file as bytes."""
        return _to_bytes(pa.table({name: getattr(self, name) for name in self.__dataclass_fields__}))

    @classmethod
    def from_parquet(cls, data: bytes) -> "Documents":
        """Read what `to_parquet` wrote."""
        table = pq.read_table(io.BytesIO(data))
        return cls(**{name: table[name].to_pylist() for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class Spans:
    """Runs of tokens of one document inside one context, sorted by (context, start).

    Where the run prepends BOS, a span of two tokens or more begins with one; it is no token of the document.
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
