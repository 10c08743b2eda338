import errno
import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path

import example_store
import numpy as np
import pytest
import torch
import zarr
from example_store import NARROW, WIDE

from storage import (
    PADDING,
    SINK,
    ActivationStore,
    ActivationWriter,
    AlreadyExistsError,
    CorruptionError,
    FormatError,
    HookSpec,
    IncompleteError,
    NotFoundError,
    SpecMismatchError,
    StoreSpec,
    verify,
)
from storage.backends import Buffer, LocalBackend

SPEC = example_store.spec()
VALUES = example_store.activations(SPEC)
TABLES = {**example_store.tables(SPEC), "tables": example_store.extra_tables(SPEC)}


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize(("start", "stop"), [(0, 10), (0, 0), (3, 5), (4, 8), (9, 10)])
def test_store_reads_back_what_was_written(built: Path, start: int, stop: int, check: bool) -> None:
    store = ActivationStore.open(built, verify=check)
    for hook in (WIDE, NARROW):
        assert (store.activations_numpy(hook, start, stop) == VALUES[hook][start:stop]).all()
    tensor = store.activations(WIDE + ":output", start, stop)
    assert tensor.dtype == torch.bfloat16
    assert tensor.shape == (stop - start, 8, 12)
    assert torch.equal(tensor.view(torch.uint16), torch.from_numpy(VALUES[WIDE][start:stop]))
    assert store.activations(NARROW, start, stop).dtype == torch.float32
    contexts, tables = store.contexts(start, stop), example_store.tables(SPEC)
    assert all((getattr(contexts, name) == tables[name][start:stop]).all() for name in tables)


def test_whole_tables_are_attributes(built: Path) -> None:
    store, tables = ActivationStore.open(built), example_store.tables(SPEC)
    assert (store.tokens == tables["tokens"]).all()
    assert (store.document == tables["document"]).all()
    assert (store.position == tables["position"]).all()
    assert store.tokens.dtype == np.int32


def test_norms_are_those_of_the_rows(built: Path) -> None:
    expected = np.linalg.norm(VALUES[NARROW], axis=2)
    np.testing.assert_allclose(ActivationStore.open(built).norms(NARROW, 0, 10), expected, rtol=1e-6)


def test_sinks_are_first_positions_and_large_norms(tmp_path: Path) -> None:
    values = {hook: array.copy() for hook, array in VALUES.items()}
    values[NARROW][5, 2] *= 1000
    writer = example_store.create(tmp_path / "s")
    for shard in writer.missing():
        start, stop = SPEC.shard_range(shard)
        writer.write_shard(shard, {hook: array[start:stop] for hook, array in values.items()})
    writer.seal()
    store = ActivationStore.open(tmp_path / "s")
    mask = store.sink_mask(NARROW, 0, 10)
    norms = np.linalg.norm(values[NARROW], axis=2)
    counted = (store.position > 0) & (TABLES["tables"]["flags"] != PADDING)
    expected = (norms > 3 * np.median(norms[counted])) | (store.position == 0)
    expected |= TABLES["tables"]["flags"] == PADDING
    assert (mask == expected).all()
    assert mask[5, 2]
    assert (store.sink_mask(NARROW, 4, 6) == expected[4:6]).all()
    assert store.sink_mask(NARROW, 0, 10, multiple=1e9).sum() == (store.position == 0).sum() + 2  # two padding tokens


def test_statistics_cover_the_ordinary_rows_of_all_shards(built: Path) -> None:
    store = ActivationStore.open(built)
    statistics = store.statistics(NARROW)
    rows = VALUES[NARROW].astype(np.float64)[~store.sink_mask(NARROW, 0, 10)]
    assert statistics.count == len(rows) == 80 - 20 - 2
    assert (statistics.n_first, statistics.n_padding) == (20, 2)
    np.testing.assert_allclose(statistics.mean, rows.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(statistics.m2, ((rows - rows.mean(axis=0)) ** 2).sum(axis=0), rtol=1e-5)


@pytest.mark.parametrize("multiple", [0.5, 1.0, 1.5, 3.0])
def test_statistics_count_the_sinks_that_the_mask_shows(built: Path, multiple: float) -> None:
    store = ActivationStore.open(built)
    for hook in (WIDE, NARROW):
        sinks = store.mask(hook, 0, 10, multiple) & SINK
        assert store.statistics(hook).n_sinks(multiple) == (sinks > 0).sum()


def test_stock_zarr_opens_the_group_without_warnings(built: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group = zarr.open_group(str(built / "data.zarr"), mode="r")
        members = dict(group.members(max_depth=None))
        wide = members[f"hooks/{WIDE}/activations"]
        assert isinstance(wide, zarr.Array)
        assert (wide[:] == VALUES[WIDE].reshape(-1, 12)).all()
        assert dict(wide.attrs) == {"hook_name": WIDE, "logical_dtype": "bfloat16"}
        assert (group["hooks/model.layers.1@input/activations"][:] == VALUES[NARROW].reshape(-1, 4)).all()
        assert (group["tokens"][:] == example_store.tables(SPEC)["tokens"]).all()
    assert group.attrs["fingerprint"] == SPEC.fingerprint


def test_sidecar_is_kept_as_it_is(built: Path) -> None:
    store = ActivationStore.open(built)
    assert store.sidecar("documents.parquet") == b"opaque"
    with pytest.raises(NotFoundError, match=r"no sidecar 'other'; it has documents.parquet"):
        store.sidecar("other")


@pytest.mark.parametrize("name", ["spec.json", "commits", "a/b", ".x", ""])
def test_sidecar_may_not_take_a_name_of_the_store(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="A sidecar must have a plain file name"):
        ActivationWriter.create(tmp_path / "s", SPEC, **TABLES, sidecars={name: b""})


def test_floats_are_rounded_to_bfloat16(tmp_path: Path) -> None:
    spec = StoreSpec(
        n_contexts=1, context_length=2, contexts_per_shard=1, n_train_contexts=1, hooks=(HookSpec("h", 3),)
    )
    writer = ActivationWriter.create(tmp_path / "s", spec, **example_store.tables(spec))
    values = np.array([[[1.0, 1.001, -3.14159], [1e-30, 65504.0, 7.0]]], np.float32)
    writer.write_shard(0, {"h:output": values})
    writer.seal()
    assert torch.equal(ActivationStore.open(tmp_path / "s").activations("h", 0, 1), torch.from_numpy(values).bfloat16())


def test_float16_is_kept_as_float16(tmp_path: Path) -> None:
    hooks = (HookSpec("h", 3, "float16"),)
    spec = StoreSpec(n_contexts=3, context_length=2, contexts_per_shard=2, n_train_contexts=1, hooks=hooks)
    values = np.random.default_rng(0).normal(size=(3, 2, 3)).astype(np.float16)
    writer = ActivationWriter.create(tmp_path / "s", spec, **example_store.tables(spec))
    for shard in writer.missing():
        writer.write_shard(shard, {"h": values[2 * shard : 2 * shard + 2]})
    writer.seal()
    assert (ActivationStore.open(tmp_path / "s").activations("h", 0, 3).numpy() == values).all()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_bits_of_bfloat16_are_stored_in_another_type(tmp_path: Path, dtype: str) -> None:
    hooks = (HookSpec("h", 12, dtype),)  # type: ignore[arg-type]
    spec = StoreSpec(n_contexts=10, context_length=8, contexts_per_shard=10, n_train_contexts=8, hooks=hooks)
    writer = ActivationWriter.create(tmp_path / "s", spec, **example_store.tables(spec))
    given = VALUES[WIDE].copy()
    given[0, 0, 0] = 0x7F00  # 1.7e38
    writer.write_shard(0, {"h": given})
    writer.seal()
    store = ActivationStore.open(tmp_path / "s")
    expected = torch.from_numpy(given).view(torch.bfloat16).to(getattr(torch, dtype))
    assert torch.equal(store.activations("h", 0, 10), expected)
    assert store.statistics("h").n_inf == (dtype == "float16")


def test_creating_again_opens_the_same_store(built: Path) -> None:
    assert example_store.create(built).missing() == []


def test_create_takes_an_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    assert example_store.create(tmp_path / "s").missing() == [0, 1, 2]


def test_create_refuses_a_store_of_other_settings(built: Path) -> None:
    with pytest.raises(SpecMismatchError, match=r"provenance.seed: store 0, asked for 1\. Use those settings"):
        example_store.create(built, example_store.spec(seed=1))


def test_create_refuses_other_tokens_under_the_same_settings(built: Path) -> None:
    tables = example_store.tables(SPEC)
    tables["tokens"][3, 3] += 1
    with pytest.raises(SpecMismatchError, match="same settings but other tokens"):
        ActivationWriter.create(built, SPEC, **tables, tables=example_store.extra_tables(SPEC))


@pytest.mark.parametrize("as_file", [True, False])
def test_create_refuses_what_is_not_a_store(tmp_path: Path, as_file: bool) -> None:
    path = tmp_path / "s"
    if as_file:
        path.write_text("mine")
    else:
        path.mkdir()
        (path / "mine").write_text("mine")
    with pytest.raises(AlreadyExistsError, match="something else stands there"):
        example_store.create(path)
    assert [file.name for file in tmp_path.iterdir()] == ["s"]


def test_create_refuses_tables_of_another_shape_or_type(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokens must hold integers of shape \(10, 8\), got int64 of shape \(9, 8\)"):
        ActivationWriter.create(tmp_path / "s", SPEC, **{**TABLES, "tokens": TABLES["tokens"][:9]})
    with pytest.raises(ValueError, match=r"position must lie in \[0, 2147483647\], got values in \[-1"):
        ActivationWriter.create(tmp_path / "s", SPEC, **{**TABLES, "position": TABLES["position"] - 1})
    assert not list(tmp_path.iterdir())


def test_write_shard_lists_all_that_does_not_fit(tmp_path: Path) -> None:
    writer = example_store.create(tmp_path / "s")
    with pytest.raises(ValueError, match=r"must have shape \(4, 8, 12\), got \(3, 8, 12\); hook .* is absent"):
        writer.write_shard(0, {WIDE: VALUES[WIDE][:3]})
    with pytest.raises(ValueError, match="must hold floats or the bits of bfloat16, got int64"):
        writer.write_shard(0, {WIDE: VALUES[WIDE][:4], NARROW: np.ones((4, 8, 4), np.int64)})
    with pytest.raises(ValueError, match="no hook 'x'; it holds"):
        writer.write_shard(0, {"x": VALUES[WIDE]})
    assert writer.missing() == [0, 1, 2]


def test_writing_a_shard_again_keeps_the_first_bytes(tmp_path: Path) -> None:
    writer = example_store.create(tmp_path / "s")
    first = writer.write_shard(2, {hook: array[8:] for hook, array in VALUES.items()}, info={"host": "a"})
    again = writer.write_shard(2, {hook: array[:2] for hook, array in VALUES.items()})
    assert first.written
    assert not again.written
    assert (first.shard, first.n_tokens) == (2, 16)
    assert first.digests == again.digests
    assert first.bytes == sum((tmp_path / "s" / key).stat().st_size for key in first.digests)
    assert writer.missing() == [0, 1]


def test_sealing_a_store_with_holes_lists_them(tmp_path: Path) -> None:
    writer = example_store.create(tmp_path / "s")
    writer.write_shard(1, {hook: array[4:8] for hook, array in VALUES.items()})
    with pytest.raises(IncompleteError, match=r"2 are missing \(0, 2\)"):
        writer.seal()


def test_unsealed_store_is_not_opened(tmp_path: Path) -> None:
    writer = example_store.create(tmp_path / "s")
    with pytest.raises(IncompleteError, match=r"3 are missing \(0, 1, 2\)\. Run the stage"):
        ActivationStore.open(tmp_path / "s")
    example_store.fill(writer)
    with pytest.raises(IncompleteError, match="has all of its shards but is not sealed"):
        ActivationStore.open(tmp_path / "s")


def test_tail_reads_what_is_committed_so_far(tmp_path: Path) -> None:
    writer = example_store.create(tmp_path / "s")
    writer.write_shard(1, {hook: array[4:8] for hook, array in VALUES.items()})
    store = ActivationStore.open(tmp_path / "s", tail=True)
    assert (store.activations_numpy(WIDE, 4, 8) == VALUES[WIDE][4:8]).all()
    assert store.statistics(WIDE).count == 32 - 8 - 1  # without first tokens and padding
    with pytest.raises(IncompleteError, match="does not hold shard 2 yet"):
        store.activations(WIDE, 7, 9)


def test_missing_store_is_named(tmp_path: Path) -> None:
    for opener in (ActivationStore.open, ActivationWriter.open):
        with pytest.raises(NotFoundError, match=r"must be an activation store at .*nothing, but it has no spec.json"):
            opener(tmp_path / "nothing")


def test_store_of_a_newer_version_is_refused(damaged: Path) -> None:
    spec = (damaged / "spec.json").read_text()
    (damaged / "spec.json").write_text(spec.replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(FormatError, match=r"spec.json says 2: upgrade this package"):
        ActivationStore.open(damaged)


def test_edited_spec_is_noticed(damaged: Path) -> None:
    spec = (damaged / "spec.json").read_text()
    (damaged / "spec.json").write_text(spec.replace('"n_train_contexts": 8', '"n_train_contexts": 9'))
    with pytest.raises(CorruptionError, match=r"tables.json belongs to the store .* one of the two was changed"):
        ActivationStore.open(damaged)


def test_ranges_and_hooks_outside_of_the_store_are_refused(built: Path) -> None:
    store = ActivationStore.open(built)
    for start, stop in [(-1, 2), (0, 11), (3, 2)]:
        with pytest.raises(ValueError, match=r"Contexts must lie in \[0, 10\], got"):
            store.activations(WIDE, start, stop)
    with pytest.raises(ValueError, match=r"no hook 'model.layers.9'; it holds model.layers.8, model.layers.1:input"):
        store.norms("model.layers.9", 0, 1)


SHARD_FILES = [f"hooks/{WIDE}/activations/c/1/0", f"hooks/{WIDE}/norms/c/1"]


def read_everything(path: Path) -> None:
    store = ActivationStore.open(path)
    for table in store.spec.table_dtypes:
        store.table(table, 0, 10)
    for hook in (WIDE, NARROW):
        store.activations(hook, 0, 10)
        store.norms(hook, 0, 10)


@pytest.mark.parametrize("file", SHARD_FILES)
def test_reader_rejects_truncated_shard(damaged: Path, file: str) -> None:
    path = damaged / "data.zarr" / file
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        CorruptionError, match=rf"{file} \(shard 1\): the file must have .* bytes, but it has .*sae verify .* --repair"
    ):
        read_everything(damaged)


@pytest.mark.parametrize("file", SHARD_FILES)
def test_reader_rejects_missing_shard(damaged: Path, file: str) -> None:
    (damaged / "data.zarr" / file).unlink()
    with pytest.raises(CorruptionError, match=rf"{file} \(shard 1\): the file must exist, but it is missing"):
        read_everything(damaged)


def test_reader_rejects_any_flipped_bit(damaged: Path) -> None:
    rng = np.random.default_rng(0)
    for path in sorted((damaged / "data.zarr").rglob("c/**/*")):
        if path.is_dir():
            continue
        good = path.read_bytes()
        for place in {0, len(good) - 1, *rng.integers(0, len(good), 5).tolist()}:
            bad = bytearray(good)
            bad[place] ^= 1 << int(rng.integers(8))
            path.write_bytes(bad)
            with pytest.raises(CorruptionError, match=r"does not|checksum|the index says"):
                read_everything(damaged)
        path.write_bytes(good)
    read_everything(damaged)


def test_damaged_table_is_named_without_a_shard(damaged: Path) -> None:
    path = damaged / "data.zarr/tokens/c/0/0"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    with pytest.raises(CorruptionError, match=r"tokens/c/0/0 \(file 0\): chunk 0 must match .*make the store anew"):
        ActivationStore.open(damaged).contexts(0, 1)


def test_discarded_shard_is_written_again(damaged: Path) -> None:
    (damaged / "data.zarr" / SHARD_FILES[0]).unlink()
    writer = ActivationWriter.open(damaged)
    writer.discard(1)
    assert writer.missing() == [1]
    with pytest.raises(IncompleteError, match=r"1 are missing \(1\)"):
        ActivationStore.open(damaged)
    example_store.build(damaged)
    read_everything(damaged)
    assert verify(damaged) == []


def test_sealing_notices_a_lost_shard(damaged: Path) -> None:
    (damaged / "seal.json").unlink()
    (damaged / "data.zarr" / SHARD_FILES[0]).unlink()
    with pytest.raises(CorruptionError, match=r"\(shard 1\) must have [\d,]+ bytes, but it is missing"):
        ActivationWriter.open(damaged).seal()


def test_full_disk_leaves_nothing_behind_and_the_shard_missing(tmp_path: Path) -> None:
    class FullDisk(LocalBackend):
        full = False

        def write(self, key: str, buffers: Iterable[Buffer]) -> None:
            super().write(key, buffers)
            if self.full and "/001" in key:
                raise OSError(errno.ENOSPC, "No space left on device")

    backend = FullDisk(tmp_path / "s")
    writer = example_store.create(tmp_path / "s", backend=backend)
    backend.full = True
    with pytest.raises(OSError, match="No space left"):
        example_store.fill(writer)
    assert [file.name for file in (tmp_path / "s/staging").iterdir()] == [".keep"]
    assert writer.missing() == [0, 1, 2]
    backend.full = False
    example_store.build(tmp_path / "s")


def test_a_copied_store_is_the_same_store(built: Path, tmp_path: Path) -> None:
    shutil.copytree(built, tmp_path / "copy")
    read_everything(tmp_path / "copy")
    assert verify(tmp_path / "copy") == []
