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
    rows = [firings.row[firings.indptr[i] : firings.indptr[i + 1]] for i in range(n)]
    for i in range(n):
        mine = rows[i]
        if len(mine) < _FEWEST:
            continue
        for j, near in zip(neighbours[i].tolist(), cosine[i].tolist(), strict=True):
            theirs = rows[j]
            if len(theirs) < _FEWEST:
                continue
            both = len(np.intersect1d(mine, theirs, assume_unique=True))
            if near >= _COSINE or both >= _SAME * (len(mine) + len(theirs) - both):
                found.near_duplicates[i].append(j)
            elif both >= _WITHIN * len(theirs) and len(mine) >= 2 * len(theirs):
                found.splits_into[i].append(j)
                found.split_from[j].append(i)
            elif len(holes[i]) >= _FEWEST and len(theirs) < len(mine):
                taken = len(np.intersect1d(holes[i], theirs, assume_unique=True))
                if taken >= _HOLES * len(holes[i]) and taken + both >= _HOLES * len(theirs):
                    found.absorbed_by[i].append(j)
    return found
