"""The statistics against brute force, hand-made values, planted truth and nothing at all."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats as scipy_stats

from pipelines.audit.exchange import moments, permuted_labels, pure_and_mixed
from pipelines.audit.statistics import (
    associate,
    auroc,
    benjamini_hochberg,
    holm,
    midranks,
    permutation_p,
    searched_null,
)


def zero_inflated(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    """Correlated scores of which a latent-specific share is exactly zero, like pooled SAE latents."""
    shared = rng.normal(size=(n, 5)) @ rng.normal(size=(5, d)) * 0.4
    return np.maximum(rng.normal(size=(n, d)) + shared - rng.uniform(-1, 2, size=d), 0).astype(np.float32)


def naive_auroc(x: np.ndarray, labels: np.ndarray) -> float:
    pairs = [(p > n) + 0.5 * (p == n) for p, n in itertools.product(x[labels], x[~labels])]
    return float(np.mean(pairs))


def test_auroc_equals_a_value_computed_by_hand():
    scores = np.array([[3.0], [0.0], [0.0], [1.0], [0.0]], dtype=np.float32)
    labels = np.array([True, True, False, False, False])
    # 3 beats all three negatives; 0 ties with two and loses to one: (3 + 1) / 6
    assert auroc(scores, labels)[0] == pytest.approx(4 / 6)


@settings(max_examples=40, deadline=None)
@given(arrays(np.float32, (3, 9), elements=st.integers(0, 4).map(float)), st.integers(1, 8))
def test_midranks_and_auroc_equal_the_naive_definitions_under_ties(values, n_pos):
    labels = np.arange(9) < n_pos
    assert np.array_equal(midranks(values), scipy_stats.rankdata(values, axis=1).astype(np.float32))
    expected = [naive_auroc(column, labels) for column in values]
    assert np.allclose(auroc(np.ascontiguousarray(values.T), labels), expected)


def test_auroc_is_half_for_a_silent_latent_and_flips_with_the_labels():
    rng = np.random.default_rng(0)
    scores = zero_inflated(rng, 40, 30)
    scores[:, 3] = 0
    labels = rng.random(40) < 0.4
    assert auroc(scores, labels)[3] == 0.5
    assert np.allclose(auroc(scores, labels), 1 - auroc(scores, ~labels))


@pytest.mark.parametrize(
    ("labels", "groups"),
    [
        ([1, 1, 0, 0, 0, 0], [0, 1, 2, 3, 4, 5]),  # every text its own group
        ([1, 1, 1, 0, 0, 0], [0, 0, 1, 2, 2, 2]),  # whole groups of unequal size
        ([1, 0, 1, 0, 1, 0], [0, 0, 1, 1, 2, 3]),  # two pairs, and two groups of one class
    ],
)
def test_null_moments_equal_those_of_every_permitted_labelling(labels, groups):
    labels, groups = np.array(labels, bool), np.array(groups)
    centred = midranks(np.array([[0, 0, 1, 5, 2, 2], [3, 1, 4, 1, 5, 9]], np.float32)) - 3.5
    drawn = np.unique(permuted_labels(labels, groups, 4000, seed=1), axis=1)
    mean, variance = moments(centred, *pure_and_mixed(labels, groups), labels)
    assert np.allclose(mean, (centred @ drawn).mean(axis=1), atol=1e-6)
    assert np.allclose(variance, (centred @ drawn).var(axis=1), atol=1e-6)


def test_permuted_labels_keep_counts_within_mixed_groups_and_move_pure_groups_whole():
    labels = np.array([1, 0, 0, 1, 1, 0, 0, 0], bool)
    groups = np.array([7, 7, 7, 3, 3, 5, 5, 9])
    drawn = permuted_labels(labels, groups, 500, seed=0)
    assert set(drawn[:3].sum(axis=0)) == {1.0}
    assert np.array_equal(drawn[3], drawn[4])
    assert np.array_equal(drawn[5], drawn[6])
    assert set(drawn[[3, 5, 7]].sum(axis=0)) == {1.0}
    assert np.array_equal(drawn, permuted_labels(labels, groups, 500, seed=0))


def test_z_equals_the_tie_corrected_mann_whitney_test():
    rng = np.random.default_rng(2)
    scores = zero_inflated(rng, 60, 12)
    labels = np.arange(60) < 25
    found = associate(scores, labels, np.arange(60), n_permutations=100, min_texts=1)
    for j in range(12):
        p = scipy_stats.mannwhitneyu(
            scores[labels, j], scores[~labels, j], alternative="greater", use_continuity=False, method="asymptotic"
        ).pvalue
        assert scipy_stats.norm.sf(found.z[j]) == pytest.approx(p, rel=1e-3)


def test_associate_equals_the_naive_permutation_test():
    rng = np.random.default_rng(3)
    scores = zero_inflated(rng, 30, 20)
    labels, groups = np.arange(30) < 12, np.arange(30)
    found = associate(scores, labels, groups, n_permutations=200, min_texts=3, seed=5)
    drawn = permuted_labels(labels, groups, 200, seed=5).astype(bool)
    centred = scipy_stats.rankdata(scores, axis=0) - 15.5
    sd = np.array([np.sqrt(12 * 18 / (30 * 29) * np.square(c).sum()) for c in centred.T])
    z = np.array([[centred[column, j].sum() / max(sd[j], 1e-9) for j in range(20)] for column in drawn.T])
    best = z[:, found.tested].max(axis=1)
    assert np.allclose(found.null_max_z, best, atol=1e-4)
    for j in np.flatnonzero(found.tested):
        assert found.p_familywise[j] == pytest.approx((1 + (best >= found.z[j] - 1e-6).sum()) / 201)
        at_least = (z[:, found.tested] >= found.z[j]).sum()
        assert found.p_pooled[j] == pytest.approx((1 + at_least) / (1 + 200 * found.tested.sum()), rel=0.05, abs=2e-3)


def test_associate_does_not_depend_on_the_block_size(monkeypatch):
    rng = np.random.default_rng(4)
    scores = zero_inflated(rng, 40, 100)
    labels, groups = np.arange(40) % 2 == 0, np.arange(40) // 2
    whole = associate(scores, labels, groups, n_permutations=150)
    monkeypatch.setattr("pipelines.audit.statistics.BLOCK", 7)
    for one, other in zip(whole, associate(scores, labels, groups, n_permutations=150), strict=True):
        assert np.array_equal(one, other)


def test_planted_latents_are_found_and_the_others_are_not():
    rng = np.random.default_rng(5)
    scores = zero_inflated(rng, 80, 1000)
    labels = np.arange(80) < 40
    scores[:40, [11, 500]] += 3
    found = associate(scores, labels, np.arange(80))
    assert set(np.flatnonzero(found.p_familywise <= 0.05)) == {11, 500}
    q = benjamini_hochberg(found.p_pooled[found.tested])
    assert {11, 500} <= set(np.flatnonzero(found.tested)[q <= 0.05])


@pytest.mark.parametrize("clustered", [False, True])
def test_error_rates_hold_when_no_latent_carries_anything(clustered):
    rng = np.random.default_rng(6)
    n_simulations, familywise, any_fdr, confirm_p = 200, 0, 0, []
    groups = np.arange(60) // (3 if clustered else 1)
    for _ in range(n_simulations):
        scores = zero_inflated(rng, 60, 64)
        if clustered:
            scores = np.maximum(scores + rng.normal(size=(20, 64))[groups], 0).astype(np.float32)
            labels = (rng.permutation(20) < 10)[groups]
        else:
            labels = rng.permutation(60) < 30
        found = associate(scores, labels, groups, n_permutations=150, seed=int(rng.integers(1 << 30)))
        familywise += bool((found.p_familywise <= 0.05).any())
        any_fdr += bool((benjamini_hochberg(found.p_pooled[found.tested]) <= 0.05).any())
        confirm_p.append(permutation_p(scores[:, :1], labels, groups, n_permutations=199)[0])
    slack = 0.05 + 3 * np.sqrt(0.05 * 0.95 / n_simulations)
    assert familywise / n_simulations <= slack
    assert any_fdr / n_simulations <= slack
    assert np.mean(np.array(confirm_p) <= 0.05) <= slack


def test_p_values_ignore_clusters_at_ones_peril():
    """The control of the test above: treating clustered texts as independent breaks the error rate, so it has power."""
    rng = np.random.default_rng(7)
    false = 0
    for _ in range(60):
        labels = (rng.permutation(12) < 6)[np.arange(60) // 5]
        scores = rng.normal(size=(12, 32))[np.arange(60) // 5].astype(np.float32) + 10
        found = associate(scores, labels, np.arange(60), n_permutations=150)
        false += bool((found.p_familywise <= 0.05).any())
    assert false / 60 > 0.5


def test_searched_null_centres_on_chance_although_the_latent_was_chosen():
    rng = np.random.default_rng(8)
    labels, groups = np.arange(80) % 2 == 0, np.arange(80)
    found = associate(zero_inflated(rng, 80, 400), labels, groups, n_permutations=400)
    null = searched_null(zero_inflated(rng, 80, 400), labels, groups, found.null_best, seed=1)
    assert null.shape == (400,)
    assert null.mean() == pytest.approx(0.5, abs=0.02)


def test_holm_and_benjamini_hochberg_equal_values_computed_by_hand():
    p = np.array([0.04, 0.01, 0.03, 0.5])
    assert holm(p) == pytest.approx([0.09, 0.04, 0.09, 0.5])
    assert benjamini_hochberg(p) == pytest.approx([0.16 / 3, 0.04, 0.16 / 3, 0.5])
    assert benjamini_hochberg(p) == pytest.approx(scipy_stats.false_discovery_control(p))
    assert holm(np.array([])).size == 0
    assert benjamini_hochberg(np.array([])).size == 0


def test_latents_that_hardly_fire_are_not_tested():
    scores = np.zeros((20, 3), np.float32)
    scores[:3, 0], scores[:4, 1] = 1, 1
    found = associate(scores, np.arange(20) < 10, np.arange(20), n_permutations=100, min_texts=4)
    assert found.tested.tolist() == [False, True, False]
    assert found.p_familywise[[0, 2]].tolist() == [1, 1]


def test_bad_arrays_are_refused_with_the_fix():
    labels, groups = np.arange(6) < 3, np.arange(6)
    with pytest.raises(ValueError, match=r"one label and one group per text; got scores \(5, 2\)"):
        associate(np.zeros((5, 2), np.float32), labels, groups)
    with pytest.raises(ValueError, match=r"needs both classes; all 6 texts are positive. Add examples"):
        auroc(np.zeros((6, 2), np.float32), np.ones(6, bool))
    scores = np.zeros((6, 2), np.float32)
    scores[4, 1] = np.nan
    with pytest.raises(ValueError, match=r"text 4, latent 1 is nan"):
        associate(scores, labels, groups)
