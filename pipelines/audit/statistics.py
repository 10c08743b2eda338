"""Which latents separate two classes of texts: AUROC of all latents at once, with error control.

Everything here is a function on arrays. `scores` is [n_texts, d_sae], one pooled activation per text and latent;
`labels` says which texts are positive; `groups` says which texts belong together (one source, one template). Groups are
the unit of inference: `exchange` says which labellings are as likely as the observed one, and what z is.

AUROC comes from midranks (ties share their mean rank): 1/2 + sum over positives of (r_i - (n + 1) / 2) / (n_pos n_neg)
(Mann and Whitney 1947; ties count one half). Only latents that fire more on positives are of interest, so every test is
one-sided (large z).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, Int

from pipelines.audit.exchange import Exchange, permuted_labels

BLOCK = 4096  # latents per block: bounds memory at 4096 x n_permutations x 4 bytes, whatever d_sae is
Z_RANGE, Z_BINS_PER_UNIT = 32.0, 256  # resolution of the pooled null's histogram


class Association(NamedTuple):
    """Evidence for every latent on one set of texts; the arrays are [d_sae] unless they say otherwise."""

    auroc: Float[np.ndarray, " d_sae"]
    z: Float[np.ndarray, " d_sae"]
    """Standardised statistic; 0 where nothing can vary (a latent silent on every text)."""
    fires: Float[np.ndarray, " d_sae"]
    """Share of texts with an activation above zero."""
    tested: Bool[np.ndarray, " d_sae"]
    """Fires on enough texts to be tested; chosen without looking at labels."""
    p_familywise: Float[np.ndarray, " d_sae"]
    """Max-T p-value: chance that any latent looks this good under shuffled labels. 1 where untested."""
    p_pooled: Float[np.ndarray, " d_sae"]
    """p-value against the null pooled over all tested latents. 1 where untested."""
    null_max_z: Float[np.ndarray, " n_permutations"]
    """Largest z over tested latents, per shuffled labelling."""
    null_best: Int[np.ndarray, " n_permutations"]
    """The latent that reached it."""


def midranks(values: Float[np.ndarray, "n_latents n_texts"]) -> Float32[np.ndarray, "n_latents n_texts"]:
    """Ranks 1..n along the last axis; ties get the mean of the ranks they span. Exact in float32 up to 2^23 texts."""
    n = values.shape[1]
    order = np.argsort(values, axis=1, kind="stable")
    ordered = np.take_along_axis(values, order, axis=1)
    is_new = np.ones(ordered.shape, dtype=bool)
    np.not_equal(ordered[:, 1:], ordered[:, :-1], out=is_new[:, 1:])
    index = np.arange(n, dtype=np.int32)
    first = np.maximum.accumulate(np.where(is_new, index, 0), axis=1)
    is_last = np.ones(ordered.shape, dtype=bool)
    is_last[:, :-1] = is_new[:, 1:]
    last = np.minimum.accumulate(np.where(is_last, index, n)[:, ::-1], axis=1)[:, ::-1]
    ranks = np.empty(ordered.shape, dtype=np.float32)
    np.put_along_axis(ranks, order, (first + last + 2).astype(np.float32) / 2, axis=1)
    return ranks


def auroc(
    scores: Float[np.ndarray, "n_texts d_sae"], labels: Bool[np.ndarray, " n_texts"]
) -> Float[np.ndarray, " d_sae"]:
    """P(positive scores higher) + P(tie) / 2, for every column. Memory stays flat in d_sae."""
    check_scores(scores, labels, None)
    n_pos = int(labels.sum())
    n_neg = labels.size - n_pos
    columns = (centred_ranks(scores, lo, lo + BLOCK)[:, labels].sum(axis=1) for lo in range(0, scores.shape[1], BLOCK))
    return 0.5 + np.concatenate([c.astype(np.float64) for c in columns]) / (n_pos * n_neg)


def associate(
    scores: Float[np.ndarray, "n_texts d_sae"],
    labels: Bool[np.ndarray, " n_texts"],
    groups: Int[np.ndarray, " n_texts"],
    *,
    n_permutations: int = 1000,
    min_texts: int = 4,
    seed: int = 0,
) -> Association:
    """AUROC, max-T and pooled p-values of every latent, from one matrix product of ranks and shuffled labels.

    Family-wise error: single-step max-T (Westfall and Young 1993, section 2.3), p = (1 + #{max z* >= z}) / (1 + B),
    valid under any dependence between latents. Pooled p: (1 + #{z* >= z}) / (1 + m B) over all m tested latents
    (Storey and Tibshirani 2003), whose resolution does not end at 1 / B; use it with `benjamini_hochberg`.

    Args:
        min_texts: latents that fire on fewer texts are not tested; the choice does not see labels, so tests stay valid.
    Raises:
        ValueError: shapes disagree, one class is missing, or a score is not finite.
    """
    check_scores(scores, labels, groups)
    d_sae = scores.shape[1]
    exchange = Exchange(labels, groups, n_permutations, seed)
    n_pos = int(labels.sum())
    area = np.full(d_sae, 0.5)
    z = np.zeros(d_sae, dtype=np.float32)
    fires = (scores > 0).mean(axis=0)
    tested = fires * labels.size >= max(min_texts, 1) - 1e-9
    null_max = np.full(n_permutations, -np.inf, dtype=np.float32)
    null_best = np.zeros(n_permutations, dtype=np.int64)
    histogram = np.zeros(int(2 * Z_RANGE * Z_BINS_PER_UNIT) + 1, dtype=np.int64)

    for lo in range(0, d_sae, BLOCK):
        hi = min(lo + BLOCK, d_sae)
        centred = centred_ranks(scores, lo, hi)
        area[lo:hi] += centred[:, labels].sum(axis=1, dtype=np.float64) / (n_pos * (labels.size - n_pos))
        of_block = exchange.z(centred).numpy()
        z[lo:hi] = of_block[:, 0]
        null = of_block[tested[lo:hi], 1:]
        if null.size:
            latents = np.flatnonzero(tested[lo:hi]) + lo
            best = null.argmax(axis=0)
            value = null[best, np.arange(n_permutations)]
            better = value > null_max
            null_max[better], null_best[better] = value[better], latents[best[better]]
            histogram += np.bincount(_z_bin(null).ravel(), minlength=histogram.size)

    p_familywise, p_pooled = np.ones(d_sae), np.ones(d_sae)
    if tested.any():
        exceed = n_permutations - np.searchsorted(np.sort(null_max), _just_below(z[tested]), side="left")
        p_familywise[tested] = (1 + exceed) / (1 + n_permutations)
        at_least = histogram[::-1].cumsum()[::-1]
        p_pooled[tested] = np.minimum(1.0, (1 + at_least[_z_bin(_just_below(z[tested]))]) / (1 + at_least[0]))
    return Association(area, z, fires, tested, p_familywise, p_pooled, null_max, null_best)


def permutation_p(
    scores: Float[np.ndarray, "n_texts n_latents"],
    labels: Bool[np.ndarray, " n_texts"],
    groups: Int[np.ndarray, " n_texts"],
    *,
    n_permutations: int = 9999,
    seed: int = 0,
) -> Float[np.ndarray, " n_latents"]:
    """One-sided permutation p-value of each latent by itself: (1 + #{W* >= W}) / (1 + B).

    The added ones keep it valid: Phipson and Smyth 2010, arXiv:1603.05766, section 4.
    """
    check_scores(scores, labels, groups)
    z = Exchange(labels, groups, n_permutations, seed).z(centred_ranks(scores, 0, scores.shape[1])).numpy()
    return (1 + (z[:, 1:] >= _just_below(z[:, :1])).sum(axis=1)) / (1 + n_permutations)  # type: ignore[no-any-return]


def searched_null(
    scores: Float[np.ndarray, "n_texts d_sae"],
    labels: Bool[np.ndarray, " n_texts"],
    groups: Int[np.ndarray, " n_texts"],
    chosen: Int[np.ndarray, " n_permutations"],
    *,
    seed: int,
) -> Float[np.ndarray, " n_permutations"]:
    """AUROC on these texts, under shuffled labels, of the latent that a search under shuffled labels had chosen.

    With `chosen = associate(other_texts, ...).null_best` this repeats the whole discover-then-confirm procedure on data
    in which no latent carries the concept: what the best latent of such a search reaches by luck.
    """
    check_scores(scores, labels, groups)
    drawn = permuted_labels(labels, groups, chosen.size, seed)
    centred = centred_ranks(scores[:, chosen], 0, chosen.size)
    n_pos = drawn.sum(axis=0, dtype=np.float64)
    return 0.5 + (centred * drawn.T).sum(axis=1) / (n_pos * (labels.size - n_pos))  # type: ignore[no-any-return]


def benjamini_hochberg(p: Float[np.ndarray, " m"]) -> Float[np.ndarray, " m"]:
    """Adjusted p-values: reject where <= q to hold the false-discovery rate at q (Benjamini and Hochberg 1995)."""
    order = np.argsort(p, kind="stable")
    stepped = p[order] * p.size / np.arange(1, p.size + 1)
    adjusted = np.empty(p.size)
    adjusted[order] = np.minimum(1.0, np.minimum.accumulate(stepped[::-1])[::-1])
    return adjusted


def holm(p: Float[np.ndarray, " m"]) -> Float[np.ndarray, " m"]:
    """Adjusted p-values: reject where <= alpha to hold the family-wise error at alpha (Holm 1979)."""
    order = np.argsort(p, kind="stable")
    stepped = p[order] * np.arange(p.size, 0, -1)
    adjusted = np.empty(p.size)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(stepped))
    return adjusted


def centred_ranks(
    scores: Float[np.ndarray, "n_texts d_sae"], lo: int, hi: int
) -> Float32[np.ndarray, "n_latents n_texts"]:
    """Midranks of columns lo..hi, as rows, less their mean (n + 1) / 2."""
    block = np.ascontiguousarray(scores[:, lo:hi].T)
    return midranks(block) - np.float32((scores.shape[0] + 1) / 2)


def _just_below(z: Float[np.ndarray, " *shape"]) -> Float[np.ndarray, " *shape"]:
    """Rounding must not separate equal labellings: what is this close counts as at least as large; p errs upwards."""
    return z - np.float32(1e-5) * np.maximum(1, np.abs(z))  # type: ignore[no-any-return]


def _z_bin(z: Float[np.ndarray, " *shape"]) -> Int[np.ndarray, " *shape"]:
    """Bin of the pooled null's histogram; monotone, so equal bins count as 'at least as large' and p errs upwards."""
    scaled = (np.clip(z, -Z_RANGE, Z_RANGE) + np.float32(Z_RANGE)) * np.float32(Z_BINS_PER_UNIT)
    return scaled.astype(np.int32)  # type: ignore[no-any-return]


def check_scores(scores: np.ndarray, labels: np.ndarray, groups: np.ndarray | None) -> None:
    """Refuse arrays that do not fit, one class, and scores that are not finite. Raises: ValueError."""
    if scores.ndim != 2 or labels.shape != scores.shape[:1] or (groups is not None and groups.shape != labels.shape):
        raise ValueError(
            f"scores must be [n_texts, d_sae] with one label and one group per text; got scores {scores.shape}, labels "
            f"{labels.shape}, groups {None if groups is None else groups.shape}. Encode every example exactly once."
        )
    n_pos = int(labels.sum())
    if n_pos in (0, labels.size):
        only = "positive" if n_pos else "negative"
        raise ValueError(
            f"an AUROC needs both classes; all {labels.size} texts are {only}. Add examples of the other class."
        )
    if not np.isfinite(scores).all():
        text, latent = np.argwhere(~np.isfinite(scores))[0]
        raise ValueError(
            f"scores must be finite; text {text}, latent {latent} is {scores[text, latent]}. Check the encoder."
        )
