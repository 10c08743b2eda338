"""Reads ranges of remote files: the latest are kept in memory up to a bound, the next fetched ahead of their use."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from storage.errors import StorageError

AHEAD = 3
"""Ranges that are fetched before they are asked for, where a file is read in order."""

Name = tuple[str, int, int]
"""Key, first byte, and the byte after the last."""


class RangeReader:
    """Ranges of the files of one store. Threads may share it."""

    def __init__(self, fetch: Callable[[str, int, int], NDArray[np.uint8]], max_bytes: int) -> None:
        """
        Args:
            fetch: bytes [start, stop) of a file that has as many, read-only.
            max_bytes: of ranges that are kept, over all files. A range of more than a quarter of it is not kept, so
                that one large file does not drive out everything else.
        """
        self.held_bytes = 0
        self._fetch = fetch
        self._max_bytes = max_bytes
        self._kept: OrderedDict[Name, NDArray[np.uint8]] = OrderedDict()
        self._under_way: dict[Name, Future[NDArray[np.uint8]]] = {}
        self._pool = ThreadPoolExecutor(AHEAD, "read-ahead")
        self._lock = threading.Lock()

    def read(self, key: str, start: int, stop: int) -> NDArray[np.uint8]:
        """Bytes [start, stop) of a file that has as many, read-only."""
        if start >= stop:
            return np.empty(0, np.uint8)
        name = (key, start, stop)
        kept = self._find(name)
        if kept is not None:
            return kept
        coming = self._under_way.get(name)
        if coming is not None:
            with contextlib.suppress(StorageError):  # then the same request tells it, or does better
                return coming.result()
        return self._fetch_and_keep(*name)

    def read_ahead(self, key: str, start: int, n_bytes: int, size: int) -> None:
        """Begins to fetch the next few ranges of that length, inside of a file of that size."""
        if n_bytes > self._max_bytes // 4:
            return
        for low in range(start, min(start + AHEAD * n_bytes, size - n_bytes + 1), n_bytes):
            name = (key, low, low + n_bytes)
            if name not in self._under_way and self._find(name) is None:
                coming = self._pool.submit(self._fetch_and_keep, *name)
                self._under_way[name] = coming
                coming.add_done_callback(functools.partial(self._arrived, name))

    def forget(self, key: str) -> None:
        """Lets go of a file that is changed or removed."""
        with self._lock:
            for name in [name for name in self._kept if name[0] == key]:
                self.held_bytes -= self._kept.pop(name).nbytes

    def _arrived(self, name: Name, _: Future[NDArray[np.uint8]]) -> None:
        self._under_way.pop(name, None)

    def _fetch_and_keep(self, key: str, start: int, stop: int) -> NDArray[np.uint8]:
        data = self._fetch(key, start, stop)
        if data.nbytes <= self._max_bytes // 4:
            with self._lock:
                if (key, start, stop) not in self._kept:
                    self._kept[key, start, stop] = data
                    self.held_bytes += data.nbytes
                while self.held_bytes > self._max_bytes:
                    self.held_bytes -= self._kept.popitem(last=False)[1].nbytes
        return data

    def _find(self, name: Name) -> NDArray[np.uint8] | None:
        with self._lock:
            data = self._kept.get(name)
            if data is not None:
                self._kept.move_to_end(name)
            return data


class RemoteFile:
    """A file of which ranges are read as they are asked for; stands in for the array that a map gives."""

    def __init__(self, ranges: RangeReader, key: str, size: int) -> None:
        self.size = size
        self._ranges = ranges
        self._key = key
        self._last_stop = -1

    def __getitem__(self, range_: slice) -> NDArray[np.uint8]:
        start, stop, _ = range_.indices(self.size)
        if 0 < self._last_stop == start < stop:  # the second range in a row
            self._ranges.read_ahead(self._key, stop, stop - start, self.size)
        self._last_stop = stop
        return self._ranges.read(self._key, start, stop)
