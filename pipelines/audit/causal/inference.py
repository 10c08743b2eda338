"""Is an effect larger than those of matched controls? Randomisation p-values with a sequential stop.

A feature is compared with C latents that resemble it in everything but the concept, and with random directions of the
same norm. If it were one of them, its rank among all C + 1 effects would be uniform, so

    p = (1 + #{|control| >= |observed|}) / (1 + C)          Phipson and Smyth 2010, arXiv:1603.05766, section 4

is a valid p-value whatever the effects are distributed like. A family of m tests at level α needs C >= m / α - 1, or
Holm's first step could never reject. Most features are no better than their controls and show it early: the test
stops once `stop_after` controls exceed, and p is then stop_after / (controls used), which stays valid (Besag and
Clifford 1991, Biometrika 78, section 2).
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from pipelines.errors import UsageError

STOP_AFTER = 10
"""Controls that exceed before a test stops: p is then known to about a third of its value."""


class RankTest(NamedTuple):
    """One feature against its controls."""

    p: float
    n_controls: int
    """Controls that were run; fewer than planned where the test stopped early."""
    n_exceed: int
    effects: tuple[float, ...]
    """Of the controls that were run, in their order."""

    @property
    def band(self) -> tuple[float, float]:
        """2.5th and 97.5th percentile of the controls' effects; NaN without controls."""
        if not self.effects:
            return math.nan, math.nan
        low, high = np.quantile(self.effects, (0.025, 0.975))
        return float(low), float(high)


def controls_needed(n_tests: int, alpha: float) -> int:
    """The fewest controls with which each of `n_tests` tests can pass Holm at `alpha`: the least p is 1 / (C + 1)."""
    return math.ceil(n_tests / alpha - 1e-9) - 1


def rank_test(observed: float, controls: Iterable[float], *, stop_after: int | None = STOP_AFTER) -> RankTest:
    """Two-sided rank test of one effect; `controls` is consumed only as far as needed.

    Args:
        controls: effects of the controls in an order that was fixed before any was seen. Running one may be dear: pass
            a generator.
        stop_after: end once that many controls exceed; None runs all.
    Raises:
        ValueError: no control, or an effect that is NaN or infinite.
    """
    effects: list[float] = []
    n_exceed = 0
    if not math.isfinite(observed):
        raise ValueError(f"An effect must be finite, got {observed}: look at the outcome that gave it.")
    for effect in controls:
        if not math.isfinite(effect):
            raise ValueError(f"A control's effect must be finite, got {effect}: look at the outcome that gave it.")
        effects.append(float(effect))
        n_exceed += abs(effect) >= abs(observed)
        if stop_after is not None and n_exceed >= stop_after:
            return RankTest(n_exceed / len(effects), len(effects), n_exceed, tuple(effects))
    if not effects:
        raise ValueError("A rank test needs at least one control, got none.")
    return RankTest((1 + n_exceed) / (1 + len(effects)), len(effects), n_exceed, tuple(effects))


class Budget(NamedTuple):
    """What a causal audit costs before it starts."""

    n_tests: int
    n_controls: int
    n_passes: int
    """Forward passes of one prompt through the layers after the hook, at most."""
    seconds: float | None
    """At most; None where no pass has been timed."""

    @property
    def sentence(self) -> str:
        time = "" if self.seconds is None else f", at most {self.seconds / 60:.1f} min"
        return (
            f"{self.n_tests} tests with {self.n_controls} matched and {self.n_controls} random controls each: "
            f"{self.n_passes:,} passes after the hook{time}"
        )


def plan_budget(
    n_tests: int,
    n_prompts: int,
    n_doses: int,
    *,
    alpha: float,
    n_controls: int | None = None,
    seconds_per_pass: float | None = None,
    max_seconds: float | None = None,
) -> Budget:
    """The passes that a family of tests takes at most, and a refusal where it could not end in a rejection.

    Raises:
        UsageError: fewer controls than `controls_needed`, or more time than `max_seconds`; says what would do.
    """
    needed = controls_needed(n_tests, alpha)
    n_controls = needed if n_controls is None else n_controls
    if n_controls < needed:
        most = math.floor((n_controls + 1) * alpha + 1e-9)
        raise UsageError(
            f"{n_controls} controls cannot show any of {n_tests} effects at α = {alpha:g}: the least p-value is "
            f"{1 / (n_controls + 1):.3g}. Take at least {needed} controls, or test at most {most} features."
        )
    n_passes = n_tests * n_prompts * (2 * n_controls + n_doses)
    seconds = None if seconds_per_pass is None else n_passes * seconds_per_pass
    if seconds is not None and max_seconds is not None and seconds > max_seconds:
        fewer = [max(1, math.floor(n * max_seconds / seconds)) for n in (n_tests, n_prompts)]
        raise UsageError(
            f"{n_tests} causal tests need up to {seconds / 60:.1f} min, the limit is {max_seconds / 60:.1f} min. "
            f"Raise the limit, or test about {fewer[0]} features or {fewer[1]} prompts."
        )
    return Budget(n_tests, n_controls, n_passes, seconds)


def mean_interval(values: Float[np.ndarray, " n"], level: float = 0.95) -> tuple[float, float, float]:
    """Mean over prompts with its t interval; the interval is infinite for a single prompt."""
    from scipy import stats

    mean = float(values.mean())
    if len(values) < 2:
        return mean, -math.inf, math.inf
    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return mean, mean - half, mean + half
