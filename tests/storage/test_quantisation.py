from pathlib import Path

import example_store
import numpy as np
import pytest
import torch
import zarr
from example_store import DEEP, NARROW, WIDE
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from storage import ActivationStore, ActivationWriter, HookSpec, StoreSpec
from storage.encoding import to_bfloat16_bits, to_float32
from storage.quantisation import dequantise, quantise

SPEC = example_store.coded_spec()
VALUES = example_store.activations(SPEC)


def test_levels_are_those_computed_by_hand() -> None:
    rows = np.array([[127, -127, 1.5, 2.5, 0.4], [0, 0, 0, 0, 0], [-254, 1, 3, 5, 0]], np.float32)
    quantised = quantise(rows, "float32")
    assert quantised.scales.tolist() == [1, 0, 2]
    # halves go to even: 1.5 and 2.5 to 2; 0.5 to 0, 1.5 to 2, 2.5 to 2
    assert quantised.values.tolist() == [[127, -127, 2, 2, 0], [0] * 5, [-127, 0, 2, 2, 0]]
    assert quantised.squared_error.tolist() == pytest.approx([0.25 + 0.25 + 0.16, 0, 1 + 1 + 1])
    assert quantised.squared_sum.tolist() == pytest.approx([2 * 127**2 + 2.25 + 6.25 + 0.16, 0, 254**2 + 35])


def test_row_that_is_not_finite_reads_as_nan_and_costs_nothing() -> None:
    rows = np.array([[1, 2], [np.nan, 5], [3, np.inf], [-np.inf, 3]], np.float32)
    quantised = quantise(rows, "float32")
    assert np.isnan(quantised.scales).tolist() == [False, True, True, True]
    read = dequantise(quantised.values, quantised.scales, "float32")
    assert np.isnan(read[1:]).all()
    assert np.isfinite(read[0]).all()
    assert quantised.squared_sum[1:].tolist() == [0, 0, 0]
    assert np.isnan(to_float32(dequantise(quantised.values, quantised.scales, "bfloat16"))[1:]).all()


@given(arrays(np.float32, (3, 4), elements=st.floats(-(2.0**50), 2.0**50, width=32)))
def test_error_is_at_most_half_a_level(rows: NDArray[np.float32]) -> None:
    quantised = quantise(rows, "float32")
    error = np.abs(dequantise(quantised.values, quantised.scales, "float32").astype(np.float64) - rows)
    largest = np.abs(rows).max(axis=1, keepdims=True).astype(np.float64)
    assert (error <= largest / 254 * (1 + 1e-5) + 2.0**-149 * 127).all()
    np.testing.assert_allclose(quantised.squared_error, (error**2).sum(axis=1), rtol=1e-3, atol=1e-30)


def test_extremes_of_float32_neither_overflow_nor_vanish() -> None:
    greatest = np.finfo(np.float32).max
    rows = np.array([[greatest, -greatest], [2.0**-149, 0], [1e-43, -1e-44]], np.float32)
    quantised = quantise(rows, "float32")
    read = dequantise(quantised.values, quantised.scales, "float32")
    assert np.isfinite(read).all()
    assert read[0] / greatest == pytest.approx([1, -1], abs=0.01)


def test_bfloat16_bits_are_quantised_as_their_values() -> None:
    x = np.random.default_rng(0).normal(size=(300, 8)).astype(np.float32)
    bits = to_bfloat16_bits(x)
    assert (quantise(bits, "bfloat16").values == quantise(to_float32(bits), "float32").values).all()


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize(("start", "stop"), [(0, 10), (0, 0), (3, 5), (4, 8), (9, 10)])
def test_coded_store_reads_back_what_was_written(coded: Path, start: int, stop: int, check: bool) -> None:
    store = ActivationStore.open(coded, verify=check)
    assert (store.activations_numpy(NARROW, start, stop) == VALUES[NARROW][start:stop]).all()
    for hook, dtype in ((WIDE, torch.bfloat16), (DEEP, torch.float32)):
        given_rows = VALUES[hook][start:stop].reshape(-1, 12)
        quantised = quantise(given_rows, SPEC.hook(hook).dtype)
        expected = dequantise(quantised.values, quantised.scales, SPEC.hook(hook).dtype)
        assert (store.activations_numpy(hook, start, stop).reshape(-1, 12) == expected).all()
        assert store.activations(hook, start, stop).dtype == dtype
        norms = np.linalg.norm(to_float32(expected), axis=1)
        np.testing.assert_allclose(store.norms(hook, start, stop).ravel(), norms, rtol=1e-6)
        out = np.empty((stop - start, 8, 12), SPEC.hook(hook).element_type)
        store.activations_numpy(hook, start, stop, out=out)
        assert (out.reshape(-1, 12) == expected).all()


def test_contexts_of_a_compressed_chunk_may_be_read_in_any_order(coded: Path) -> None:
    store = ActivationStore.open(coded)
    for context in np.random.default_rng(0).permutation(np.repeat(np.arange(10), 3)):
        assert (store.activations_numpy(NARROW, context, context + 1) == VALUES[NARROW][context : context + 1]).all()


def test_stock_zarr_opens_values_and_scales(coded: Path) -> None:
    group = zarr.open_group(str(coded / "data.zarr"), mode="r")
    store = ActivationStore.open(coded)
    for hook in (WIDE, DEEP):
        values, scales = group[f"hooks/{hook}/activations"], group[f"hooks/{hook}/scales"]
        assert values.dtype == np.int8
        assert dict(values.attrs)["quantisation"] == "int8"
        expected = store.activations(hook, 0, 10).float().numpy().reshape(-1, 12)
        np.testing.assert_allclose(values[:] * scales[:][:, None], expected, rtol=2**-8)
    assert (group["hooks/model.layers.1@input/activations"][:] == VALUES[NARROW].reshape(-1, 4)).all()


def test_error_in_the_statistics_is_that_of_the_rows_read(coded: Path) -> None:
    store = ActivationStore.open(coded)
    for hook in (WIDE, DEEP):
        ordinary = ~store.sink_mask(hook, 0, 10)
        given_rows = VALUES[hook] if hook == DEEP else to_float32(VALUES[hook])
        x = given_rows[ordinary].astype(np.float64)
        read = store.activations(hook, 0, 10).float().numpy()[ordinary].astype(np.float64)
        statistics = store.statistics(hook)
        assert statistics.count == len(x)
        assert statistics.squared_error == pytest.approx(((read - x) ** 2).sum(), rel=1e-4)
        assert statistics.squared_sum == pytest.approx((x**2).sum(), rel=1e-5)
        assert 0 < statistics.relative_error < 1e-4
    assert store.statistics(NARROW).relative_error == 0


def test_elements_that_are_not_finite_are_counted_as_given(tmp_path: Path) -> None:
    spec = StoreSpec(
        n_contexts=1,
        context_length=4,
        contexts_per_shard=1,
        n_train_contexts=1,
        hooks=(HookSpec("h", 3, "float32", quantisation="int8"),),
    )
    writer = ActivationWriter.create(tmp_path / "s", spec, **example_store.tables(spec))
    writer.write_shard(0, {"h": np.array([[[1, 2, 3], [np.nan, 1, np.inf], [0, 1, 0], [-np.inf, 1, 1]]], np.float32)})
    writer.seal()
    store = ActivationStore.open(tmp_path / "s")
    statistics = store.statistics("h")
    assert (statistics.n_nan, statistics.n_inf, statistics.n_not_finite) == (1, 2, 2)
    assert np.isnan(store.activations_numpy("h", 0, 1)[0, [1, 3]]).all()
    assert store.sink_mask("h", 0, 1)[0, [1, 3]].all()


def test_ratio_is_that_of_the_files(coded: Path) -> None:
    store = ActivationStore.open(coded)
    for hook, itemsize in ((WIDE, 2), (DEEP, 4)):
        files = [
            *coded.glob(f"data.zarr/hooks/{hook}/activations/c/*/*"),
            *coded.glob(f"data.zarr/hooks/{hook}/scales/c/*"),
        ]
        assert len(files) == 6
        expected = 80 * 12 * itemsize / sum(file.stat().st_size for file in files)
        assert store.compression_ratio(hook) == pytest.approx(expected)


def test_settings_of_a_hook_are_checked() -> None:
    with pytest.raises(ValueError, match="quantisation of hook 'h' must be one of none, int8; got 'int4'"):
        HookSpec("h", 1, quantisation="int4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="compression of hook 'h' must be one of none, blosc; got 'gzip'"):
        HookSpec("h", 1, compression="gzip")  # type: ignore[arg-type]
