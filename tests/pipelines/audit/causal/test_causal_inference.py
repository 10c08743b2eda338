"""Rank tests against controls, doses and their windows: valid where there is nothing, able to see what is planted."""

import math

import numpy as np
import pytest

from pipelines.audit.causal.controls import Traits, match_controls, random_directions
from pipelines.audit.causal.dose import find_window, isotonic_share, trend_test
from pipelines.audit.causal.inference import controls_needed, mean_interval, plan_budget, rank_test
from pipelines.audit.statistics import holm
from pipelines.errors import UsageError


def test_the_fewest_controls_are_those_with_which_holm_can_reject() -> None:
    for m, alpha in ((1, 0.05), (10, 0.05), (7, 0.01)):
        c = controls_needed(m, alpha)
        assert holm(np.array([1 / (c + 1)] + [1.0] * (m - 1)))[0] <= alpha + 1e-12
        assert holm(np.array([1 / c] + [1.0] * (m - 1)))[0] > alpha


def test_the_p_value_is_the_rank_among_the_controls() -> None:
    found = rank_test(-3.0, [1.0, 2.0, -4.0, 0.5], stop_after=None)
    assert (found.p, found.n_controls, found.n_exceed) == (2 / 5, 4, 1)
    assert found.band[0] < -3 < found.band[1]


def test_a_test_that_stops_early_leaves_the_rest_of_the_controls_alone() -> None:
    drawn: list[int] = []

    def controls() -> "object":
        for i in range(1000):
            drawn.append(i)
            yield 1.0

    found = rank_test(0.5, controls(), stop_after=10)  # type: ignore[arg-type]
    assert found.p == 1.0
    assert found.n_controls == len(drawn) == 10


@pytest.mark.parametrize("stop_after", [None, 10])
@pytest.mark.parametrize("draw", ["normal", "cauchy", "mostly zero"])
def test_features_like_their_controls_are_rejected_at_most_at_rate_alpha(stop_after: int | None, draw: str) -> None:
    rng = np.random.default_rng(0)
    n, c = 2000, 199
    effects = {
        "normal": rng.standard_normal((n, c + 1)),
        "cauchy": rng.standard_cauchy((n, c + 1)),
        "mostly zero": rng.standard_normal((n, c + 1)) * (rng.random((n, c + 1)) < 0.2),
    }[draw]
    p = np.array([rank_test(row[0], row[1:], stop_after=stop_after).p for row in effects])
    for alpha in (0.05, 0.2):
        assert (p <= alpha).mean() <= alpha + 2 * math.sqrt(alpha * (1 - alpha) / n)


def test_an_effect_beyond_all_controls_has_the_least_p_value() -> None:
    rng = np.random.default_rng(0)
    assert rank_test(6.0, rng.standard_normal(199)).p == 1 / 200


@pytest.mark.parametrize(("observed", "controls"), [(math.nan, [1.0]), (1.0, [math.inf]), (1.0, [])])
def test_effects_that_are_no_numbers_are_refused(observed: float, controls: list[float]) -> None:
    with pytest.raises(ValueError, match=r"must be finite|at least one control"):
        rank_test(observed, controls)


def test_a_design_that_cannot_reject_or_takes_too_long_is_refused_with_what_would_do() -> None:
    with pytest.raises(
        UsageError, match=r"100 controls cannot show any of 10 effects.*at least 199.*at most 5 features"
    ):
        plan_budget(10, 12, 7, alpha=0.05, n_controls=100)
    with pytest.raises(UsageError, match=r"need up to 8\.1 min, the limit is 4\.0 min.*about 4 features or 5 prompts"):
        plan_budget(10, 12, 7, alpha=0.05, seconds_per_pass=0.01, max_seconds=240)
    budget = plan_budget(10, 12, 7, alpha=0.05, seconds_per_pass=0.01, max_seconds=600)
    assert budget.n_passes == 10 * 12 * (2 * 199 + 7)
    assert "10 tests with 199 matched and 199 random controls each" in budget.sentence


def test_controls_resemble_the_latent_and_are_neutral() -> None:
    rng = np.random.default_rng(0)
    n = 2000
    density, strength = 10 ** rng.uniform(-4, -1, n), 10 ** rng.uniform(0, 1, n)
    auroc = np.clip(0.5 + 0.15 * rng.standard_normal(n), 0, 1)
    traits = Traits(density, np.ones(n), strength, auroc)
    exclude = np.zeros(n, bool)
    exclude[:50] = True
    found = match_controls(traits, 7, 100, exclude=exclude, seed=0)
    assert len(set(found.latents.tolist())) == 100
    assert not set(found.latents.tolist()) & set(range(50))
    assert (np.abs(auroc[found.latents] - 0.5) <= 0.1).all()
    log = np.log10(density)
    assert np.abs(log[found.latents] - log[7]).mean() < 0.5 * np.abs(log - log[7]).mean()
    assert not (np.diff(found.distance) >= 0).all(), "the order must be random"
    with pytest.raises(UsageError, match="needs 1900 matched controls, but only"):
        match_controls(traits, 7, 1900, exclude=exclude, seed=0)


def test_random_directions_have_the_norm_and_no_preference() -> None:
    drawn = random_directions(4000, 16, 2.5, seed=0)
    np.testing.assert_allclose(np.linalg.norm(drawn, axis=1), 2.5, rtol=1e-5)
    assert np.abs(drawn.mean(axis=0)).max() < 0.05


def test_a_monotone_response_has_a_trend_and_noise_has_none() -> None:
    rng = np.random.default_rng(0)
    doses = np.array([-2.0, -1, 0, 0.5, 1, 2, 4])
    rising = trend_test(0.5 * doses + rng.standard_normal((12, 7)))
    assert rising.statistic > 0.4
    assert rising.p < 0.01
    assert trend_test(-0.5 * doses + rng.standard_normal((12, 7))).statistic < -0.4
    p = np.array([trend_test(rng.standard_normal((12, 7)), n_permutations=199, seed=i).p for i in range(400)])
    assert (p <= 0.05).mean() <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 400)
    assert trend_test(np.tile(np.arange(4.0), (3, 1))).statistic == 1.0


def test_the_monotone_share_is_one_for_a_monotone_response_and_small_for_noise() -> None:
    rng = np.random.default_rng(0)
    assert isotonic_share(np.tile(np.arange(5.0) ** 2, (4, 1))) == pytest.approx(1)
    assert isotonic_share(np.tile(-np.arange(5.0), (4, 1))) == pytest.approx(1)
    assert isotonic_share(rng.standard_normal((40, 7))) < 0.1
    assert isotonic_share(np.zeros((3, 4))) == 0


def test_the_window_is_the_strongest_dose_that_side_effects_allow() -> None:
    doses = np.array([-1.0, 0, 1, 2, 4])
    effect = np.array([-0.5, 0, 0.6, 1.2, 3])
    kl, growth = np.array([0.02, 0, 0.02, 0.08, 0.9]), np.array([0.0, 0, 0.001, 0.01, 0.3])
    assert find_window(doses, effect, kl, growth, beyond=0.2) == (2.0, 1.2)
    assert find_window(doses, effect, kl, growth, beyond=2.0) == (None, None), "disruption, not control"
    assert find_window(doses, effect, kl, np.full(5, 0.03), beyond=0.2) == (None, None)


def test_the_interval_of_a_mean_covers_it() -> None:
    rng = np.random.default_rng(0)
    hits = [low <= 1 <= high for _, low, high in (mean_interval(1 + rng.standard_normal(12)) for _ in range(1000))]
    assert 0.93 <= np.mean(hits) <= 0.97
    assert mean_interval(np.array([1.0])) == (1.0, -math.inf, math.inf)
