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
    statistics, norms, _ = summarise(sample())
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
    whole, *_ = summarise(sample())
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
    expected, *_ = summarise(np.delete(x, [3, 400], axis=0))
    x[3, :2] = np.nan
    x[400, 1] = np.inf
    statistics, norms, _ = summarise(x)
    assert (statistics.n_nan, statistics.n_inf, statistics.n_not_finite, statistics.count) == (2, 1, 2, 598)
    np.testing.assert_allclose(statistics.mean, expected.mean, rtol=1e-7)
    assert not np.isfinite(norms[[3, 400]]).any()


def test_rows_that_are_all_not_finite_give_nan_norms() -> None:
    statistics, *_ = summarise(np.full((3, 2), np.nan, np.float32))
    assert (statistics.count, statistics.n_nan) == (0, 6)
    assert np.isnan(statistics.median_norm)
    assert np.isnan(statistics.mean_norm)


def test_json_round_trip_is_exact() -> None:
    statistics, *_ = summarise(sample())
    read = Statistics.from_json(json.loads(json.dumps(statistics.to_json())))
    assert (read.mean == statistics.mean).all()
    assert (read.m2 == statistics.m2).all()
    assert read.norm_histogram == statistics.norm_histogram


def test_merging_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one shard, got none"):
        merge([])


def rows_of_every_kind(n: int = 900, seed: int = 3) -> tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.bool_]]:
    """Rows of which some are large, some not finite, some first, some padding, in every combination."""
    rng = np.random.default_rng(seed)
    x = rng.normal(1, 1, (n, 6)).astype(np.float32)
    x[rng.random(n) < 0.1] *= 50
    x[rng.random(n) < 0.1] *= 3.1  # about the threshold
    x[rng.random(n) < 0.05, 2] = np.nan
    x[rng.random(n) < 0.05, 3] = np.inf
    return x, rng.random(n) < 0.1, rng.random(n) < 0.1


def counted(x: NDArray[np.float32], first: NDArray[np.bool_], padding: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Ordinary rows, found one by one."""
    with np.errstate(over="ignore", invalid="ignore"):
        norms = np.sqrt((x * x).sum(axis=1))
    usable = [i for i in range(len(x)) if np.isfinite(norms[i]) and not first[i] and not padding[i]]
    threshold = summarise(x[usable]).statistics.sink_threshold(3.0)
    return np.isin(np.arange(len(x)), [i for i in usable if norms[i] < threshold])


@pytest.mark.parametrize("order", ["as it comes", "large rows first", "small rows first"])
def test_only_ordinary_rows_count(order: str) -> None:
    x, first, padding = rows_of_every_kind()
    if order != "as it comes":  # so that the first block says nothing of the median
        by_norm = np.argsort(np.nan_to_num(np.linalg.norm(x, axis=1)), kind="stable")
        by_norm = by_norm[::-1] if order == "large rows first" else by_norm
        x, first, padding = x[by_norm], first[by_norm], padding[by_norm]
    statistics, norms, ordinary = summarise(x, first=first, padding=padding)
    expected = counted(x, first, padding)
    assert (ordinary == expected).all()
    assert 0 < expected.sum() < (np.isfinite(norms) & ~first & ~padding).sum()
    kept = x[expected].astype(np.float64)
    assert statistics.count == len(kept)
    np.testing.assert_allclose(statistics.mean, kept.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(statistics.m2, ((kept - kept.mean(axis=0)) ** 2).sum(axis=0), rtol=1e-4)
    assert statistics.norm_sum == pytest.approx(np.linalg.norm(kept, axis=1).sum(), rel=1e-5)
    assert statistics.n_nan == np.isnan(x[~padding]).sum()
    assert statistics.n_inf == np.isinf(x[~padding]).sum()
    assert statistics.n_padding == padding.sum()


@pytest.mark.parametrize("multiple", [0.0, 0.5, 1.0, 2.9, 3.0, 10.0, 1e30, 1e300])
def test_sinks_counted_from_merged_statistics_are_those_counted_row_by_row(multiple: float) -> None:
    x, first, padding = rows_of_every_kind()
    parts = [summarise(x[i::3], first=first[i::3], padding=padding[i::3]) for i in range(3)]
    merged = merge(part.statistics for part in parts)
    threshold = merged.sink_threshold(multiple)
    with np.errstate(invalid="ignore"):
        norms = np.sqrt((x * x).sum(axis=1))
    assert merged.n_sinks(multiple) == ((first | ~(norms < threshold)) & ~padding).sum()
    assert sum(merged.norm_histogram.values()) + merged.n_first + merged.n_not_finite + merged.n_padding == len(x)


def test_sink_threshold_is_at_most_a_bin_above_the_multiple() -> None:
    statistics = summarise(sample()).statistics
    for multiple in (0.3, 1.0, 3.0, 777.0):
        assert multiple * statistics.median_norm < statistics.sink_threshold(multiple)
        assert statistics.sink_threshold(multiple) <= multiple * statistics.median_norm * (1 + 2**-7)


def test_rows_next_to_the_greatest_float_are_taken() -> None:
    x = np.full((10, 1), np.finfo(np.float16).max, np.float16).astype(np.float32) * 1e14
    statistics = summarise(x).statistics
    assert statistics.count == 10
    assert statistics.n_sinks(1e30) == 0


def test_statistics_without_a_row_have_no_sinks_but_those_not_finite() -> None:
    x = np.full((3, 2), np.nan, np.float32)
    statistics = summarise(x, first=np.array([True, False, False]), padding=np.array([False, False, True])).statistics
    assert (statistics.n_first, statistics.n_not_finite, statistics.n_sinks(3.0), statistics.n_nan) == (1, 1, 2, 4)
