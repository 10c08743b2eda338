"""Feature families: latents that say the same, that split a feature, or that take a feature's tokens over.

Of each latent and its nearest decoder neighbours, on held-out tokens (F = tokens on which it fires):

    near duplicate   the decoder rows have a cosine of at least 0.9, or the two fire on nearly the same tokens:
                     |F_i & F_j| / |F_i | F_j| >= 0.7
    splits into j    nearly all firings of j lie within those of i, which fires at least twice as often:
                     |F_i & F_j| / |F_j| >= 0.9
    absorbed by j    a candidate for absorption (Chanin et al. 2024, arXiv 2409.14507): the label of i holds on tokens
                     on which i is silent, and j, rarer than i, fires on at least half of these and mostly there where
                     the label of i holds

They are candidates for people to look at, not tests.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.labels.firings import Firings

_COSINE, _SAME, _WITHIN, _HOLES = 0.9, 0.7, 0.9, 0.5
_FEWEST = 10
"""Firings, or holes, below which nothing is said."""


class Relations(NamedTuple):
    """Latents by kind of relation, a list for each latent."""

    near_duplicates: list[list[int]]
    splits_into: list[list[int]]
    split_from: list[list[int]]
    absorbed_by: list[list[int]]


def relate(
    firings: Firings,
    neighbours: NDArray[np.int64],
    cosine: NDArray[np.float32],
    holes: Sequence[NDArray[np.int64]],
) -> Relations:
    """Relations of every latent.

    Args:
        firings: of the whole dictionary on held-out tokens.
        neighbours: `[d_sae, k]` latents with the most similar decoder rows, `cosine` how similar.
        holes: of each latent, ascending token rows on which its label holds and it is silent.
    """
    n = firings.n_latents
    found = Relations([[] for _ in range(n)], [[] for _ in range(n)], [[] for _ in range(n)], [[] for _ in range(n)])
    size = firings.n_firings
    marked = _Marked(firings)
    for i in range(n):
        near = neighbours[i][size[neighbours[i]] >= _FEWEST]
        if size[i] < _FEWEST or not len(near):
            continue
        mine = firings.row[firings.indptr[i] : firings.indptr[i + 1]]
        both, taken = marked.counts(mine, near), marked.counts(holes[i], near)
        same = cosine[i][size[neighbours[i]] >= _FEWEST] >= _COSINE
        same |= both >= _SAME * (size[i] + size[near] - both)
        within = ~same & (both >= _WITHIN * size[near]) & (size[i] >= 2 * size[near])
        absorbing = ~same & ~within & (len(holes[i]) >= _FEWEST) & (size[near] < size[i])
        absorbing &= (taken >= _HOLES * len(holes[i])) & (taken + both >= _HOLES * size[near])
        found.near_duplicates[i].extend(near[same].tolist())
        found.splits_into[i].extend(near[within].tolist())
        found.absorbed_by[i].extend(near[absorbing].tolist())
        for j in near[within].tolist():
            found.split_from[j].append(i)
    return found


class _Marked:
    """Counts how many of some token rows each of a few latents fires on."""

    def __init__(self, firings: Firings) -> None:
        self._firings = firings
        self._mark = np.zeros(int(firings.row.max(initial=-1)) + 1, bool)

    def counts(self, rows: NDArray[np.int64], latents: NDArray[np.int64]) -> NDArray[np.int64]:
        """Of each latent, its firings among `rows`; every latent must fire somewhere."""
        inside = rows[rows < len(self._mark)]
        self._mark[inside] = True
        theirs = self._firings.take(latents)
        found = np.add.reduceat(self._mark[theirs.row].astype(np.int64), theirs.indptr[:-1])
        self._mark[inside] = False
        return np.asarray(found, np.int64)
