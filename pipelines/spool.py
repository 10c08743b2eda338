"""Documents on disk while they are tokenised: written once in their order, then read by row from a memory map."""

from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.corpora import Document

_SCHEMA = pa.schema(
    {
        "id": pa.large_string(),
        "title": pa.large_string(),
        "topic": pa.large_string(),
        "columns": pa.large_string(),
        "content": pa.large_binary(),
    }
)
_BATCH_DOCUMENTS = 1024
_BATCH_BYTES = 2**22


class Spool:
    """Rows of documents in one Arrow file; processes open their own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as file:
            self._batches = [file.get_batch(i) for i in range(file.num_record_batches)]
        self._ends = np.cumsum([0, *(batch.num_rows for batch in self._batches)])

    @staticmethod
    def write(path: Path, documents: Iterable[Document]) -> "Spool":
        """Writes all documents, a few megabytes in memory at a time."""
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as file:
            for batch in _batched(documents):
                columns = [[getattr(document, name) for document in batch] for name in _SCHEMA.names]
                arrays = [pa.array(column, field.type) for column, field in zip(columns, _SCHEMA, strict=True)]
                file.write_batch(pa.record_batch(arrays, schema=_SCHEMA))
        return Spool(path)

    def __len__(self) -> int:
        return int(self._ends[-1])

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """Bytes of each document's content."""
        import pyarrow.compute as pc

        parts = [pc.binary_length(batch["content"]).to_numpy() for batch in self._batches]
        return np.concatenate([np.empty(0, np.int64), *parts])

    @property
    def topics(self) -> NDArray[np.int64]:
        """Topic of each document, as its place among all topics in alphabetical order."""
        if not self._batches:
            return np.empty(0, np.int64)
        encoded = pa.chunked_array([batch["topic"] for batch in self._batches]).dictionary_encode().combine_chunks()
        names = np.array(encoded.dictionary.to_pylist())
        return np.asarray(np.argsort(np.argsort(names))[encoded.indices.to_numpy()], np.int64)

    def column(self, name: str, rows: NDArray[np.int64]) -> list[Any]:
        """One field of some documents, in the order of `rows`."""
        batch = np.searchsorted(self._ends, rows, side="right") - 1
        return [
            self._batches[b][name][row].as_py()
            for b, row in zip(batch.tolist(), (rows - self._ends[batch]).tolist(), strict=True)
        ]

    def read(self, rows: NDArray[np.int64]) -> tuple[list[str], list[bytes]]:
        """Ids and contents of some documents."""
        return self.column("id", rows), self.column("content", rows)


def _batched(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.content)
        if len(batch) == _BATCH_DOCUMENTS or size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
