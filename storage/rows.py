"""Contiguous reads of one array of a store: through memory maps where it is local, each chunk's checksum tested at its
first use; else by fetching the chunks that are touched, each tested whenever it comes."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from storage.backends import Backend, ByteSource
from storage.commits import advice
from storage.encoding import CHECKSUM_BYTES, crc32c, decode_index, decompress, index_bytes
from storage.errors import CorruptionError, NotFoundError
from storage.layout import ArrayLayout

MAX_OPEN_FILES = 32
MAX_KEPT_CHUNKS = 2
"""Decompressed chunks that a reader holds, of 2 to 8 MiB each."""
WORTH_A_THREAD = 256 * 2**10
"""Bytes to be copied beside which a checksum is tested by a second thread; for fewer the handing over costs more."""

Chunk = tuple[int, int]
"""Number of a file, and of a chunk in it."""


@cache
def _helper() -> ThreadPoolExecutor:
    """One thread of this process that tests checksums beside copies; both run without Python's lock."""
    return ThreadPoolExecutor(1, "row-reader")


def _after_fork() -> None:
    """A child has none of its parent's threads, nor what they were doing."""
    _helper.cache_clear()
    for reader in _readers:
        reader.drop_tests()


_readers: WeakSet[RowReader] = WeakSet()
os.register_at_fork(after_in_child=_after_fork)


@dataclass(frozen=True, eq=False)
class _MappedFile:
    data: ByteSource
    chunks: list[tuple[int, int]]
    """Offset and length of each chunk."""


class RowReader:
    """Reads rows of one array. Threads may share it.

    A chunk that was verified once is not verified again by this object, so that rows may be read in any order at the
    price of one checksum pass.
    """

    def __init__(self, backend: Backend, array: ArrayLayout, *, verify: bool) -> None:
        self.array = array
        self._backend = backend
        self._verify = verify
        self._files: OrderedDict[int, _MappedFile] = OrderedDict()
        self._kept: OrderedDict[tuple[int, int], NDArray[Any]] = OrderedDict()
        self._last: tuple[int, _MappedFile] | None = None
        self._lock = threading.Lock()
        slots = array.rows_per_file // array.rows_per_chunk
        self._verified = np.zeros((array.n_files, slots), bool) if verify else None
        self._tests: dict[Chunk, Future[None]] = {}
        """Tests that the second thread was given and that were not seen to succeed."""
        self._expected_start = -1
        """Where the next read begins if rows are read in order."""
        self._opened_ahead = -1
        _readers.add(self)

    def drop_tests(self) -> None:
        """Forget what the second thread was asked to do: its tests will be made anew."""
        self._tests.clear()

    def read(self, start: int, stop: int, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Rows [start, stop), copied into `out` (same dtype and shape) or a new array. Checksums are tested while the
        rows are copied: if this raises, what is in `out` must not be used.

        Raises: ValueError if the range is not inside of the array; CorruptionError naming file and shard if bytes are
            missing or changed.
        """
        self._check_range(start, stop)
        if out is None:
            out = np.empty((stop - start, *self.array.shape[1:]), self.array.dtype)
        touched = list(self._touched(start, stop))
        beside = self._begin(touched, start, stop) if out.nbytes >= WORTH_A_THREAD else False
        row = 0
        for file, chunk, first, last in touched:
            rows = self._chunk(file, chunk, tested_beside=beside)[first:last]
            out[row : row + len(rows)] = rows
            row += len(rows)
        if beside:
            for file, chunk, _, _ in touched:
                self._tested(file, chunk)
        return out

    def _begin(self, touched: Sequence[tuple[int, int, int, int]], start: int, stop: int) -> bool:
        """Give the second thread the checksums of a large read, and what the next one will need if this is one of many
        in order. Returns whether there are checksums to wait for."""
        in_order, self._expected_start = start == self._expected_start, stop
        if self.array.compressed or not self._is_mapped(touched[0][0]):
            return False
        if self._verified is not None:
            for file, chunk, _, _ in touched:
                self._test_beside(file, chunk)
        if in_order:
            following = touched[-1][0] + 1
            if following < self.array.n_files and following != self._opened_ahead:
                self._opened_ahead = following
                _helper().submit(self._open_ahead, following)
            if self._verified is not None:
                self._test_ahead(stop, 2 * (stop - start))
        return self._verified is not None

    def _open_ahead(self, file: int) -> None:
        with contextlib.suppress(CorruptionError):  # told when it is read
            self._file(file)

    def pieces(self, start: int, stop: int) -> Iterator[NDArray[Any]]:
        """Rows [start, stop) in pieces of at most a chunk, in order; not copied where the file is mapped, and not to be
        written to. Raises as `read` does."""
        self._check_range(start, stop)
        for file, chunk, first, last in self._touched(start, stop):
            yield self._chunk(file, chunk, tested_beside=False)[first:last]

    def _touched(self, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """File, chunk and rows of the chunk, for each chunk that holds some of the rows."""
        array = self.array
        while start < stop:
            file, in_file = divmod(start, array.rows_per_file)
            chunk, first = divmod(in_file, array.rows_per_chunk)
            last = min(array.rows_per_chunk, first + stop - start)
            yield file, chunk, first, last
            start += last - first

    def forget(self, stop: int) -> None:
        """Lets go of the maps of the files that end before row `stop`; a deleted file holds its space until then."""
        with self._lock:
            self._last = None
            for file in [file for file in self._files if (file + 1) * self.array.rows_per_file <= stop]:
                del self._files[file]

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.array.shape[0]:
            raise ValueError(f"Rows of {self.array.key} must lie in [0, {self.array.shape[0]}], got [{start}, {stop}).")

    def _chunk(self, file: int, chunk: int, *, tested_beside: bool) -> NDArray[Any]:
        """A chunk's rows; if a second thread tests checksums, `_tested` must be called before they are used."""
        if self.array.compressed:
            return self._decompressed(file, chunk)
        stored = self._stored(file, chunk) if tested_beside else self._sound(file, chunk)
        return stored[:-CHECKSUM_BYTES].view(self.array.dtype).reshape(self.array.chunk_shape)

    def _sound(self, file: int, chunk: int) -> NDArray[np.uint8]:
        """A chunk as it is stored, once its checksum is tested."""
        stored = self._stored(file, chunk)
        if self._verified is not None and not self._verified[file, chunk]:
            self._test(file, chunk, stored)
        return stored

    def _stored(self, file: int, chunk: int) -> NDArray[np.uint8]:
        """A chunk as it is stored, with its checksum, which is not tested here."""
        array = self.array
        mapped = self._file(file)
        offset, length = mapped.chunks[chunk]
        if (length != array.stored_chunk_bytes and not array.compressed) or offset + length > mapped.data.size:
            raise self._corrupt(
                file,
                f"chunk {chunk} must have {array.stored_chunk_bytes} bytes inside of the file, "
                f"but the index says {length} at {offset}",
            )
        return mapped.data[offset : offset + length]

    def _test_beside(self, file: int, chunk: int) -> None:
        """Have a second thread test a chunk, unless that was done or asked for already."""
        assert self._verified is not None
        if self._verified[file, chunk] or (file, chunk) in self._tests:
            return
        test = self._tests[file, chunk] = _helper().submit(self._test, file, chunk, self._stored(file, chunk))
        test.add_done_callback(
            lambda done: done.cancelled() or done.exception() or self._tests.pop((file, chunk), None)
        )

    def _tested(self, file: int, chunk: int) -> None:
        """Wait until a chunk is tested. Raises CorruptionError if it is not what was stored."""
        test = self._tests.get((file, chunk))
        if test is None or test.cancel():
            self._tests.pop((file, chunk), None)
            self._sound(file, chunk)  # the second thread is behind, or another saw, and took away, a test that failed
            return
        try:
            test.result()
        finally:
            self._tests.pop((file, chunk), None)

    def _test_ahead(self, start: int, n_rows: int) -> None:
        """Begin to test what will be read next, as far as it can be; what is wrong there is told when it is read."""
        with contextlib.suppress(CorruptionError):
            for file, chunk, _, _ in self._touched(start, min(start + n_rows, self.array.shape[0])):
                self._test_beside(file, chunk)

    def _test(self, file: int, chunk: int, stored: NDArray[np.uint8]) -> None:
        if crc32c(stored[:-CHECKSUM_BYTES]) != stored[-CHECKSUM_BYTES:].tobytes():
            raise self._corrupt(file, f"chunk {chunk} must match its checksum, but it does not")
        assert self._verified is not None
        self._verified[file, chunk] = self._is_mapped(file)  # what is fetched again is tested again

    def _is_mapped(self, file: int) -> bool:
        return isinstance(self._file(file).data, np.ndarray)

    def _decompressed(self, file: int, chunk: int) -> NDArray[Any]:
        """A compressed chunk's rows. The last few are kept, since contexts of one chunk are often read in turn."""
        with self._lock:
            kept = self._kept.pop((file, chunk), None)
        if kept is None:
            kept = np.empty(self.array.chunk_shape, self.array.dtype)
            try:
                decompress(self._sound(file, chunk)[:-CHECKSUM_BYTES], kept)
            except ValueError as error:
                raise self._corrupt(file, f"chunk {chunk} must decompress: {error}") from error
        with self._lock:
            self._kept[file, chunk] = kept
            if len(self._kept) > MAX_KEPT_CHUNKS:
                self._kept.popitem(last=False)
        return kept

    def _file(self, file: int) -> _MappedFile:
        last = self._last  # one tuple, so that no other thread can change half of it
        if last is not None and last[0] == file:
            return last[1]
        with self._lock:
            mapped = self._files.pop(file, None) or self._open(file)
            self._files[file] = mapped
            if len(self._files) > MAX_OPEN_FILES:
                self._files.popitem(last=False)
            self._last = (file, mapped)
            return mapped

    def _open(self, file: int) -> _MappedFile:
        array, key = self.array, self.array.file_key(file)
        try:
            data = self._backend.open(key)
        except NotFoundError as error:
            raise self._corrupt(file, "the file must exist, but it is missing") from error
        if not array.compressed and data.size != array.file_bytes(file):
            raise self._corrupt(file, f"the file must have {array.file_bytes(file):,} bytes, but it has {data.size:,}")
        if not array.sharded:
            return _MappedFile(data, [(0, data.size)])
        try:
            index = data[max(0, data.size - index_bytes(array.slots_per_file)) : data.size]
            chunks = decode_index(index, array.slots_per_file)
            stored = int(chunks[: array.chunks_in_file(file), 1].sum()) + index.size
            if array.compressed and stored != data.size:
                raise ValueError(f"the file must have {stored:,} bytes, but it has {data.size:,}")
            return _MappedFile(data, [(int(offset), int(length)) for offset, length in chunks])
        except ValueError as error:
            raise self._corrupt(file, str(error)) from error

    def _corrupt(self, file: int, fact: str) -> CorruptionError:
        where = self._backend.location(self.array.file_key(file))
        if self.array.is_table:
            return CorruptionError(
                f"{where} (file {file}): {fact}. Restore the file from a copy, or make the store anew."
            )
        return CorruptionError(f"{where} (shard {file}): {fact}. {advice(self._backend.location())}")
