"""Where latents fire: sparse activations of a block of latents, and how to cut a dictionary into blocks."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Firings(NamedTuple):
    """Nonzero activations of some consecutive latents in compressed-column form.

    Latent `i` of the block fires on tokens `row[indptr[i]:indptr[i + 1]]` (ascending) with strengths `value[...]`
    (positive).
    """

    indptr: NDArray[np.int64]
    row: NDArray[np.int64]
    value: NDArray[np.float32]

    @property
    def n_latents(self) -> int:
        return len(self.indptr) - 1

    @property
    def latent(self) -> NDArray[np.int64]:
        """Index within the block of the latent of each firing."""
        return np.repeat(np.arange(self.n_latents), np.diff(self.indptr))

    @property
    def n_firings(self) -> NDArray[np.int64]:
        """Number of firings of each latent."""
        return np.diff(self.indptr)

    def where(self, keep: NDArray[np.bool_]) -> "Firings":
        """The firings for which `keep` (one entry per firing) holds, in the same order."""
        kept_before = np.concatenate([np.zeros(1, np.int64), np.cumsum(keep, dtype=np.int64)])
        return Firings(kept_before[self.indptr], self.row[keep], self.value[keep])

    def take(self, latents: NDArray[np.int64]) -> "Firings":
        """The firings of some latents of the block, in the given order."""
        size = self.n_firings[latents]
        indptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(size, dtype=np.int64)])
        entry = np.arange(indptr[-1]) + np.repeat(self.indptr[latents] - indptr[:-1], size)
        return Firings(indptr, self.row[entry], self.value[entry])


def join_firings(parts: Sequence[Firings]) -> Firings:
    """The firings of consecutive blocks as those of one."""
    n_firings = np.concatenate([part.n_firings for part in parts])
    return Firings(
        np.concatenate([np.zeros(1, np.int64), np.cumsum(n_firings, dtype=np.int64)]),
        np.concatenate([part.row for part in parts]),
        np.concatenate([part.value for part in parts]),
    )


def block_ranges(counts: NDArray[np.int64], max_firings: int, max_latents: int) -> Iterator[tuple[int, int]]:
    """Consecutive latent ranges `(lo, hi)` that hold at most `max_firings` firings and `max_latents` latents each.

    A latent that alone exceeds `max_firings` gets a range of its own, so memory is bounded by the larger of the two.
    """
    total = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])
    lo, n_latents = 0, len(counts)
    while lo < n_latents:
        by_firings = int(np.searchsorted(total, total[lo] + max_firings, side="right")) - 1
        hi = min(max(by_firings, lo + 1), lo + max_latents, n_latents)
        yield lo, hi
        lo = hi
