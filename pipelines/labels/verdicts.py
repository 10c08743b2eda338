"""How a label did: a judge's answers to the questions of a test set, per latent and kind of negative.

For positives P and the negatives N of one kind, with documents as clusters,

    TPR = yes / P      FPR = yes / N      balanced accuracy = (TPR + 1 - FPR) / 2      AUROC from the scores

A question without an answer counts as answered wrongly. The interval of a rate is Wilson's at the effective sample
size of its documents, and rates combine by squaring and adding (see `scores.clustered_rate`). The p-value tests that
the label says yes equally often to positives and negatives, with a score test that is robust to clusters:

    u_d = (s_d - p t_d) / P - (f_d - p n_d) / N     z = (TPR - FPR) / sqrt(G / (G - 1) * sum_d u_d^2)

where document d holds t_d positives, n_d negatives, s_d and f_d of them answered yes, p is the pooled rate of yes and
G counts the documents; one-sided, t distribution with G - 1 degrees of freedom. Reference: Rao and Scott 1992,
Biometrics 48, 577-585 (ratio estimates from clustered binary data); variance under the null as in a score test.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from pipelines.labels.scores import FloatArray, wilson_interval
from pipelines.labels.testset import N_DECILES, NEGATIVES, Exam


class Rate(NamedTuple):
    """A share with its 95 % interval per latent; NaN without trials."""

    rate: FloatArray
    low: FloatArray
    high: FloatArray


class KindScores(NamedTuple):
    """Detection against one kind of negative, an entry per latent; NaN where there are no positives or no negatives."""

    balanced_accuracy: FloatArray
    low: FloatArray
    high: FloatArray
    fpr: FloatArray
    auroc: FloatArray
    p: FloatArray
    n: NDArray[np.int64]
    """Negatives asked about."""
    n_documents: NDArray[np.int64]
    """Documents that these negatives come from."""


class LabelScores(NamedTuple):
    """Detection of a set of latents by their labels, an entry per latent."""

    tpr: Rate
    tpr_by_decile: FloatArray
    """`[n_latents, 10]`, weakest tenth of firings first; NaN where it has no firing."""
    by_kind: dict[str, KindScores]
    precision: Rate
    """At the natural rate: TPR * density / (TPR * density + FPR on random negatives * (1 - density))."""
    n_positive: NDArray[np.int64]
    n_failed: NDArray[np.int64]
    """Questions without an answer."""


def score_verdicts(
    test: Exam, verdict: NDArray[np.float32], latents: NDArray[np.int64], density: FloatArray
) -> LabelScores:
    """Score the answers to `test`.

    Args:
        verdict: of each question, as `testset.Judge` gives it.
        latents: whose scores to return, ascending; those without questions get NaN.
        density: held-out share of tokens on which each of them fires.

    Raises:
        ValueError: another number of verdicts than questions.
    """
    if len(verdict) != len(test.row):
        raise ValueError(
            f"A judge must answer every question, NaN where it cannot: {len(test.row)} questions, {len(verdict)} "
            "verdicts. Keep failed questions in place."
        )
    n = len(latents)
    who = np.searchsorted(latents, test.latent)
    failed, positive = np.isnan(verdict), test.kind == 0
    yes = np.where(failed, ~positive, verdict >= 0.5)
    score = np.where(failed, np.where(positive, -np.inf, np.inf), verdict)

    hit = _clusters(who[positive], test.document[positive], yes[positive])
    tpr = _rate(hit, n)
    cell = who[positive] * N_DECILES + test.decile[positive]
    by_decile = _divide(
        np.bincount(cell, weights=yes[positive], minlength=n * N_DECILES), np.bincount(cell, minlength=n * N_DECILES)
    ).reshape(n, N_DECILES)
    by_kind = {}
    fpr_random = None
    for kind, name in enumerate(NEGATIVES, start=1):
        negative = test.kind == kind
        false = _clusters(who[negative], test.document[negative], yes[negative])
        fpr = _rate(false, n)
        fpr_random = fpr_random or fpr
        accuracy = (tpr.rate + 1 - fpr.rate) / 2
        by_kind[name] = KindScores(
            accuracy,
            accuracy - np.hypot(tpr.rate - tpr.low, fpr.high - fpr.rate) / 2,
            accuracy + np.hypot(tpr.high - tpr.rate, fpr.rate - fpr.low) / 2,
            fpr.rate,
            paired_auroc(who[positive], score[positive], who[negative], score[negative], n),
            _p_value(hit, false, n),
            np.bincount(who[negative], minlength=n),
            np.bincount(false.who, minlength=n),
        )
    assert fpr_random is not None
    return LabelScores(
        tpr,
        by_decile,
        by_kind,
        _natural_precision(tpr, fpr_random, density),
        np.bincount(who[positive], minlength=n),
        np.bincount(who[failed], minlength=n),
    )


FDR = 0.05
DECISIVE = ("same_token", "same_document")
"""Negatives against which a label must hold to survive."""


def decisive_p(scores: LabelScores) -> FloatArray:
    """The larger p-value against the decisive negatives; NaN with none of either kind."""
    stacked = np.stack([scores.by_kind[kind].p for kind in DECISIVE])
    largest = np.where(np.isnan(stacked), -np.inf, stacked).max(0)
    return np.asarray(np.where(np.isinf(largest), np.nan, largest), np.float64)


def surviving(
    scores: LabelScores, p: FloatArray, rank: NDArray[np.integer[Any]], min_detection: float
) -> NDArray[np.bool_]:
    """Labels that pass: better than chance (Benjamini and Hochberg 1995 over the latents), with a lower bound of the
    balanced accuracy above `min_detection` against every decisive kind of negative that the latent has, and first under
    its own label.

    Args:
        p: `decisive_p(scores)`; a latent that could not be tested (NaN) is no test and does not count among them.
        rank: of the true latent among random others, 1 is best.
    """
    known = ~np.isnan(p)
    significant = np.zeros(len(p), bool)
    if known.any():
        significant[known] = stats.false_discovery_control(p[known]) <= FDR
    for kind in DECISIVE:
        low = scores.by_kind[kind].low
        significant &= np.isnan(low) | (low > min_detection)
    return np.asarray(significant & (rank == 1), bool)


def paired_auroc(
    who_positive: NDArray[np.int64],
    score_positive: NDArray[np.floating],
    who_negative: NDArray[np.int64],
    score_negative: NDArray[np.floating],
    n: int,
) -> FloatArray:
    """P(a positive scores above a negative of the same latent) + 1/2 P(equal); NaN with only one class.

    Reference: Mann and Whitney 1947.
    """
    who = np.concatenate([who_positive, who_negative])
    score = np.concatenate([score_positive, score_negative])
    is_positive = np.arange(len(who)) < len(who_positive)
    by = np.lexsort((score, who))
    who, score, is_positive = who[by], score[by], is_positive[by]
    new = np.ones(len(who), bool)
    new[1:] = (who[1:] != who[:-1]) | (score[1:] != score[:-1])
    group = np.cumsum(new) - 1
    owner = who[new]
    n_positive = np.bincount(group, weights=is_positive, minlength=len(owner))
    n_negative = np.bincount(group, minlength=len(owner)) - n_positive
    begins = np.searchsorted(owner, owner)
    total = np.concatenate([np.zeros(1), np.cumsum(n_negative)])
    below = total[:-1] - total[begins]
    wins = np.bincount(owner, weights=n_positive * (below + n_negative / 2), minlength=n)
    return _divide(
        wins,
        np.bincount(owner, weights=n_positive, minlength=n) * np.bincount(owner, weights=n_negative, minlength=n),
    )


class _Clusters(NamedTuple):
    """Yes answers and questions of each (latent, document) that has questions, ordered by both."""

    who: NDArray[np.int64]
    document: NDArray[np.int64]
    yes: FloatArray
    asked: FloatArray


def _clusters(who: NDArray[np.int64], document: NDArray[np.int32], yes: NDArray[np.bool_]) -> _Clusters:
    width = int(document.max(initial=0)) + 1
    key, index = np.unique(who * width + document, return_inverse=True)
    index = index.reshape(-1)
    return _Clusters(
        key // width,
        key % width,
        np.bincount(index, weights=yes, minlength=len(key)).astype(np.float64),
        np.bincount(index, minlength=len(key)).astype(np.float64),
    )


def _rate(c: _Clusters, n: int, confidence: float = 0.95) -> Rate:
    """`scores.clustered_rate` from the clusters that have trials."""
    asked, yes, n_clusters = _sum(c.who, c.asked, n), _sum(c.who, c.yes, n), np.bincount(c.who, minlength=n)
    rate = _divide(yes, asked)
    residual = c.yes - rate[c.who] * c.asked
    inflation: FloatArray = n_clusters / np.maximum(n_clusters - 1, 1)
    variance = inflation * _sum(c.who, residual**2, n) / np.maximum(asked, 1) ** 2
    spread = np.nan_to_num(rate * (1 - rate))
    effective = np.divide(spread, variance, out=n_clusters.astype(np.float64), where=variance > 0)
    effective = np.clip(effective, 1.0, np.maximum(asked, 1.0))
    quantile = stats.t.ppf(0.5 + confidence / 2, np.maximum(n_clusters - 1, 1))
    low, high = wilson_interval(rate, effective, quantile)
    known, alone = n_clusters > 1, n_clusters == 1
    return Rate(
        rate,
        np.where(known, low, np.where(alone, 0.0, np.nan)),
        np.where(known, high, np.where(alone, 1.0, np.nan)),
    )


def _p_value(hit: _Clusters, false: _Clusters, n: int) -> FloatArray:
    """One-sided p-value of TPR > FPR (module docstring); 1 with fewer than two documents, NaN without both classes."""
    n_positive, n_negative = _sum(hit.who, hit.asked, n), _sum(false.who, false.asked, n)
    n_yes = _sum(hit.who, hit.yes, n) + _sum(false.who, false.yes, n)
    pooled = _divide(n_yes, n_positive + n_negative)
    difference = _divide(_sum(hit.who, hit.yes, n), n_positive) - _divide(_sum(false.who, false.yes, n), n_negative)
    both = np.where((n_positive > 0) & (n_negative > 0), 1.0, np.nan)
    u_hit = (hit.yes - pooled[hit.who] * hit.asked) / n_positive[hit.who]
    u_false = -(false.yes - pooled[false.who] * false.asked) / n_negative[false.who]
    who, document = np.concatenate([hit.who, false.who]), np.concatenate([hit.document, false.document])
    width = int(document.max(initial=0)) + 1
    key, index = np.unique(who * width + document, return_inverse=True)
    u = _sum(index.reshape(-1), np.concatenate([u_hit, u_false]), len(key))
    owner = key // width
    n_clusters = np.bincount(owner, minlength=n)
    inflation: FloatArray = n_clusters / np.maximum(n_clusters - 1, 1)
    variance = inflation * _sum(owner, np.square(u), n)
    z = np.divide(difference, np.sqrt(variance), out=np.zeros(n), where=variance > 0)
    p = np.where(n_clusters > 1, stats.t.sf(z, np.maximum(n_clusters - 1, 1)), 1.0)
    return np.asarray(p * both, np.float64)


def _natural_precision(tpr: Rate, fpr: Rate, density: FloatArray) -> Rate:
    def precision(t: FloatArray, f: FloatArray) -> FloatArray:
        return _divide(t * density, t * density + f * (1 - density))

    return Rate(precision(tpr.rate, fpr.rate), precision(tpr.low, fpr.high), precision(tpr.high, fpr.low))


def _sum(index: NDArray[np.int64], weight: FloatArray, n: int) -> FloatArray:
    return np.bincount(index, weights=weight, minlength=n).astype(np.float64)


def _divide(top: FloatArray | NDArray[np.int64], bottom: FloatArray | NDArray[np.int64]) -> FloatArray:
    out = np.full(np.shape(bottom), np.nan)
    return np.asarray(np.divide(top, bottom, out=out, where=np.asarray(bottom) > 0), np.float64)
