import json

import numpy as np
import pytest
from numpy.typing import NDArray

from storage.encoding import to_bfloat16_bits, to_float32
from storage.statistics import Statistics, merge, summarise


def sample(n: int = 1000, d_in: int = 5) -> NDArray[np.float32]:
    scale = np.array([1, 100, 0.01, 5, 1], np.float32)
    return np.random.default_rng(0).normal(50, 1, (n, d_in)).astype(np.float32) * scale


def test_statistics_equal_a_naive_float64_pass() -> None:
    x = sample().astype(np.float64)
    statistics, norms = summarise(sample())
    np.testing.assert_allclose(statistics.mean, x.mean(axis=0), rtol=1e-7)
    np.testing.assert_allclose(statistics.m2 / len(x), x.var(axis=0), rtol=1e-5)
    np.testing.assert_allclose(norms, np.linalg.norm(x, axis=1), rtol=1e-6)
    assert statistics.count == len(x)
    assert statistics.mean_norm == pytest.approx(np.linalg.norm(x, axis=1).mean(), rel=1e-6)


def test_statistics_of_bfloat16_bits_are_those_of_the_rounded_values() -> None:
    bits = to_bfloat16_bits(sample())
    np.testing.assert_allclose(summarise(bits)[0].mean, to_float32(bits).astype(np.float64).mean(axis=0), rtol=1e-7)


@pytest.mark.parametrize("cuts", [[500], [1, 2, 999], [0, 300, 300, 700]])
def test_merged_parts_equal_the_whole(cuts: list[int]) -> None:
    whole, _ = summarise(sample())
    merged = merge(summarise(part)[0] for part in np.split(sample(), cuts))
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-9)
    np.testing.assert_allclose(merged.m2, whole.m2, rtol=1e-5)
    assert merged.norm_histogram == whole.norm_histogram
    assert merged.count == whole.count


def test_median_norm_is_within_a_bin_of_the_exact_one() -> None:
    x = np.random.default_rng(1).gamma(2.0, 30.0, (4001, 1)).astype(np.float32)
    assert summarise(x)[0].median_norm == pytest.approx(float(np.median(x)), rel=2**-8)


def test_rows_that_are_not_finite_are_counted_and_left_out() -> None:
    x = sample(600)
    expected, _ = summarise(np.delete(x, [3, 400], axis=0))
    x[3, :2] = np.nan
    x[400, 1] = np.inf
    statistics, norms = summarise(x)
    assert (statistics.n_nan, statistics.n_inf, statistics.count) == (2, 1, 598)
    np.testing.assert_allclose(statistics.mean, expected.mean, rtol=1e-7)
    assert not np.isfinite(norms[[3, 400]]).any()


def test_rows_that_are_all_not_finite_give_nan_norms() -> None:
    statistics, _ = summarise(np.full((3, 2), np.nan, np.float32))
    assert (statistics.count, statistics.n_nan) == (0, 6)
    assert np.isnan(statistics.median_norm)
    assert np.isnan(statistics.mean_norm)


def test_json_round_trip_is_exact() -> None:
    statistics, _ = summarise(sample())
    read = Statistics.from_json(json.loads(json.dumps(statistics.to_json())))
    assert (read.mean == statistics.mean).all()
    assert (read.m2 == statistics.m2).all()
    assert read.norm_histogram == statistics.norm_histogram


def test_merging_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one shard, got none"):
        merge([])
