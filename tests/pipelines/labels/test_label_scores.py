import numpy as np
import pytest

from pipelines.labels.scores import clustered_rate, detection, mismatch_p, wilson_interval


def counts(*rows):
    return np.array(rows, np.int64)


def test_detection_agrees_with_a_hand_computation():
    found = detection(counts([3, 1]), counts([4, 1]), counts([5, 1]), np.array([10, 10]))
    assert found.tpr[0] == 4 / 5
    assert found.fpr[0] == 2 / 15
    assert found.balanced_accuracy[0] == pytest.approx((4 / 5 + 13 / 15) / 2)
    assert found.precision[0] == 4 / 6
    assert found.n_firing[0] == 5


def test_detection_is_one_for_a_perfect_label_and_half_for_one_that_says_always_or_never():
    tokens = np.full(30, 20)
    firing = np.tile(counts([2]), (1, 30))
    perfect = detection(firing, firing, firing, tokens)
    assert perfect.balanced_accuracy[0] == 1.0
    assert 0.8 < perfect.low[0] < 1.0
    always = detection(firing, firing, tokens[None], tokens)
    never = detection(firing * 0, firing, firing * 0, tokens)
    assert always.balanced_accuracy[0] == never.balanced_accuracy[0] == 0.5
    assert np.isnan(never.precision[0])


def test_detection_is_undefined_without_firings():
    none = np.zeros((1, 3), np.int64)
    found = detection(none, none, none, np.full(3, 5))
    assert np.isnan([found.balanced_accuracy[0], found.low[0], found.high[0], found.tpr[0]]).all()
    assert found.fpr[0] == 0


def test_detection_of_several_latents_equals_each_alone():
    rng = np.random.default_rng(0)
    tokens = rng.integers(20, 50, 40)
    firing = rng.integers(0, 5, (3, 40))
    hits = rng.binomial(firing, 0.7)
    predicted = hits + rng.integers(0, 3, (3, 40))
    together = detection(hits, firing, predicted, tokens)
    for i in range(3):
        alone = detection(hits[i : i + 1], firing[i : i + 1], predicted[i : i + 1], tokens)
        for a, b in zip(together, alone, strict=True):
            assert a[i] == pytest.approx(b[0])


def test_wilson_interval_agrees_with_the_published_example():
    # Newcombe 1998, Statistics in Medicine 17, 857-872, table I: 81 of 263 gives 0.2553 to 0.3662
    low, high = wilson_interval(np.array([81 / 263]), np.array([263.0]), np.array([1.959964]))
    assert low[0] == pytest.approx(0.2553, abs=5e-5)
    assert high[0] == pytest.approx(0.3662, abs=5e-5)


def test_rate_of_one_cluster_knows_nothing():
    rate, low, high = clustered_rate(counts([3, 0]), counts([4, 0]), 0.95)
    assert (rate[0], low[0], high[0]) == (0.75, 0.0, 1.0)


def test_rate_at_the_boundary_counts_clusters_not_tokens():
    _, few, _ = clustered_rate(np.full((1, 5), 100), np.full((1, 5), 100), 0.95)
    _, many, _ = clustered_rate(np.full((1, 500), 1), np.full((1, 500), 1), 0.95)
    assert few[0] < 0.5
    assert many[0] > 0.98


def test_interval_covers_the_truth_when_documents_differ():
    """Documents vary in rate and size, so a token-level interval would cover far less."""
    rng = np.random.default_rng(0)
    n, d = 2000, 60
    trials = rng.integers(0, 12, (n, d))
    rate = rng.beta(1.4, 0.6, (n, d))
    successes = rng.binomial(trials, rate)
    _, low, high = clustered_rate(successes, trials, 0.95)
    covered = np.mean((low <= 0.7) & (high >= 0.7))
    assert 0.93 <= covered <= 0.98
    p = successes.sum(1) / trials.sum(1)
    naive_low, naive_high = wilson_interval(p, trials.sum(1).astype(float), np.full(n, 1.96))
    assert np.mean((naive_low <= 0.7) & (naive_high >= 0.7)) < covered - 0.05


def test_balanced_accuracy_interval_covers_the_truth():
    rng = np.random.default_rng(1)
    n, d = 2000, 50
    tokens = np.full(d, 100)
    firing = rng.integers(0, 6, (n, d))
    hits = rng.binomial(firing, rng.beta(2, 1, (n, d)))
    false = rng.binomial(tokens[None] - firing, rng.beta(1, 49, (n, d)))
    found = detection(hits, firing, hits + false, tokens)
    truth = (2 / 3 + 49 / 50) / 2
    assert 0.93 <= np.mean((found.low <= truth) & (truth <= found.high)) <= 0.985


def test_balanced_accuracy_lower_bound_rarely_exceeds_chance_when_there_is_nothing_to_find():
    rng = np.random.default_rng(2)
    n, d = 2000, 50
    tokens = np.full(d, 100)
    share = rng.beta(1, 19, (n, d))
    firing = rng.integers(0, 6, (n, d))
    hits = rng.binomial(firing, share)
    predicted = hits + rng.binomial(tokens[None] - firing, share)
    assert np.mean(detection(hits, firing, predicted, tokens).low > 0.5) <= 0.04


def test_mismatch_p_counts_others_that_fit_as_well():
    null = np.array([[0.5, 0.9, 0.7, np.nan], [0.5, 0.5, 0.5, 0.5], [0.1, 0.1, 0.1, 0.1]], np.float32)
    assert mismatch_p(np.array([0.9, 0.6, np.nan]), null).tolist() == [2 / 4, 1 / 5, 1.0]


def test_mismatch_p_is_uniform_when_the_label_is_no_better_on_its_own():
    rng = np.random.default_rng(0)
    scores = rng.random((4000, 20)).astype(np.float32)
    p = mismatch_p(scores[:, 0].astype(float), scores[:, 1:])
    assert np.mean(p <= 0.05) == pytest.approx(0.05, abs=0.012)
