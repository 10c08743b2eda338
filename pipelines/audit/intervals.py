"""How sure: confidence intervals of an AUROC, and the smallest AUROC that a design would have seen.

The interval is DeLong's, made robust to clusters by Obuchowski 1997 (Biometrics 53:567), on the logit scale with
t(G - 1) for G groups. Near an AUROC of 1 that variance collapses (it is exactly 0 under perfect separation), so the
interval is never shorter than Newcombe's, which stays honest there.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats

from pipelines.audit.statistics import check_scores, midranks

BLOCK = 4096  # latents per block: bounds memory whatever their number


class Interval(NamedTuple):
    """Point estimates and bounds, [n_latents] each."""

    auroc: Float[np.ndarray, " n_latents"]
    low: Float[np.ndarray, " n_latents"]
    high: Float[np.ndarray, " n_latents"]


def auroc_interval(
    scores: Float[np.ndarray, "n_texts n_latents"],
    labels: Bool[np.ndarray, " n_texts"],
    groups: Int[np.ndarray, " n_texts"],
    *,
    level: float = 0.95,
) -> Interval:
    """Two-sided confidence interval of every column's AUROC: the hull of the two intervals below.

    With placements V10_i = share of negatives that positive i beats and V01_j = share of positives that beat negative j
    (ties one half; DeLong, DeLong and Clarke-Pearson 1988), summed over the texts of each group g, and G1, G0 and G
    groups with positives, with negatives and in all (Obuchowski 1997, eq. 5):

        S10 = G1 / (G1 - 1) * sum_g (sum_i (V10_i - A))^2         S01 likewise
        S11 = G / (G - 1) * sum_g (sum_i (V10_i - A)) (sum_j (V01_j - A))
        var = S10 / n_pos^2 + S01 / n_neg^2 + 2 S11 / (n_pos n_neg)
        logit(A) +- t(G - 1) * sqrt(var) / (A (1 - A))

    The second interval holds every A' with |A - A'| <= t * sqrt(var'(A')), where var' is Hanley and McNeil's variance
    at A' (Newcombe 2006, Statistics in Medicine 25:559, method 5), with sample sizes divided by the design effect of
    the groups (var over its value for independent texts, between 1 and texts per group).

    Raises:
        ValueError: fewer than two groups hold positives, or fewer than two hold negatives.
    """
    check_scores(scores, labels, groups)
    return Interval(*_spread(scores, labels, groups).bounds(level))


class _Spread(NamedTuple):
    """AUROCs with what their intervals of any level need."""

    auroc: Float[np.ndarray, " n_latents"]
    variance: Float[np.ndarray, " n_latents"]
    n_pos: Float[np.ndarray, " n_latents"]
    """Effective number of positives: divided by the design effect of the groups."""
    n_neg: Float[np.ndarray, " n_latents"]
    df: int

    def bounds(self, level: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Estimates, lower and upper bounds."""
        quantile = float(stats.t.ppf(0.5 + level / 2, self.df))
        inside = np.clip(self.auroc, 1e-9, 1 - 1e-9)
        centre = np.log(inside / (1 - inside))
        half = quantile * np.sqrt(np.maximum(self.variance, 0)) / (inside * (1 - inside))
        low = 1 / (1 + np.exp(np.clip(half - centre, -50, 50)))
        high = 1 / (1 + np.exp(np.clip(-half - centre, -50, 50)))
        other_low, other_high = _newcombe(self.auroc, self.n_pos, self.n_neg, quantile)
        return self.auroc, np.minimum(low, other_low), np.maximum(high, other_high)

    def of(self, k: int) -> "_Spread":
        """One latent."""
        return _Spread(self.auroc[[k]], self.variance[[k]], self.n_pos[[k]], self.n_neg[[k]], self.df)


def _spread(
    scores: Float[np.ndarray, "n_texts n_latents"],
    labels: Bool[np.ndarray, " n_texts"],
    groups: Int[np.ndarray, " n_texts"],
) -> _Spread:
    """A block of latents at a time, so that memory does not grow with their number."""
    n_pos, n_neg = int(labels.sum()), int((~labels).sum())
    g_pos, g_neg, g_all = (np.unique(groups[rows]).size for rows in (labels, ~labels, slice(None)))
    if min(g_pos, g_neg) < 2:
        raise ValueError(
            f"an interval needs two groups of each class or more; got {g_pos} with positives and {g_neg} with "
            "negatives. Add independent sources."
        )
    most = labels.size / g_all
    blocks = []
    for lo in range(0, max(scores.shape[1], 1), BLOCK):
        columns = np.ascontiguousarray(scores[:, lo : lo + BLOCK].T)
        area, pos_sums, neg_sums, v10, v01 = _placements(columns, labels, groups)
        variance = (
            g_pos / (g_pos - 1) * np.square(pos_sums).sum(axis=1) / n_pos**2
            + g_neg / (g_neg - 1) * np.square(neg_sums).sum(axis=1) / n_neg**2
            + 2 * g_all / (g_all - 1) * (pos_sums * neg_sums).sum(axis=1) / (n_pos * n_neg)
        )
        independent = (
            np.square(v10 - area[:, None]).sum(axis=1) * n_pos / (n_pos - 1) / n_pos**2
            + np.square(v01 - area[:, None]).sum(axis=1) * n_neg / (n_neg - 1) / n_neg**2
        )
        inflation = np.divide(variance, independent, out=np.full_like(area, most), where=independent > 0).clip(1, most)
        blocks.append((area, variance, n_pos / inflation, n_neg / inflation))
    area, variance, pos, neg = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    return _Spread(area, variance, pos, neg, g_all - 1)


class Span(NamedTuple):
    """A difference and its bounds."""

    value: float
    low: float
    high: float


def paired_difference(
    first: Float[np.ndarray, " n_texts"],
    second: Float[np.ndarray, " n_texts"],
    labels: Bool[np.ndarray, " n_texts"],
    groups: Int[np.ndarray, " n_texts"],
    *,
    level: float = 0.95,
) -> Span:
    """AUROC of `first` less that of `second` on the same texts: `difference_of` with their correlation over groups."""
    columns = np.stack([first, second]).astype(np.float32)
    each = auroc_interval(columns.T, labels, groups, level=level)
    _, pos_sums, neg_sums, _, _ = _placements(columns, labels, groups)
    influence = pos_sums / int(labels.sum()) + neg_sums / int((~labels).sum())
    scale = math.sqrt(float(np.square(influence).sum(axis=1).prod()))
    correlation = float((influence[0] * influence[1]).sum()) / scale if scale > 0 else 0.0
    a, b = (tuple(float(part[k]) for part in each) for k in (0, 1))
    return difference_of((a[0], a[1], a[2]), (b[0], b[1], b[2]), correlation)


def difference_of(a: tuple[float, float, float], b: tuple[float, float, float], correlation: float = 0.0) -> Span:
    """a - b of estimates (value, low, high), by squaring and adding their distances to the bounds.

    Unlike value +- t * sd it keeps its width where both are near 1 and their estimated variances collapse.
    Reference: Zou and Donner 2008, Statistics in Medicine 27:1693 (MOVER); Zou 2007 for correlated estimates.
    """

    def half(x: float, y: float) -> float:
        return math.sqrt(max(x * x + y * y - 2 * correlation * x * y, 0.0))

    value = a[0] - b[0]
    return Span(value, value - half(a[0] - a[1], b[2] - b[0]), value + half(a[2] - a[0], b[0] - b[1]))


def levels_in_order(alpha: float, n: int) -> list[float]:
    """One-sided levels at which n ordered claims are tested if none before is granted; they add up to alpha.

    The fallback procedure (Wiens 2003, Pharmaceutical Statistics 2:211): the first claim gets half of alpha, the others
    share the rest, and the level of a claim that is granted passes on to the next. Family-wise error stays at alpha
    under any dependence. The first claim is thus judged by the lower end of its ordinary 95 % interval.
    """
    return [alpha] if n == 1 else [alpha / 2] + [alpha / (2 * (n - 1))] * (n - 1)


def bounds_in_order(
    scores: Float[np.ndarray, "n_texts n_latents"],
    labels: Bool[np.ndarray, " n_texts"],
    groups: Int[np.ndarray, " n_texts"],
    *,
    alpha: float,
    above: float,
) -> tuple[Float[np.ndarray, " n_latents"], Float[np.ndarray, " n_latents"]]:
    """Lower bound of every column at the level at which it is tested against `above`, and these levels.

    Columns come in the order in which they were chosen beforehand; those whose bound exceeds `above` are granted, and
    the chance that any of them has a true AUROC at or below it is at most alpha.
    """
    check_scores(scores, labels, groups)
    own, spread = levels_in_order(alpha, scores.shape[1]), _spread(scores, labels, groups)
    low, level = np.zeros(scores.shape[1]), np.zeros(scores.shape[1])
    passed_on = 0.0
    for k in range(scores.shape[1]):
        level[k] = own[k] + passed_on
        low[k] = spread.of(k).bounds(1 - 2 * float(level[k]))[1][0]
        passed_on = level[k] if low[k] > above else 0.0
    return low, level


def minimum_detectable_auroc(
    n_pos: tuple[int, int],
    n_neg: tuple[int, int],
    *,
    n_latents: int,
    n_candidates: int,
    alpha: float = 0.05,
    power: float = 0.8,
) -> float:
    """Smallest true AUROC that the two steps find together with probability `power`.

    A latent must rank among the first `n_candidates` of `n_latents` when discovering, and pass the first step of Holm
    over `n_candidates` when confirming. Both are normal approximations with the null's variance without ties,
    (n + 1) / (12 n_pos n_neg), so this is a guide for continuous scores, not a bound.

    Args:
        n_pos, n_neg: groups of each class in (discover, confirm).
    """
    sd = [math.sqrt((p + n + 1) / (12 * p * n)) for p, n in zip(n_pos, n_neg, strict=True)]
    need = [
        float(stats.norm.isf(min(0.5, n_candidates / max(n_latents, 1)))) * sd[0],
        float(stats.norm.isf(alpha / n_candidates)) * sd[1],
    ]

    def found(effect: float) -> float:
        return math.prod(float(stats.norm.cdf((effect - t) / s)) for t, s in zip(need, sd, strict=True))

    low, high = 0.0, 0.5
    if found(high) < power:
        return 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if found(middle) < power else (low, middle)
    return 0.5 + high


def _placements(
    columns: Float[np.ndarray, "n_latents n_texts"],
    labels: Bool[np.ndarray, " n_texts"],
    groups: Int[np.ndarray, " n_texts"],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """AUROCs, sums of centred placements by group (of positives, of negatives), and the placements themselves."""
    n_pos = int(labels.sum())
    n_neg = labels.size - n_pos
    ranks = midranks(columns).astype(np.float64)
    v10 = (ranks[:, labels] - midranks(np.ascontiguousarray(columns[:, labels]))) / n_neg
    v01 = 1 - (ranks[:, ~labels] - midranks(np.ascontiguousarray(columns[:, ~labels]))) / n_pos
    area = v10.mean(axis=1)
    _, group = np.unique(groups, return_inverse=True)
    member = np.zeros((labels.size, int(group.max()) + 1))
    member[np.arange(labels.size), group] = 1
    return area, (v10 - area[:, None]) @ member[labels], (v01 - area[:, None]) @ member[~labels], v10, v01


def _newcombe(
    area: Float[np.ndarray, " n_latents"],
    n_pos: Float[np.ndarray, " n_latents"],
    n_neg: Float[np.ndarray, " n_latents"],
    quantile: float,
) -> tuple[Float[np.ndarray, " n_latents"], Float[np.ndarray, " n_latents"]]:
    """Bounds of Newcombe's method 5, by bisection; `area` may be 0 or 1."""
    star = (n_pos + n_neg) / 2 - 1

    def sd(a: Float[np.ndarray, " n_latents"]) -> Float[np.ndarray, " n_latents"]:
        spread = a * (1 - a) * (1 + star * (1 - a) / (2 - a) + star * a / (1 + a)) / (n_pos * n_neg)
        return np.sqrt(spread)  # type: ignore[no-any-return]

    bounds = []
    for end in (0.0, 1.0):
        outer, inner = np.full_like(area, end), area.copy()
        for _ in range(40):
            middle = (outer + inner) / 2
            within = np.abs(area - middle) <= quantile * sd(middle)
            inner, outer = np.where(within, middle, inner), np.where(within, outer, middle)
        bounds.append(inner)
    return bounds[0], bounds[1]
