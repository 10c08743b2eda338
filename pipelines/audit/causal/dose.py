"""Dose and response: does the effect grow with the dose, and is there a dose that works before the model breaks?"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

MAX_KL = 0.1
"""Nat a token on neutral prompts, the side-effect budget of Arditi et al. 2024 (arXiv:2406.11717)."""
MAX_CE_GROWTH = 0.02
"""Relative growth of the corpus cross-entropy."""


class Trend(NamedTuple):
    """Page's test for ordered alternatives over prompts (Page 1963, JASA 58)."""

    statistic: float
    """L, as a share of the way from its null mean (0) to its maximum (1); negative for a falling response."""
    p: float
    """Two-sided, by permuting doses within each prompt."""


class Window(NamedTuple):
    """The dose with the largest effect among those whose side effects stay in the budget."""

    dose: float | None
    """None: no dose with an effect beyond the controls stays within the budget."""
    effect: float | None


def trend_test(effects: Float[np.ndarray, "n_prompts n_doses"], *, n_permutations: int = 9999, seed: int = 0) -> Trend:
    """Whether the effect of a prompt rises (or falls) with the dose, doses in ascending order.

    L = Σ_j j · R_j with R_j the summed within-prompt midranks of dose j. Under the null all orders of one prompt's
    effects are equally likely.

    Raises:
        ValueError: fewer than two doses, or effects that are not finite.
    """
    n_prompts, n_doses = effects.shape
    if n_doses < 2 or n_prompts < 1:
        raise ValueError(f"A trend needs two doses or more and a prompt, got effects {effects.shape}.")
    if not np.isfinite(effects).all():
        raise ValueError("A trend needs finite effects. Drop the dose that overflows.")
    from scipy.stats import rankdata

    ranks = rankdata(effects, axis=1)
    weights = np.arange(1, n_doses + 1) - (n_doses + 1) / 2
    observed = float((ranks @ weights).sum())
    most = n_prompts * float((np.arange(1, n_doses + 1) * weights).sum())
    rng = np.random.default_rng(seed)
    null = np.zeros(n_permutations)
    for row in ranks:
        null += rng.permuted(np.broadcast_to(row, (n_permutations, n_doses)), axis=1) @ weights
    exceed = int((np.abs(null) >= abs(observed) - 1e-9).sum())
    return Trend(observed / most, (1 + exceed) / (1 + n_permutations))


def isotonic_share(effects: Float[np.ndarray, "n_prompts n_doses"]) -> float:
    """R² of the best monotone curve through all effects: 1 if they rise, or fall, without exception or noise."""
    from scipy.optimize import isotonic_regression

    total = float(((effects - effects.mean()) ** 2).sum())
    if total == 0:
        return 0.0
    fits = (isotonic_regression(effects.mean(axis=0), increasing=up).x for up in (True, False))
    return 1 - min(float(((effects - fit) ** 2).sum()) for fit in fits) / total


def find_window(
    doses: Float[np.ndarray, " n_doses"],
    effect: Float[np.ndarray, " n_doses"],
    kl: Float[np.ndarray, " n_doses"],
    ce_growth: Float[np.ndarray, " n_doses"],
    *,
    beyond: float,
) -> Window:
    """The dose of largest |effect| with KL <= 0.1 nat and a cross-entropy that grows by at most 2 %.

    Args:
        effect: mean over prompts.
        beyond: |effect| that the controls reach: a smaller effect is none.
    """
    allowed = (kl <= MAX_KL) & (ce_growth <= MAX_CE_GROWTH) & (np.abs(effect) > beyond) & (doses != 0)
    if not allowed.any():
        return Window(None, None)
    best = int(np.where(allowed, np.abs(effect), -np.inf).argmax())
    return Window(float(doses[best]), float(effect[best]))
