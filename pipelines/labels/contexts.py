"""Where to look: each latent's strongest contexts and a sample of every strength below, from train documents.

    top        the strongest firings, at most one per document
    quantile   one firing drawn from each of n_quantiles * n_per_quantile equal ranks of strength (weakest first)

and, from held-out documents, where a label is wrong:

    miss         the strongest firings on which it does not hold
    false alarm  silent tokens on which it holds

A window is the tokens around the firing that belong to the same document piece of the same context.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.labels.draws import integers_below
from pipelines.labels.families import Family, TokenTable
from pipelines.labels.firings import Firings

KINDS = ("top", "quantile", "miss", "false alarm")
MISS, FALSE_ALARM = 2, 3
_DEPTH_PER_TOP = 32
"""How many of a latent's strongest firings are searched for one document each, as a multiple of n_top."""


class Examples(NamedTuple):
    """Selected firings of a block, ordered by latent, kind, rank."""

    latent: NDArray[np.int64]
    kind: NDArray[np.int8]
    """Index into `KINDS`."""
    rank: NDArray[np.int16]
    """0 = strongest for `top`; 0 = weakest rank bin for `quantile`."""
    row: NDArray[np.int64]
    value: NDArray[np.float32]


class Windows(NamedTuple):
    """Tokens around each example: `[n_examples, 2 * window + 1]`, the example in the middle column."""

    row: NDArray[np.int64]
    inside: NDArray[np.bool_]
    """False where the column lies outside the example's document piece."""
    value: NDArray[np.float32]
    """The latent's activation at each token, 0 where silent."""


def order_by_strength(firings: Firings) -> NDArray[np.int64]:
    """Indices that sort firings by latent, then strongest first, ties by row.

    Raises:
        ValueError: a firing that is not positive and finite.
    """
    wrong = np.flatnonzero(~(np.isfinite(firings.value) & (firings.value > 0)))
    if len(wrong):
        first = int(wrong[0])
        latent, row, value = firings.latent[first], firings.row[first], firings.value[first]
        raise ValueError(
            "A latent's activation must be positive and finite where it fires; "
            f"the block's latent {latent} has {value} at token row {row}. Encode the store again."
        )
    # Positive floats sort like their bit patterns, so one 64-bit key holds (latent, descending value).
    descending = np.uint64(0xFFFFFFFF) - firings.value.view(np.uint32).astype(np.uint64)
    return np.argsort((firings.latent.astype(np.uint64) << np.uint64(32)) | descending, kind="stable")


def select_examples(
    firings: Firings,
    order: NDArray[np.int64],
    document: NDArray[np.int32],
    seed: int,
    *,
    first_latent: int = 0,
    n_top: int,
    n_quantiles: int,
    n_per_quantile: int,
) -> Examples:
    """Top and quantile examples of every latent of the block.

    Args:
        firings: train firings on usable tokens.
        order: `order_by_strength(firings)`.
        document: document of each token row.
        first_latent: number of the block's first latent: what is drawn depends on the latent, not on its block.

    Returns:
        For a latent with fewer firings or documents than asked for, as many examples as there are; never one firing
        twice.
    """
    top = _strongest_per_document(firings, order, document, n_top)
    sampled = _one_per_stratum(firings, order, seed, first_latent, n_quantiles * n_per_quantile)
    fresh = ~np.isin(sampled[0], top[0])
    sampled = (sampled[0][fresh], sampled[1][fresh])

    chosen = np.concatenate([top[0], sampled[0]])
    rank = np.concatenate([top[1], sampled[1]])
    kind = np.repeat(np.array([0, 1], np.int8), [len(top[0]), len(sampled[0])])
    latent = firings.latent[chosen]
    by = np.lexsort((rank, kind, latent))
    return Examples(latent[by], kind[by], rank[by].astype(np.int16), firings.row[chosen][by], firings.value[chosen][by])


def _strongest_per_document(
    firings: Firings, order: NDArray[np.int64], document: NDArray[np.int32], n_top: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    latent = firings.latent  # sorted by latent already, so order[k] is of latent[k]
    depth = np.arange(len(order)) - firings.indptr[latent]
    searched = np.flatnonzero(depth < n_top * _DEPTH_PER_TOP)
    candidate, owner = order[searched], latent[searched]
    key = owner * (int(document.max(initial=0)) + 1) + document[firings.row[candidate]]
    first = np.sort(np.unique(key, return_index=True)[1])
    owner = owner[first]
    begins = np.searchsorted(owner, np.arange(firings.n_latents))
    rank = np.arange(len(owner)) - begins[owner]
    return candidate[first][rank < n_top], rank[rank < n_top]


def _one_per_stratum(
    firings: Firings, order: NDArray[np.int64], seed: int, first_latent: int, n_strata: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    edges = firings.n_firings[:, None] * np.arange(n_strata + 1)[None] // n_strata
    size = np.diff(edges, axis=1)
    latent = np.arange(first_latent, first_latent + firings.n_latents)
    draw = edges[:, :-1] + integers_below(size, seed, 20, latent[:, None], np.arange(n_strata)[None])
    from_weakest = firings.indptr[1:, None] - 1 - draw
    stratum = np.broadcast_to(np.arange(n_strata)[None], size.shape)
    return order[from_weakest[size > 0]], stratum[size > 0]


def cut_windows(examples: Examples, firings: Firings, table: TokenTable, window: int) -> Windows:
    """Tokens within `window` of each example, with the latent's activation at each.

    Args:
        firings: every firing of the block (sinks included), so that the values shown are the real ones.
    """
    offset = np.arange(-window, window + 1)
    row = np.clip(examples.row[:, None] + offset[None], 0, table.n_tokens - 1)
    same_context = row // table.context_length == (examples.row // table.context_length)[:, None]
    same_piece = (table.position[row] - table.position[examples.row][:, None]) == offset[None]
    inside = same_context & same_piece & (table.document[row] == table.document[examples.row][:, None])

    held = firings.latent * table.n_tokens + firings.row  # ascending: latents in order, rows ascending within each
    wanted = examples.latent[:, None] * table.n_tokens + row
    value = np.zeros(row.shape, np.float32)
    if len(held):
        at = np.minimum(np.searchsorted(held, wanted), len(held) - 1)
        value = np.where((held[at] == wanted) & inside, firings.value[at], np.float32(0))
    return Windows(row, inside, value)


def top_tokens_of(firings: Firings, family: Family, n_shown: int) -> list[list[str]]:
    """Spellings of the token forms with most activation mass, for each latent of the block."""
    width = len(family.names)
    key, index = np.unique(firings.latent * width + family.code[firings.row], return_inverse=True)
    mass = np.bincount(index.reshape(-1), weights=firings.value, minlength=len(key))
    owner, code = key // width, key % width
    by = np.lexsort((code, -mass, owner))
    begins = np.searchsorted(owner[by], np.arange(firings.n_latents))
    shown = np.flatnonzero(np.arange(len(by)) - begins[owner[by]] < n_shown)
    words: list[list[str]] = [[] for _ in range(firings.n_latents)]
    for latent, category in zip(owner[by][shown].tolist(), code[by][shown].tolist(), strict=True):
        words[latent].append(family.names[category])
    return words
