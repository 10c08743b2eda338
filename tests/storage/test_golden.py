"""Stores of past format versions stay readable.

The golden ones were made by `example_store.build` and `build_latents` below, when the version was new.
"""

from pathlib import Path

import example_store
import numpy as np
import pytest
import zarr

from storage import ActivationStore, LatentStore, LatentWriter, verify

GOLDEN = Path(__file__).parent / "golden"
VERSIONS = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
FINGERPRINTS = {"v1": "938c90491633e9075cdee4064ddf79e142fff4d3bbd1ac9e7b012265aa63c1c9"}


def build_latents(path: Path) -> None:
    writer = LatentWriter.create(path, {"d_sae": 5, "n_shards": 2, "n_rows": 20, "fingerprint": "golden"})
    for shard in writer.missing():
        rows = np.arange(10) + 10 * shard
        writer.write_shard(shard, rows, rows % 4, rows.astype(np.float32) + 1)
    writer.seal()


def test_there_is_a_store_of_every_version() -> None:
    assert list(FINGERPRINTS) == VERSIONS


@pytest.mark.parametrize("version", VERSIONS)
def test_activation_store_reads_as_on_the_day_it_was_written(version: str) -> None:
    path = GOLDEN / version / "activations"
    assert verify(path) == []
    store = ActivationStore.open(path)
    assert store.spec.fingerprint == FINGERPRINTS[version]
    values, tables = example_store.activations(store.spec), example_store.tables(store.spec)
    for hook in (example_store.WIDE, example_store.NARROW):
        assert (store.activations_numpy(hook, 0, 10) == values[hook]).all()
    assert (store.tokens == tables["tokens"]).all()
    assert (store.position == tables["position"]).all()
    assert store.sidecar("documents.parquet") == b"opaque"
    assert store.statistics(example_store.WIDE).count == 80
    assert store.statistics(example_store.WIDE).median_norm == pytest.approx(10.8, rel=0.05)
    group = zarr.open_group(str(path / "data.zarr"), mode="r")
    assert (group[f"hooks/{example_store.WIDE}/activations"][:] == values[example_store.WIDE].reshape(-1, 12)).all()


@pytest.mark.parametrize("version", VERSIONS)
def test_latent_store_reads_as_on_the_day_it_was_written(version: str) -> None:
    path = GOLDEN / version / "latents"
    assert verify(path) == []
    block = LatentStore.open(path).block(0, 5)
    assert block.indptr.tolist() == [0, 5, 10, 15, 20, 20]
    assert block.row[:5].tolist() == [0, 4, 8, 12, 16]
    assert (block.value == block.row + 1).all()


def test_todays_store_has_the_bytes_of_the_golden_one(built: Path) -> None:
    golden = example_store.contents(GOLDEN / VERSIONS[-1] / "activations")
    today = example_store.contents(built)
    assert today.keys() == golden.keys()
    for key in golden:
        if "/norms/c/" not in key:  # the last bit of a norm depends on the processor
            assert today[key] == golden[key], key
