"""Sets of latents where one is not enough: logistic probes on the best k, and a set that covers the positives."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from pipelines.audit.baselines import logistic

SIZES = (1, 5, 20)
RECALL, FALSE_POSITIVES = 0.9, 0.01


class Probe(NamedTuple):
    """A logistic probe on a few latents, each in units of its largest score on the fitting texts."""

    columns: Int[np.ndarray, " k"]
    weights: Float[np.ndarray, " k"]
    """Of raw scores."""
    scores: Float[np.ndarray, " n_texts"]


def sparse_probe(
    scores: Float[np.ndarray, "n_texts k"],
    columns: Int[np.ndarray, " k"],
    positive: Bool[np.ndarray, " n_texts"],
    fit: Int[np.ndarray, " n_fit"],
) -> Probe:
    """Fit on some rows, score all of them (Gurnee et al. 2023, arXiv:2305.01610, probe k latents so)."""
    chosen = scores[:, columns].astype(np.float64)
    largest = np.maximum(chosen[fit].max(axis=0, initial=0.0), 1e-12)
    weights, _ = logistic(chosen[fit] / largest, positive[fit])
    return Probe(columns, weights / largest, chosen @ (weights / largest))


class CoverSet(NamedTuple):
    """Latents and their thresholds; a text is seen if any of them exceeds its own."""

    places: list[int]
    """Positions among the columns that were given, in the order in which they were added."""
    thresholds: list[float]

    def sees(self, scores: Float[np.ndarray, "n_texts n_latents"]) -> Bool[np.ndarray, " n_texts"]:
        """Whether each text is seen."""
        if not self.places:
            return np.zeros(len(scores), dtype=bool)
        return np.asarray((scores[:, self.places] > np.array(self.thresholds)).any(axis=1))


def greedy_cover(
    scores: Float[np.ndarray, "n_texts n_latents"],
    positive: Bool[np.ndarray, " n_texts"],
    tune: Int[np.ndarray, " n_tune"],
    fit: Int[np.ndarray, " n_fit"],
) -> CoverSet:
    """Add the latent that sees most unseen positives of `tune`, until `RECALL` is reached or none sees another.

    A latent's threshold is the least that leaves a share `FALSE_POSITIVES` of the negatives of `fit` above it, and
    together the set stays within that share. Columns come best first; of equal gains the earlier wins.
    """
    negatives = fit[~positive[fit]]
    allowed = math.floor(FALSE_POSITIVES * negatives.size)
    thresholds = np.sort(scores[negatives], axis=0)[::-1][allowed]
    sees = scores > np.maximum(thresholds, 0)
    unseen = positive & np.isin(np.arange(len(scores)), tune)
    false = np.zeros(len(scores), dtype=bool)
    n_positives, places = int(unseen.sum()), []
    while scores.shape[1] and unseen.sum() > (1 - RECALL) * n_positives:
        gain = sees[unseen].sum(axis=0)
        alarms = (sees[negatives] | false[negatives, None]).sum(axis=0)
        gain[alarms > allowed] = 0
        best = int(gain.argmax())
        if not gain[best]:
            break
        places.append(best)
        unseen &= ~sees[:, best]
        false |= sees[:, best]
    return CoverSet(places, [float(np.maximum(thresholds[p], 0)) for p in places])


def rates(seen: Bool[np.ndarray, " n"], positive: Bool[np.ndarray, " n"]) -> tuple[float, float]:
    """Recall and false-positive rate."""
    return float(seen[positive].mean()), float(seen[~positive].mean())


def first_columns(columns: Sequence[int] | Int[np.ndarray, " n"], k: int) -> Int[np.ndarray, " k"]:
    """The first k of the ranked columns, or all."""
    return np.asarray(columns, dtype=np.int64)[:k]
