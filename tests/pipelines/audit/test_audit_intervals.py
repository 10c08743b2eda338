"""Intervals: equality with the textbook formula, coverage, behaviour at the boundary; and the detectable effect."""

import numpy as np
import pytest
from scipy import stats

from pipelines.audit.intervals import _newcombe, auroc_interval, minimum_detectable_auroc
from pipelines.audit.statistics import auroc


def test_interval_equals_the_delong_formula_for_independent_texts():
    rng = np.random.default_rng(0)
    x = rng.normal(size=60)
    labels = np.arange(60) < 25
    x[labels] += 0.8
    wins = (x[labels][:, None] > x[~labels]).astype(float)
    area = wins.mean()
    variance = wins.mean(axis=1).var(ddof=1) / 25 + wins.mean(axis=0).var(ddof=1) / 35
    half = stats.t.ppf(0.975, 59) * np.sqrt(variance) / (area * (1 - area))
    logit = np.log(area / (1 - area))
    got = auroc_interval(x[:, None].astype(np.float32), labels, np.arange(60))
    other = _newcombe(np.array([area]), np.array([25.0]), np.array([35.0]), float(stats.t.ppf(0.975, 59)))
    # S10 and S01 carry G/(G-1) with G groups of their class, which is the ddof of the formula above.
    assert got.auroc[0] == pytest.approx(area)
    assert got.low[0] == pytest.approx(min(1 / (1 + np.exp(half - logit)), other[0][0]), abs=1e-6)
    assert got.high[0] == pytest.approx(max(1 / (1 + np.exp(-half - logit)), other[1][0]), abs=1e-6)


@pytest.mark.parametrize(("truth", "clustered"), [(0.6, False), (0.8, False), (0.95, False), (0.8, True)])
def test_interval_covers_the_truth_in_93_of_100_cases_or_more(truth, clustered):
    rng = np.random.default_rng(1)
    n, repeats = 80, 1000
    groups = np.arange(n) // (4 if clustered else 1)
    labels = np.arange(n) < n // 2
    noise = rng.normal(size=(n, repeats))
    if clustered:
        noise = np.sqrt(0.5) * noise + np.sqrt(0.5) * rng.normal(size=(groups.max() + 1, repeats))[groups]
    scores = noise + np.sqrt(2) * stats.norm.ppf(truth) * labels[:, None]
    interval = auroc_interval(scores, labels, groups)
    covered = ((interval.low <= truth) & (truth <= interval.high)).mean()
    assert covered >= 0.93
    assert (interval.high - interval.low).mean() < 0.45


def test_interval_stays_open_under_perfect_separation():
    labels = np.arange(60) < 30
    interval = auroc_interval(np.where(labels, 2.0, 0.0)[:, None], labels, np.arange(60))
    assert interval.auroc[0] == 1
    assert interval.high[0] == pytest.approx(1)
    assert 0.85 < interval.low[0] < 0.97


def test_interval_is_symmetric_under_a_swap_of_the_classes():
    rng = np.random.default_rng(2)
    scores = np.maximum(rng.normal(size=(50, 8)), 0)
    labels = np.arange(50) < 20
    one, other = auroc_interval(scores, labels, np.arange(50)), auroc_interval(scores, ~labels, np.arange(50))
    assert np.allclose(one.low, 1 - other.high, atol=1e-6)
    assert np.allclose(one.auroc, auroc(scores, labels))


def test_interval_needs_two_groups_of_each_class():
    labels = np.arange(8) < 4
    with pytest.raises(ValueError, match=r"got 1 with positives and 4 with negatives. Add independent sources"):
        auroc_interval(np.zeros((8, 1)), labels, np.where(labels, 0, np.arange(8)))


def test_minimum_detectable_auroc_is_reached_with_the_promised_power():
    smallest = minimum_detectable_auroc((40, 40), (40, 40), n_latents=400, n_candidates=10)
    rng = np.random.default_rng(3)
    labels = np.arange(80) < 40
    found = 0
    for _ in range(150):
        halves = rng.normal(size=(2, 80, 400))
        halves[:, :40, 0] += np.sqrt(2) * stats.norm.ppf(smallest)
        first, second = (auroc(half, labels)[[0]] for half in halves)
        rank = (auroc(halves[0], labels) > first[0]).sum()
        z = (second[0] - 0.5) / np.sqrt(81 / (12 * 40 * 40))
        found += bool(rank < 10 and stats.norm.sf(z) <= 0.05 / 10)
    assert found / 150 == pytest.approx(0.8, abs=0.12)


def test_minimum_detectable_auroc_falls_with_more_texts_and_is_one_when_hopeless():
    few = minimum_detectable_auroc((15, 15), (15, 15), n_latents=4608, n_candidates=20)
    many = minimum_detectable_auroc((80, 80), (80, 80), n_latents=4608, n_candidates=20)
    assert many < 0.7 < few < 1
    assert minimum_detectable_auroc((3, 3), (3, 3), n_latents=4608, n_candidates=20) == 1
