"""Does the label hold on documents it never saw? Detection per latent; documents, not tokens, count as independent.

A label predicts each held-out token as firing or silent. Over the tokens of one latent

    TPR = predicted firing / firing      FPR = predicted firing / silent      balanced accuracy = (TPR + 1 - FPR) / 2

0.5 is what a label that knows nothing gets. A latent that never fires on held-out documents has no score (NaN) and
counts as unlabelled. Everything here is a function on arrays; `n` below is the number of latents, `d` the number of
held-out documents.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

FloatArray = NDArray[np.float64]


class Detection(NamedTuple):
    """Held-out detection, one entry per latent; NaN where undefined."""

    balanced_accuracy: FloatArray
    low: FloatArray
    high: FloatArray
    tpr: FloatArray
    fpr: FloatArray
    precision: FloatArray
    """Share of predicted tokens on which the latent fires, at the natural rate."""
    n_firing: NDArray[np.int64]


def detection(
    hits: NDArray[np.int64],
    firing: NDArray[np.int64],
    predicted: NDArray[np.int64],
    tokens: NDArray[np.int64],
    *,
    confidence: float = 0.95,
) -> Detection:
    """Detection from counts per document, with a document-clustered interval of the balanced accuracy.

    Each rate is a ratio of sums over documents. Its variance is the linearised one between clusters (Cochran 1977,
    Sampling Techniques, chapter 6); the interval of a rate is Wilson's at the effective sample size that gives this
    variance, with a t quantile for the documents that carry it (Korn and Graubard 1998, Survey Methodology 24, 193-201;
    there with the Clopper-Pearson interval). The two combine by squaring and adding (Newcombe 1998, Statistics in
    Medicine 17, 873-890, method 10), which takes TPR and FPR as independent.

    Args:
        hits: `[n, d]` firing tokens that the label predicts.
        firing: `[n, d]` firing tokens.
        predicted: `[n, d]` tokens that the label predicts.
        tokens: `[d]` usable tokens of each document.
    """
    silent = tokens[None] - firing
    false = predicted - hits
    tpr, tpr_low, tpr_high = clustered_rate(hits, firing, confidence)
    fpr, fpr_low, fpr_high = clustered_rate(false, silent, confidence)
    accuracy = (tpr + 1 - fpr) / 2
    low = accuracy - np.hypot(tpr - tpr_low, fpr_high - fpr) / 2
    high = accuracy + np.hypot(tpr_high - tpr, fpr - fpr_low) / 2
    precision = _ratio(hits.sum(1), predicted.sum(1))
    return Detection(accuracy, low, high, tpr, fpr, precision, firing.sum(1))


def clustered_rate(
    successes: NDArray[np.int64], trials: NDArray[np.int64], confidence: float
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Rate of successes with its interval; rows are rates, columns are clusters. NaN without trials.

    With no variation between clusters (a rate of 0 or 1, say) each cluster counts as one observation; with one
    cluster the interval is [0, 1].
    """
    n_trials = trials.sum(1).astype(np.float64)
    n_clusters = (trials > 0).sum(1)
    rate = _ratio(successes.sum(1), n_trials)
    residual = successes - np.nan_to_num(rate)[:, None] * trials
    enough = n_clusters > 1
    inflation = n_clusters / np.maximum(n_clusters - 1, 1)
    variance = inflation * np.einsum("nd,nd->n", residual, residual) / np.maximum(n_trials, 1) ** 2
    spread = np.nan_to_num(rate * (1 - rate))
    effective = np.divide(spread, variance, out=n_clusters.astype(np.float64), where=variance > 0)
    effective = np.clip(effective, 1.0, np.maximum(n_trials, 1.0))
    quantile = stats.t.ppf(0.5 + confidence / 2, np.maximum(n_clusters - 1, 1))
    low, high = wilson_interval(rate, effective, quantile)
    lowest, highest = np.where(n_clusters == 1, 0.0, np.nan), np.where(n_clusters == 1, 1.0, np.nan)
    return rate, np.where(enough, low, lowest), np.where(enough, high, highest)


def wilson_interval(rate: FloatArray, n: FloatArray, quantile: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Score interval of a proportion over `n` (not necessarily whole) trials. Wilson 1927, JASA 22, 209-212."""
    z2 = quantile**2
    centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = quantile / (1 + z2 / n) * np.sqrt(rate * (1 - rate) / n + z2 / (4 * n**2))
    return np.clip(centre - half, 0.0, 1.0), np.clip(centre + half, 0.0, 1.0)


def mismatch_p(own: FloatArray, null: NDArray[np.float32]) -> FloatArray:
    """How common a fit this good is among other latents: (1 + #{null >= own}) / (1 + #null).

    Phipson and Smyth 2010, Statistical Applications in Genetics and Molecular Biology 9, article 39. NaN scores of
    other latents are left out; 1 where the own score is undefined, since a label that cannot be tested has not
    passed.
    """
    valid = ~np.isnan(null)
    beaten = (valid & (null >= own[:, None].astype(np.float32))).sum(1)
    return np.asarray(np.where(np.isnan(own), 1.0, (1 + beaten) / (1 + valid.sum(1))), np.float64)


def _ratio(numerator: NDArray[np.int64] | FloatArray, denominator: NDArray[np.int64] | FloatArray) -> FloatArray:
    bottom = denominator.astype(np.float64)
    top, undefined = numerator.astype(np.float64), np.full(bottom.shape, np.nan)
    return np.asarray(np.divide(top, bottom, out=undefined, where=bottom > 0), np.float64)
