"""Bootstrap confidence intervals: documents are drawn with replacement, not tokens, which their document ties together.

Every figure is a function of sums over documents, so a resample is a row of counts and all resamples are one matrix
product. The intervals are percentile intervals (Efron and Tibshirani 1993, section 13.3).
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

MAX_UNITS = 2048
"""Documents beyond this many share units, by number: it bounds memory, and the variance of sums stays the same."""
LEVEL = 0.95
Z = 1.959964
"""Standard normal quantile of that level."""


def unit_of(document: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """The unit of resampling that each document belongs to."""
    return document.long() % MAX_UNITS


@dataclass(frozen=True)
class Resampling:
    """Resamples of the units that hold anything.

    Args:
        occupied: units that take part, of all.
    """

    occupied: Bool[Tensor, " n_units"]
    n_resamples: int
    seed: int = 0

    @cached_property
    def weights(self) -> Float[Tensor, "n_resamples n_units"]:
        """How often each unit is in each resample."""
        index = np.flatnonzero(self.occupied.cpu().numpy())
        weights = np.zeros((self.n_resamples, len(self.occupied)))
        if len(index):
            rng = np.random.default_rng(self.seed)
            weights[:, index] = rng.multinomial(len(index), np.full(len(index), 1 / len(index)), size=self.n_resamples)
        return torch.from_numpy(weights)

    @property
    def n_units(self) -> int:
        """Units that take part."""
        return int(self.occupied.sum())

    def interval(self, values: Float[Tensor, " n_resamples"]) -> tuple[float, float] | None:
        """Percentile interval of a figure's values over the resamples; see `interval`."""
        return interval(values) if self.n_units > 1 else None


def interval(values: Float[Tensor, " n_resamples"] | np.ndarray) -> tuple[float, float] | None:
    """The middle 95 % of the values; None if a twentieth of them or more could not be computed."""
    array = np.asarray(values, dtype=np.float64)
    finite = array[np.isfinite(array)]
    if len(finite) < LEVEL * len(array) or not len(finite):
        return None
    low, high = np.quantile(finite, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def mean_interval(values: Float[Tensor, " n"], n_resamples: int, seed: int = 0) -> tuple[float, float] | None:
    """Interval of a mean over items that are drawn with replacement themselves, such as latents."""
    if len(values) < 2:
        return None
    every = Resampling(torch.ones(len(values), dtype=torch.bool), n_resamples, seed)
    rows = every.weights if len(values) <= MAX_UNITS else None
    if rows is not None:
        return interval(rows @ values.double().cpu() / len(values))
    # Many items: their mean over resamples is as good as normal, and a matrix of weights would be large.
    mean, error = float(values.double().mean()), float(values.double().std(correction=1)) / len(values) ** 0.5
    low, high = mean - Z * error, mean + Z * error
    return max(low, float(values.min())), min(high, float(values.max()))


def weighted_aurocs(
    scores: Float[np.ndarray, " n"], labels: Bool[np.ndarray, " n"], weights: Float[np.ndarray, "n_resamples n"]
) -> Float[np.ndarray, " n_resamples"]:
    """AUROC of the rows under each resample's counts, ties one half; NaN where a resample lacks a class.

    The share of (positive, negative) pairs in which the positive scores higher, every row as often as it was drawn.
    """
    order = np.argsort(scores, kind="stable")
    ordered, positive = scores[order], labels[order]
    drawn = weights[:, order]
    negative = np.where(positive, 0.0, drawn)
    below = np.cumsum(negative, axis=1)
    first = np.searchsorted(ordered, ordered, side="left")
    last = np.searchsorted(ordered, ordered, side="right")
    padded = np.concatenate([np.zeros((len(drawn), 1)), below], axis=1)
    beaten = (padded[:, first] + padded[:, last]) / 2
    won = (np.where(positive, drawn, 0.0) * beaten).sum(axis=1)
    pairs = np.where(positive, drawn, 0.0).sum(axis=1) * negative.sum(axis=1)
    return np.divide(won, pairs, out=np.full(len(drawn), np.nan), where=pairs > 0)  # type: ignore[no-any-return]
