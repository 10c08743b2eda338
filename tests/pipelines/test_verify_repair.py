"""`sae verify --repair`, and the collect that follows it; the harvesters work in this process instead of in Ray."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from command_line import sae_here, sentence, shard_digests

from pipelines import collect
from pipelines.cluster import local
from pipelines.run import STAGES, Run, save_config
from pipelines.rundir import RunDir
from storage import LatentWriter, verify


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def shard_file(store: Path, shard: int) -> Path:
    return store / f"data.zarr/hooks/model.layers.1/activations/c/{shard}/0"


@pytest.fixture
def run(collected: Run, tmp_path: Path) -> Run:
    """A copy of the collected run whose stages all count as finished."""
    shutil.copytree(collected.dir.path, tmp_path / "run")
    run = Run(collected.config, RunDir(tmp_path / "run"))
    save_config(run)
    for stage in STAGES:
        run.dir.mark_finished(stage, run.keys[stage], 1.0, [run.dir.store_path / "seal.json"][: stage == "collect"])
    return run


@pytest.fixture
def harvested(monkeypatch, resolved) -> list[int]:
    """Shards that were harvested, in this process."""
    shards: list[int] = []

    def harvest_all(config, path, resolved, missing):
        harvester = collect.Harvester(path, resolved, config.model, config.collect.batch_contexts, n_threads=1)
        for shard in missing:
            shards.append(shard)
            yield harvester.harvest(shard)

    monkeypatch.setattr(collect, "_harvest_all", harvest_all)
    monkeypatch.setattr(local, "start_ray", lambda _: pytest.fail("Ray is not needed"))
    return shards


def finished(run: Run) -> dict[str, bool]:
    return {stage: run.finished(stage) for stage in STAGES}


def test_damaged_shards_are_discarded_and_collected_again_to_the_same_bytes(run, harvested):
    store = run.dir.store_path
    before, whole = shard_digests(store), shard_file(store, 1).read_bytes()
    flip_a_byte(shard_file(store, 1))
    shard_file(store, 3).write_bytes(shard_file(store, 3).read_bytes()[:-1])
    told = sae_here("verify", store)
    assert told.returncode == 1
    assert f"{store}: 2 problems" in told.stdout
    assert f"`sae verify {store} --repair` discards the damaged shards" in told.stdout
    assert finished(run) == dict.fromkeys(STAGES, True)  # looking changes nothing

    told = sae_here("verify", store, "--repair")
    assert told.returncode == 1
    assert "activations/c/1/0: the bytes are not those that were committed" in told.stdout
    assert f"discarded shards 1, 3; run `sae collect {run.dir.path}` to redo them" in told.stdout
    assert finished(run) == dict.fromkeys(STAGES, True) | {"collect": False}
    again = sae_here("verify", store, "--repair")
    assert again.returncode == 1
    assert f"unfinished, with nothing to discard; run `sae collect {run.dir.path}`" in again.stdout

    told = sae_here("collect", run.dir.path)
    assert told.returncode == 0, told.stderr
    assert harvested == [1, 3]
    assert shard_digests(store) == before
    assert shard_file(store, 1).read_bytes() == whole
    assert verify(store) == []
    assert finished(run) == dict.fromkeys(STAGES, True)
    for arguments in (["verify", store, "--repair"], ["verify", store]):
        told = sae_here(*arguments)
        assert (told.returncode, "every file is as it was committed" in told.stdout) == (0, True)


def test_what_belongs_to_no_shard_cannot_be_repaired(run):
    store = run.dir.store_path
    table = next((store / "data.zarr/tokens/c").rglob("0"))
    table = table if table.is_file() else table / "0"
    flip_a_byte(table)
    flip_a_byte(shard_file(store, 1))
    before = shard_digests(store)
    told = sae_here("verify", store, "--repair")
    assert told.returncode == 1
    assert f"nothing discarded, because {table.relative_to(store)} cannot be repaired" in told.stdout
    assert f"delete {store} and run `sae collect {run.dir.path}`" in told.stdout
    assert shard_digests(store) == before
    assert (store / "seal.json").exists()
    record = json.loads(sae_here("verify", store, "--repair", "--json").stdout)
    assert [problem["file"] for problem in record["irreparable"]] == [str(table.relative_to(store))]
    assert record["discarded"] == []


def test_damaged_seal_is_withdrawn_and_set_again(run, harvested):
    store = run.dir.store_path
    (store / "seal.json").write_text("{")
    assert sae_here("verify", store, "--repair").returncode == 1
    assert not run.finished("collect")
    assert sae_here("collect", run.dir.path).returncode == 0
    assert harvested == []
    assert verify(store) == []


def test_store_of_a_run_under_way_is_left_alone(run):
    flip_a_byte(shard_file(run.dir.store_path, 1))
    with run.dir.lock():
        told = sentence(sae_here("verify", run.dir.store_path, "--repair"), 1)
    assert "another process is working in" in told
    assert run.finished("collect")


def test_latent_store_is_verified_and_its_damaged_pieces_are_for_label_to_redo(run):
    path = run.dir.latents("main")
    meta = {"d_sae": 4, "n_shards": 2, "n_rows": 8, "fingerprint": "0", "dictionary": "1"}
    writer = LatentWriter.create(path, meta)

    def write(shard: int) -> None:
        rows = np.arange(4) + 4 * shard
        writer.write_shard(shard, rows, np.arange(4), np.ones(4, np.float32))

    write(0)
    write(1)
    writer.seal()
    for arguments in ([], ["--repair"]):
        assert "every file is as it was committed" in sae_here("verify", path, *arguments).stdout
    assert run.finished("label")
    told = json.loads(sae_here("info", path, "--json").stdout)
    assert (told["kind"], told["shards"], told["sealed"], told["active latents"]) == ("latent store", "2 of 2", True, 8)
    flip_a_byte(path / "pieces/000001/value.npy")
    told = sae_here("verify", path)
    assert told.returncode == 1
    assert "pieces/000001/value.npy: " in told.stdout
    told = sae_here("verify", path, "--repair")
    assert told.returncode == 1
    assert f"discarded shards 1; run `sae label {run.dir.path}` to redo them" in told.stdout
    assert finished(run) == dict.fromkeys(STAGES, True) | {"label": False}
    assert writer.missing() == [1]
    write(1)
    writer.seal()
    assert verify(path) == []
