"""Checksums that a second thread tests while large chunks are copied: as strict as those tested before the copy."""

import multiprocessing
from pathlib import Path

import numpy as np
import pytest

from storage import ActivationStore, ActivationWriter, CorruptionError, HookSpec, StoreSpec
from storage.layout import activations_array
from storage.rows import WORTH_A_THREAD

HOOK = "model.layers.0"


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> tuple[Path, np.ndarray]:
    """One shard of three chunks, each worth a thread, and its values."""
    path = tmp_path_factory.mktemp("wide") / "activations"
    spec = StoreSpec(
        n_contexts=24,
        context_length=64,
        contexts_per_shard=24,
        n_train_contexts=12,
        hooks=(HookSpec(HOOK, 2048, "float16"),),
        provenance={},
    )
    array = activations_array(spec, spec.hooks[0])
    assert array.slots_per_file == 3
    assert array.chunk_bytes >= WORTH_A_THREAD
    table = np.zeros((24, 64), np.int64)
    writer = ActivationWriter.create(path, spec, tokens=table, document=table, position=table)
    values = np.random.default_rng(0).normal(size=(24, 64, 2048)).astype(np.float16)
    writer.write_shard(0, {HOOK: values})
    writer.seal()
    return path, values


def test_what_is_read_is_what_was_written(wide):
    path, values = wide
    for verify in (True, False):
        store = ActivationStore.open(path, verify=verify)
        for _ in range(2):
            np.testing.assert_array_equal(store.activations_numpy(HOOK, 0, 24), values)
            np.testing.assert_array_equal(store.activations_numpy(HOOK, 5, 19), values[5:19])


@pytest.mark.parametrize("chunk", [0, 1, 2])
@pytest.mark.parametrize("contexts", [(0, 24), (0, 8), (8, 16), (16, 24), (7, 9), (15, 17)], ids=str)
def test_changed_byte_is_found_by_every_read_that_touches_its_chunk(wide, tmp_path, chunk, contexts):
    path, values = wide
    spec = ActivationStore.open(path).spec
    array = activations_array(spec, spec.hooks[0])
    file = path / array.file_key(0)
    kept = file.read_bytes()
    data = bytearray(kept)
    data[chunk * array.stored_chunk_bytes + 12_345] ^= 1
    file.unlink()
    file.write_bytes(data)
    try:
        store = ActivationStore.open(path)
        start, stop = contexts
        if start < 8 * (chunk + 1) and stop > 8 * chunk:
            for _ in range(2):
                with pytest.raises(CorruptionError, match=rf"\(shard 0\): chunk {chunk} must match its checksum"):
                    store.activations_numpy(HOOK, start, stop)
        else:
            np.testing.assert_array_equal(store.activations_numpy(HOOK, start, stop), values[start:stop])
    finally:
        file.unlink()
        file.write_bytes(kept)


def test_forked_child_tests_checksums_too(wide):
    """A child has the parent's objects, but not its threads."""
    path, values = wide
    ActivationStore.open(path).activations_numpy(HOOK, 0, 24)
    process = multiprocessing.get_context("fork").Process(target=read_all, args=(path, values))
    process.start()
    process.join(60)
    assert process.exitcode == 0


def read_all(path: Path, values: np.ndarray) -> None:
    np.testing.assert_array_equal(ActivationStore.open(path).activations_numpy(HOOK, 0, 24), values)
