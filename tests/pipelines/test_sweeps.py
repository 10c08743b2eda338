"""Several SAEs of one run share every batch, and come out as if each had been trained alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.config import RunConfig
from pipelines.run import Run
from pipelines.rundir import RunDir
from pipelines.train import make_job
from pipelines.train_worker import train_worker
from pipelines.training import member as member_module
from sae import Dictionary, latest_checkpoint
from storage import ActivationStore, ShuffledReader

FIRST, SECOND = "model.layers.1", "model.layers.0:input"
SAES: dict[str, dict[str, Any]] = {
    "main": {"d_sae": 64, "k": 4},
    "seed": {"d_sae": 64, "k": 4, "seed": 7},
    "wide": {"d_sae": 96, "k": 8},
    "dense": {"architecture": "standard", "d_sae": 48, "l1_coefficient": 0.5},
    "other_hook": {"architecture": "topk", "d_sae": 64, "k": 4, "hook": SECOND},
    "across": {"architecture": "transcoder", "d_sae": 64, "k": 4, "hook": FIRST, "target_hook": SECOND},
}
N_STEPS = 8


@pytest.fixture(autouse=True)
def _threads() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def configured(collected: Run, saes: dict[str, dict[str, Any]] = SAES) -> RunConfig:
    raw = collected.config.model_dump(mode="json")
    raw["saes"] = saes
    raw["train"] |= {"n_tokens": N_STEPS * 256, "checkpoint_every": 3, "normalize": "centre_scale", "evaluate_every": 4}
    raw["collect"]["store"] = str(collected.dir.store_path)
    return RunConfig.model_validate(raw)


def steps(run: RunDir, name: str) -> list[dict[str, Any]]:
    lines = (run.checkpoints(name) / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "time"} for line in lines]


def weights(run: RunDir, name: str) -> bytes:
    return (run.trained(name) / "sae_weights.safetensors").read_bytes()


@pytest.fixture(scope="module")
def alone(collected: Run, store: ActivationStore, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Every SAE trained in a job of its own."""
    config, run = configured(collected), RunDir(tmp_path_factory.mktemp("alone") / "run")
    for name in SAES:
        train_worker(make_job(config, run, name, store))
    return run


def same_as_alone(run: RunDir, alone: RunDir, names: Any = SAES) -> bool:
    for name in names:
        assert steps(run, name) == steps(alone, name), name
        assert weights(run, name) == weights(alone, name), name
    return True


def test_saes_of_one_job_equal_those_trained_alone_bit_for_bit(
    collected: Run, store: ActivationStore, alone: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    original = ShuffledReader.__init__

    def counting(self: ShuffledReader, store: ActivationStore, hook: str, **settings: Any) -> None:
        opened.append((hook, settings["sink_hook"]))
        original(self, store, hook, **settings)

    monkeypatch.setattr(ShuffledReader, "__init__", counting)
    run = RunDir(tmp_path / "run")
    figures = train_worker(make_job(configured(collected), run, list(SAES), store))
    assert opened == [(FIRST, FIRST), (SECOND, SECOND), (SECOND, FIRST)], "one reader for each hook and its sinks"
    assert same_as_alone(run, alone)
    assert {name: last["step"] for name, last in figures.items()} == dict.fromkeys(SAES, N_STEPS)
    assert weights(run, "main") != weights(run, "seed")
    assert Dictionary.load(run.trained("seed")).provenance["seed_of_weights"] == 7


class Crash(BaseException):
    """Ends a worker as a kill would: nothing of it runs afterwards."""


@pytest.mark.parametrize("crash_at", [2, 8])
def test_job_killed_between_two_saves_goes_on_as_if_nothing_had_happened(
    crash_at: int,
    collected: Run,
    store: ActivationStore,
    alone: RunDir,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = RunDir(tmp_path / "run")
    names = ["main", "dense", "other_hook", "across"]
    original, saves = member_module.save_checkpoint, 0

    def crashing(*arguments: Any, **settings: Any) -> None:
        nonlocal saves
        saves += 1
        if saves == crash_at:
            raise Crash
        original(*arguments, **settings)

    monkeypatch.setattr(member_module, "save_checkpoint", crashing)
    with pytest.raises(Crash):
        train_worker(make_job(configured(collected), run, names, store))
    found = {path.name for name in names if (path := latest_checkpoint(run.checkpoints(name))) is not None}
    assert found == ({"step-00000003"} if crash_at == 2 else {"step-00000003", "step-00000006"})
    train_worker(make_job(configured(collected), run, names, store))
    assert same_as_alone(run, alone, names)


def test_sae_that_diverges_is_named_and_the_others_are_finished(
    collected: Run, store: ActivationStore, alone: RunDir, tmp_path: Path
) -> None:
    saes = {
        "main": SAES["main"],
        "wild": {"architecture": "jumprelu", "d_sae": 64, "sparsity_coefficient": 3e38},
        "wide": SAES["wide"],
    }
    config, run = configured(collected, saes), RunDir(tmp_path / "run")
    with pytest.raises(ValueError, match=r"^wild: The loss must be finite, got \w+ at step \d .*checkpoint") as raised:
        train_worker(make_job(config, run, list(saes), store))
    assert "main" not in str(raised.value)
    assert same_as_alone(run, alone, ["main", "wide"])
    assert not run.trained("wild").exists()


def test_finished_saes_are_not_trained_again(collected: Run, store: ActivationStore, alone: RunDir) -> None:
    job = make_job(configured(collected), alone, list(SAES), store)
    before = {path: path.stat().st_mtime_ns for path in alone.path.rglob("step-*/*")}
    assert train_worker(job)["main"]["step"] == N_STEPS
    assert {path: path.stat().st_mtime_ns for path in alone.path.rglob("step-*/*")} == before
