"""`sae plan`: sizes that a real store then has, hours from a calibration or a finished run, and a full disk."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from command_line import must, sae_here, sentence

from pipelines import plan
from pipelines.config import RunConfig
from pipelines.plan import make_plan, recorded_rates, require_room, size_text
from pipelines.run import Run, save_config
from pipelines.rundir import RunDir
from tests.tiny import tiny_config


@pytest.fixture
def config_file(collected, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(collected.config.model_dump(mode="json")))
    return path


def bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_planned_sizes_are_those_of_the_store(collected, store, tmp_path):
    made = make_plan(collected.config, RunDir(tmp_path), calibrate=False)
    assert made.n_shards == store.spec.n_shards
    assert abs(made.n_contexts - store.spec.n_contexts) <= 2
    for hook in store.spec.hooks:
        folder = collected.dir.store_path / "data.zarr/hooks" / hook.name.replace(":", "@")
        found = bytes_below(folder) * made.n_contexts / store.spec.n_contexts
        assert made.hook_bytes[hook.name] == pytest.approx(found, rel=0.03)
    assert made.store_bytes == pytest.approx(bytes_below(collected.dir.store_path), rel=0.25)


def test_plan_without_calibration_reads_no_weights_and_no_text(config_file, tmp_path):
    raw = yaml.safe_load(config_file.read_text())
    (tmp_path / "model").mkdir()
    shutil.copy(Path(raw["model"]["source"]) / "config.json", tmp_path / "model")  # there are no weights to read
    raw["model"]["source"] = str(tmp_path / "model")
    raw["text"][0]["path"] = str(tmp_path / "no such text.jsonl")
    config_file.write_text(yaml.safe_dump(raw))
    told = json.loads(must(sae_here("plan", config_file, "--no-calibrate", "--out", tmp_path / "run", "--json")))
    assert told["n_tokens"] >= 12_000
    assert told["fits"]
    assert told["n_documents"] is None
    assert set(told["hours"].values()) == {None}
    assert not (tmp_path / "run").exists()


def test_calibrated_plan_has_documents_and_hours(config_file, store, tmp_path):
    told = json.loads(must(sae_here("plan", config_file, "--out", tmp_path / "run", "--json")))
    assert told["n_documents"] == pytest.approx(len(set(store.document.ravel().tolist())), rel=0.1)
    assert all(told["hours"][stage] > 0 for stage in ("collect", "train", "evaluate", "label"))
    assert told["hours"]["collect"] == pytest.approx(
        told["n_tokens"] / told["rates"]["forward"] / told["collect_workers"] / 3600, rel=0.01
    )
    lines = must(sae_here("plan", config_file, "--no-calibrate", "--out", tmp_path / "run"))
    assert "model.layers.1: d_in 32, 70 bytes a token" in lines
    assert "collect  unknown" in lines


def test_hours_can_come_from_a_finished_run(collected, tmp_path):
    run = Run(collected.config, RunDir(tmp_path / "like"))
    save_config(run)
    run.dir.mark_finished("collect", "key", 60.0)
    assert recorded_rates(collected.config, run.dir.path) == {"collect": 12_000 / 60}
    longer = collected.config.model_copy(
        update={"collect": collected.config.collect.model_copy(update={"n_tokens": 120_000})}
    )
    made = make_plan(longer, RunDir(tmp_path / "run"), like=run.dir.path)
    assert made.hours["collect"] == pytest.approx(10 * 60 / 3600, rel=0.01)
    assert made.hours["train"] is None


def test_shards_that_are_there_are_not_planned_again(collected, tmp_path):
    shutil.copytree(collected.dir.store_path, tmp_path / "run/activations")
    (tmp_path / "run/activations/seal.json").unlink()
    for shard in (0, 3):
        (tmp_path / f"run/activations/commits/{shard:06d}.json").unlink()
    made = make_plan(collected.config, RunDir(tmp_path / "run"), calibrate=False)
    anew = make_plan(collected.config, RunDir(tmp_path / "new"), calibrate=False)
    assert made.n_shards_done == made.n_shards - 2
    assert made.needed_bytes < anew.needed_bytes


def test_plan_that_cannot_fit_the_disk_is_refused_in_one_sentence(config_file, tmp_path):
    arguments = ("plan", config_file, "--no-calibrate", "--out", tmp_path / "run", "--set", "collect.n_tokens=1e13")
    told = sae_here(*arguments)
    message = sentence(told, 1)
    assert message.startswith("the plan does not fit: ")
    assert "lower collect.n_tokens" in message
    assert "TB" in message
    told = sae_here(*arguments, "--json")
    assert told.returncode == 1
    assert json.loads(told.stdout)["fits"] is False


def test_room_is_looked_for_on_each_disk(collected, monkeypatch, tmp_path):
    """A store on a disk of its own is held against that disk, and the rest of the run against the run's."""
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs /dev/shm on a file system of its own")
    free = shutil.disk_usage(shared).free
    per_token = make_plan(collected.config, RunDir(tmp_path), calibrate=False).store_bytes / 12_000
    collect = collected.config.collect.model_copy(
        update={"store": str(shared / "no-such-store"), "n_tokens": int(1.05 * free / per_token)}
    )
    label = collected.config.label.model_copy(update={"enabled": False})
    made = make_plan(
        collected.config.model_copy(update={"collect": collect, "label": label}), RunDir(tmp_path), calibrate=False
    )
    assert made.shortage is not None
    assert "/dev/shm" in made.shortage
    assert str(tmp_path) not in made.shortage


def test_sizes_for_people():
    assert [size_text(n) for n in (12, 12_340, 5_000_000, 2.5e9, 3e12)] == [
        "12 bytes",
        "12.3 kB",
        "5.0 MB",
        "2.5 GB",
        "3.0 TB",
    ]


def test_room_left_is_not_an_error(tiny_model, tiny_texts, tmp_path):
    config = RunConfig.model_validate(tiny_config(tiny_model, tiny_texts))
    made = plan.make_plan(config, RunDir(tmp_path), calibrate=False)
    assert made.shortage is None
    require_room(made)
