"""What a design can see: the chance that a latent of a given true AUROC is found, simulated from observed firing rates.

A pooled latent is zero on most texts, so formulas for continuous scores are off both ways: ties make a rare latent's
null narrower, and cap nothing that fires on positives. So latents are drawn as they are, and go through the code that
real ones go through. With f the share of negatives on which an observed latent fires:

    score = max(0, g - c),  g ~ N(0, 1) on negatives, N(d, 1) on positives,  c: P(g > c) = f on negatives,  d: AUROC

Steps of the procedure, all to be passed: rank among the candidates when discovering (z above the quantile that this
many null latents leave for them), first step of Holm when confirming, and for `detects` the lower bound at the level
that falls to the latent in the order of candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import special

from pipelines.audit.exchange import Exchange
from pipelines.audit.intervals import auroc_interval, levels_in_order
from pipelines.audit.statistics import centred_ranks, permutation_p

GRID = (0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.98)
PROMISE = 0.9
"""Power that the effect named in a verdict is found with."""


@dataclass(frozen=True, kw_only=True)
class Design:
    """Independent groups of each class, and how many latents compete."""

    discover: tuple[int, int]
    """Groups of positives and of negatives."""
    confirm: tuple[int, int]
    n_latents: int
    n_candidates: int
    alpha: float = 0.05
    detects_above: float = 0.7


class Power(NamedTuple):
    """Power at each true AUROC of `auroc`."""

    auroc: tuple[float, ...]
    associated: tuple[float, ...]
    """Becomes a candidate and is confirmed."""
    detects: tuple[float, ...]
    """And its lower bound, at its level in the order of candidates, is above `detects_above`."""
    n_simulated: int
    """Latents behind each value."""

    def smallest(self, step: Literal["associated", "detects"] = "associated", power: float = PROMISE) -> float | None:
        """Least true AUROC that is found with this power; None if the grid ends before.

        Simulation errs, so it is read off one standard error below the estimate, rounded up to a hundredth.
        """
        rates = np.array(getattr(self, step))
        safe = np.maximum.accumulate(rates - np.sqrt(rates * (1 - rates) / self.n_simulated))
        if safe[-1] < power:
            return None
        at = int(np.argmax(safe >= power))
        if at == 0:
            return self.auroc[0]
        share = (power - safe[at - 1]) / (safe[at] - safe[at - 1])
        exact = self.auroc[at - 1] + share * (self.auroc[at] - self.auroc[at - 1])
        return float(np.ceil(exact * 100 - 1e-9) / 100)


def simulate_power(
    design: Design,
    fires: Sequence[float] | Float[np.ndarray, " n_latents"],
    *,
    grid: Sequence[float] = GRID,
    n_simulated: int = 400,
    seed: int = 0,
) -> Power:
    """Power of a design over a grid of true AUROCs.

    Args:
        fires: shares of texts on which latents fire, as observed, of those that would be tested; shares below one text
            are taken as one text. Without any, every latent fires on half of the texts.
    Raises:
        ValueError: fewer than two groups of a class in a part.
    """
    if min(*design.discover, *design.confirm) < 2:
        raise ValueError(
            f"power needs two groups of each class in each part or more; got discover {design.discover}, confirm "
            f"{design.confirm}. Add independent texts."
        )
    rng = np.random.default_rng(seed)
    observed = np.asarray(fires, dtype=np.float64)
    observed = np.clip(observed if observed.size else np.array([0.5]), 1 / sum(design.discover), 1.0 - 1e-6)
    negative_rate = rng.choice(observed, n_simulated)
    enter, lead = _thresholds(design, rng.choice(observed, 4000), rng)
    labels, groups = _labels(design.confirm)
    first = design.alpha / design.n_candidates  # of Holm
    n_permutations = round(max(1000, 4 / first))
    associated, detects = [], []
    for truth in grid:
        shift = shift_for(truth, negative_rate)
        z = _z(draw_scores(design.discover, negative_rate, shift, rng), design.discover)
        held_out = draw_scores(design.confirm, negative_rate, shift, rng)
        p = permutation_p(held_out, labels, groups, n_permutations=n_permutations, seed=seed)
        found = (z >= enter) & (p <= first)
        level = np.where(z >= lead, *levels_in_order(design.alpha, max(2, design.n_candidates))[:2])
        seen = np.zeros_like(found)
        for value in np.unique(level):
            low = auroc_interval(held_out, labels, groups, level=1 - 2 * value).low
            seen |= (level == value) & (low > design.detects_above)
        associated.append(float(found.mean()))
        detects.append(float((found & seen).mean()))
    return Power(tuple(grid), tuple(associated), tuple(detects), n_simulated)


def shift_for(auroc: float, negative_rate: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """The shift d of positives that gives latents with these firing rates on negatives this AUROC, by bisection."""
    low, high = np.full_like(negative_rate, -10.0), np.full_like(negative_rate, 14.0)
    for _ in range(40):
        middle = (low + high) / 2
        below = true_auroc(middle, negative_rate) < auroc
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return (low + high) / 2  # type: ignore[no-any-return]


def true_auroc(shift: Float[np.ndarray, " n"], negative_rate: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """AUROC of max(0, g - c), ties one half: over firing negatives by quadrature, over silent ones in closed form."""
    nodes, weights = np.polynomial.legendre.leggauss(24)
    above = -special.ndtri((nodes[:, None] + 1) / 2 * negative_rate)
    firing = negative_rate * (weights[:, None] / 2 * special.ndtr(shift - above)).sum(axis=0)
    speaks = special.ndtr(shift + special.ndtri(negative_rate))
    return firing + (1 - negative_rate) * (speaks + (1 - speaks) / 2)  # type: ignore[no-any-return]


def draw_scores(
    counts: tuple[int, int],
    negative_rate: Float[np.ndarray, " n_latents"],
    shift: Float[np.ndarray, " n_latents"],
    rng: np.random.Generator,
) -> Float[np.ndarray, "n_texts n_latents"]:
    """Scores of independent texts, positives first."""
    g = rng.standard_normal((sum(counts), negative_rate.size))
    g[: counts[0]] += shift
    return np.maximum(g + special.ndtri(negative_rate), 0)  # type: ignore[no-any-return]


def _thresholds(design: Design, rates: Float[np.ndarray, " n"], rng: np.random.Generator) -> tuple[float, float]:
    """z that makes a latent a candidate, and z that makes it the first of them, among null latents."""
    null = _z(draw_scores(design.discover, rates, np.zeros(rates.size), rng), design.discover)
    shares = (design.n_candidates / design.n_latents, 0.5 / design.n_latents)
    enter, lead = (max(0.0, float(np.quantile(null, max(0.0, 1 - share)))) for share in shares)
    return enter, lead


def _z(scores: Float[np.ndarray, "n_texts n_latents"], counts: tuple[int, int]) -> Float[np.ndarray, " n_latents"]:
    labels, groups = _labels(counts)
    return Exchange(labels, groups, 0, 0).z(centred_ranks(scores, 0, scores.shape[1])).numpy()[:, 0]


def _labels(counts: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    n = sum(counts)
    return np.arange(n) < counts[0], np.arange(n)
