"""Which row goes where: the plan behind `ShuffledReader`, as arithmetic on numbers of contexts, rows and streams.

    epoch   = the shards of a split in an order drawn from (seed, epoch); their contexts, ascending in each shard
    window  = a run of contexts of that sequence; the windows of an epoch differ by at most one context
    stream  = one of V endless sequences of rows; batch b takes rows [b * B/V, (b + 1) * B/V) of each

The usable rows of all windows of all epochs are counted through. After the first c of them, stream v has

    dealt(c, v) = floor((c + V - 1 - v) / V)

rows, as if they had been dealt one by one. So of a window that starts at count c and has n usable rows, stream v gets
dealt(c + n, v) - dealt(c, v): a contiguous part of the window, which it permutes by (seed, epoch, window, v). Streams
never differ by more than one row, no row is dropped or repeated where windows or epochs meet, and at the end of the
last epoch those rows remain that do not fill a batch: fewer than B, which is a multiple of V.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Order = Literal["shuffled", "ring"]
"""`shuffled`: the shards of each epoch in random order; `ring`: ascending, as they are written."""


def dealt(count: int, stream: int, n_streams: int) -> int:
    """Rows that a stream has of the first `count` rows."""
    return (count + n_streams - 1 - stream) // n_streams


@dataclass(frozen=True)
class Run:
    """Neighbouring contexts [start, stop)."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Window:
    """One window of an epoch."""

    epoch: int
    number: int
    runs: tuple[Run, ...]
    """Its contexts in order; each run lies in one shard."""

    def shards(self, contexts_per_shard: int) -> list[int]:
        """Shards that it reads, in order of reading."""
        return [run.start // contexts_per_shard for run in self.runs]


@dataclass(frozen=True)
class WindowPlan:
    """The windows of every epoch over contexts [first, stop)."""

    first: int
    stop: int
    contexts_per_shard: int
    window_contexts: int
    """Most contexts in a window."""
    seed: int
    order: Order = "shuffled"

    @property
    def n_contexts(self) -> int:
        return self.stop - self.first

    @property
    def n_windows(self) -> int:
        """Windows of an epoch."""
        return -(-self.n_contexts // self.window_contexts)

    @property
    def least_window(self) -> int:
        """Contexts of the smallest window."""
        return self.n_contexts // self.n_windows

    def shards(self, epoch: int) -> list[int]:
        """Shards of the split in the epoch's order."""
        per_shard = self.contexts_per_shard
        shards = np.arange(self.first // per_shard, -(-self.stop // per_shard))
        if self.order == "shuffled":
            shards = np.random.default_rng([self.seed, epoch]).permutation(shards)
        numbers: list[int] = shards.tolist()
        return numbers

    def windows(self, epoch: int) -> Iterator[Window]:
        """The epoch's windows, in order."""
        n, n_windows = self.n_contexts, self.n_windows
        runs: list[Run] = []
        number, seen, end = 0, 0, n // n_windows
        for shard in self.shards(epoch):
            start = max(self.first, shard * self.contexts_per_shard)
            stop = min(self.stop, (shard + 1) * self.contexts_per_shard)
            while start < stop:
                run = Run(start, min(stop, start + end - seen))
                runs.append(run)
                start, seen = run.stop, seen + len(run)
                if seen == end:
                    yield Window(epoch, number, tuple(runs))
                    runs, number = [], number + 1
                    end = (number + 1) * n // n_windows


@dataclass(frozen=True)
class Part:
    """What one stream gets of one window."""

    stream: int
    first: int
    """Which of the window's contexts is its first; it may be shared with the stream before, the last with the next."""
    runs: tuple[Run, ...]
    """Contexts that hold its rows."""
    skip: int
    """Usable rows of the first context that belong to the stream before."""
    n_rows: int

    @property
    def n_contexts(self) -> int:
        return sum(map(len, self.runs))


def parts(window: Window, usable: NDArray[np.int64], count: int, streams: range, n_streams: int) -> list[Part]:
    """Parts of a window, one for each of the given streams.

    Args:
        usable: usable rows of each context of the window, in order.
        count: usable rows of all windows before this one, over all epochs.
    """
    ends = np.cumsum(usable)
    n = int(ends[-1])
    sizes = [dealt(count + n, v, n_streams) - dealt(count, v, n_streams) for v in range(n_streams)]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    found = []
    for stream in streams:
        low, high = int(starts[stream]), int(starts[stream + 1])
        if low == high:
            found.append(Part(stream, 0, (), 0, 0))
            continue
        first = int(np.searchsorted(ends, low, side="right"))
        last = int(np.searchsorted(ends, high, side="left"))
        before = int(ends[first - 1]) if first else 0
        found.append(Part(stream, first, _cut(window.runs, first, last + 1), low - before, high - low))
    return found


def _cut(runs: tuple[Run, ...], first: int, stop: int) -> tuple[Run, ...]:
    """Contexts [first, stop) of the sequence that the runs make."""
    kept, seen = [], 0
    for run in runs:
        low, high = max(first - seen, 0), min(stop - seen, len(run))
        if low < high:
            kept.append(Run(run.start + low, run.start + high))
        seen += len(run)
    return tuple(kept)
