"""Windows of rows in memory, laid out as the batches that they give: the moving parts of `ShuffledReader`.

    loader thread ──Loaded──▶ Prefetch ──▶ batches_of ──▶ batches
          ▲                                                  │
          └──── memory, once nobody holds a batch of it ─────┘

A row is written once, to its place in its batch, and a batch is a view of the window: memory traffic is what limits
this, and a copy of each batch costs as much as the reading. Only batches across two windows are put together.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Layout:
    """Where the rows of a window go, for streams of which batch b takes rows [b * take, (b + 1) * take).

    body    n_whole batches, each `take` rows of every stream, one stream after the other
    loose   up to 2 * take rows of each stream, of batches that other windows have a part in
    waste   one row, for what is not wanted
    """

    starts: tuple[int, ...]
    """Per stream, the number of its rows before the window."""
    ends: tuple[int, ...]
    take: int
    first_batch: int
    """No rows of earlier batches are wanted."""

    @property
    def first_whole(self) -> int:
        """The first batch that the window may give alone."""
        return max(self.first_batch, *(-(-start // self.take) for start in self.starts))

    @property
    def n_whole(self) -> int:
        return max(0, min(end // self.take for end in self.ends) - self.first_whole)

    @property
    def batch_rows(self) -> int:
        return len(self.starts) * self.take

    @property
    def waste(self) -> int:
        return self.n_whole * self.batch_rows + 2 * self.batch_rows

    @property
    def n_rows(self) -> int:
        """Rows that must fit into the memory."""
        return self.waste + 1

    def places(self, stream: int) -> NDArray[np.int64]:
        """Where each of a stream's rows in the window goes, in the order in which it gives them."""
        rows = np.arange(self.starts[stream], self.ends[stream])
        batch, slot = np.divmod(rows, self.take)
        whole = (batch >= self.first_whole) & (batch < self.first_whole + self.n_whole)
        places = (batch - self.first_whole) * self.batch_rows + stream * self.take + slot
        low, (before, after) = self._loose(stream), self.n_loose(stream)
        places[~whole] = self.waste
        wanted = np.flatnonzero(~whole & (batch >= self.first_batch))
        places[wanted] = low + np.arange(before + after)
        return places

    def n_loose(self, stream: int) -> tuple[int, int]:
        """Wanted rows of a stream before, and after, those of the whole batches."""
        low, high = max(self.starts[stream], self.first_batch * self.take), self.ends[stream]
        first = self.first_whole * self.take
        last = first + self.n_whole * self.take
        return max(0, min(high, first) - low), max(0, high - max(low, last))

    def _loose(self, stream: int) -> int:
        return self.n_whole * self.batch_rows + stream * 2 * self.take

    def loose(self, memory: NDArray[Any], stream: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Copies of a stream's rows before and after the whole batches."""
        low, (before, after) = self._loose(stream), self.n_loose(stream)
        return memory[low : low + before].copy(), memory[low + before : low + before + after].copy()


@dataclass(eq=False)
class Loaded:
    """A window in memory."""

    whole: torch.Tensor
    """Batches that it gives alone, [n_whole * batch_rows, d_in]; used again when no view of them is left."""
    before: list[NDArray[Any]]
    """Per stream, rows of batches that begin in earlier windows."""
    after: list[NDArray[Any]]
    """Per stream, rows of batches that end in later ones."""


class Memory:
    """Rows of one width. What nobody holds any more is given out again: fresh memory costs more than its filling."""

    def __init__(self, d_in: int, dtype: np.dtype[Any]) -> None:
        self._d_in, self._dtype = d_in, dtype
        self._free: deque[NDArray[Any]] = deque(maxlen=3)

    def rows(self, n_rows: int) -> NDArray[Any]:
        """At least that many rows. Hold this array, or a tensor that shares it; slices of it do not count."""
        memory = None
        while self._free and (memory is None or len(memory) < n_rows):
            memory = self._free.pop()
        if memory is None or len(memory) < n_rows:
            memory = np.empty((n_rows + n_rows // 32, self._d_in), self._dtype)  # later windows may be a little larger
        rows = memory.view()
        weakref.finalize(rows, self._free.append, memory).atexit = False
        return rows


class Prefetch:
    """Passes windows from the loading thread to the reader: batches are given of one while the next is loaded."""

    def __init__(self) -> None:
        self.loaded: queue.SimpleQueue[Loaded | BaseException | None] = queue.SimpleQueue()
        self.stopped = threading.Event()
        self.starving = threading.Event()
        self._room = threading.Semaphore(2)

    def wait_for_room(self) -> None:
        """Waits until fewer than two windows are loaded, or the reader is left."""
        self._room.acquire()

    def next(self) -> Loaded | None:
        """The next window, None when there is none. Raises what stopped the loader."""
        self.starving.set()
        window = self.loaded.get()
        self.starving.clear()
        if isinstance(window, BaseException):
            raise window
        return window

    def used(self) -> None:
        """All batches of a window are given."""
        self._room.release()

    def stop(self) -> None:
        """Ends the loader once it has finished the window that it is at."""
        self.stopped.set()
        self._room.release()


def batches_of(prefetch: Prefetch, n_streams: int, take: int) -> Iterator[torch.Tensor]:
    """Batches [n_streams * take, d_in] of the windows, until they end."""
    carried: list[list[NDArray[Any]]] = [[] for _ in range(n_streams)]
    size = n_streams * take
    while (window := prefetch.next()) is not None:
        yield from _joined(carried, window.before, take)
        n_whole = len(window.whole) // size
        for number in range(n_whole):
            batch = window.whole[number * size : (number + 1) * size]
            # A copy of the last, so that the window's memory is free when the next batch is asked for.
            yield batch if number < n_whole - 1 else batch.clone()
            del batch
        after, window = window.after, None
        prefetch.used()
        yield from _joined(carried, after, take)


def _joined(carried: list[list[NDArray[Any]]], more: Sequence[NDArray[Any]], take: int) -> Iterator[torch.Tensor]:
    """Add rows to those that are carried, and give the batches that they fill."""
    import torch

    for own, rows in zip(carried, more, strict=True):
        own.append(rows)
    while min(sum(map(len, own)) for own in carried) >= take:
        batch = []
        for own in carried:
            rows = np.concatenate(own)
            batch.append(rows[:take])
            own[:] = [rows[take:]]
        yield torch.from_numpy(np.concatenate(batch))
