"""Draws what every label has to answer: exams on held-out documents, and windows of other latents."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.labels.firings import Firings, block_ranges, join_firings
from pipelines.labels.testset import N_DECILES, NEGATIVES, Exam, SplitIndex, draw_test_set
from storage import LatentStore

_WINDOW_KINDS = (0, *(NEGATIVES.index(kind) + 1 for kind in ("random", "same_token", "same_document", "neighbour")))
_TOKEN_KINDS = (0, NEGATIVES.index("same_window") + 1)


class Sizes(NamedTuple):
    """How much is asked of a label."""

    positives: int
    negatives: int
    """Of each kind."""
    fuzzed: int
    """Windows with the right token marked; as many with a wrong one."""
    others: int
    neighbours: int
    windows_per_other: int


class Others(NamedTuple):
    """Windows of other latents, for the mismatch null of one."""

    which: NDArray[np.int64]
    """The latent of each window, which fires in its middle."""
    neighbour: NDArray[np.bool_]
    """Whether that latent is there as a nearest neighbour, rather than at random."""
    centre: NDArray[np.int64]


class Trials(NamedTuple):
    """What is asked of the labels of some latents."""

    detect: Exam
    """Windows: positives, and negatives in which the latent is silent throughout."""
    fuzz: Exam
    """Single tokens: positives, and silent tokens of the same windows."""
    others: dict[int, Others]


def heldout_firings(latents: LatentStore, index: SplitIndex, max_firings: int = 1_000_000) -> Firings:
    """Firings of the whole dictionary on usable held-out tokens; memory is that of these firings and of one block."""
    held = np.zeros(index.table.n_tokens, bool)
    held[index.rows] = True
    parts = []
    for lo, hi in block_ranges(latents.counts(), max_firings, latents.d_sae):
        block = latents.block(lo, hi)
        parts.append(Firings(block.indptr, block.row, block.value).where(held[block.row]))
    return join_firings(parts)


def draw_trials(
    firings: Firings,
    latents: NDArray[np.int64],
    index: SplitIndex,
    neighbours: NDArray[np.int64],
    sizes: Sizes,
    *,
    seed: int,
) -> Trials:
    """The trials of `latents` (ascending). A latent's depend on the seed and the firings alone, not on its company.

    Args:
        firings: of the whole dictionary on usable held-out tokens.
        neighbours: `[d_sae, k]` latents with the most similar decoder rows.
    """
    detect = draw_test_set(
        firings,
        latents,
        index,
        neighbours,
        seed=seed,
        n_per_decile=-(-sizes.positives // N_DECILES),
        n_negatives=sizes.negatives,
        quiet_only=True,
    )
    fuzz = draw_test_set(
        firings,
        latents,
        index,
        neighbours,
        seed=seed + 1,
        n_per_decile=-(-sizes.fuzzed // N_DECILES),
        n_negatives=sizes.fuzzed,
    )
    if not sizes.fuzzed:
        fuzz = fuzz.where(np.zeros(len(fuzz.row), bool))
    pool = np.flatnonzero(firings.n_firings > 0)
    return Trials(
        detect.where(np.isin(detect.kind, _WINDOW_KINDS)),
        fuzz.where(np.isin(fuzz.kind, _TOKEN_KINDS)),
        {int(i): _others(int(i), firings, pool, neighbours, sizes, seed) for i in latents},
    )


def of_latent(exam: Exam, latent: int) -> slice:
    """Where the questions of a latent stand."""
    first, last = np.searchsorted(exam.latent, [latent, latent + 1]).tolist()
    return slice(first, last)


def _others(
    latent: int, firings: Firings, pool: NDArray[np.int64], neighbours: NDArray[np.int64], sizes: Sizes, seed: int
) -> Others:
    rng = np.random.default_rng([seed, 2, latent])
    near = neighbours[latent][firings.n_firings[neighbours[latent]] > 0][: sizes.neighbours]
    far = rng.permutation(pool[(pool != latent) & ~np.isin(pool, near)])[: sizes.others]
    which, centre = [], []
    for other in [*near.tolist(), *far.tolist()]:
        rows = firings.row[firings.indptr[other] : firings.indptr[other + 1]]
        own = np.random.default_rng([seed, 3, other])
        drawn = np.sort(own.permutation(rows)[: sizes.windows_per_other])
        which.append(np.full(len(drawn), other, np.int64))
        centre.append(drawn)
    empty = [np.zeros(0, np.int64)]
    owner = np.concatenate(which or empty)
    return Others(owner, np.isin(owner, near), np.concatenate(centre or empty))
