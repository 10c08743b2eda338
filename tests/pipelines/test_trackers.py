"""Trackers get the figures of metrics.jsonl, keep their run over a preemption, and cannot harm training."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.config import RunConfig
from pipelines.errors import UsageError
from pipelines.run import Run
from pipelines.rundir import RunDir
from pipelines.train import check_settings, make_job
from pipelines.train_worker import train_worker
from pipelines.training import trackers
from pipelines.training.interruption import Interrupted
from pipelines.training.trackers import Trackers, recorded
from storage import ActivationStore

HOOKS = {"model.layers.1": 32, "model.layers.0:input": 32}


def configured(collected: Run, *names: str) -> RunConfig:
    raw = collected.config.model_dump(mode="json")
    raw["saes"] = {"main": {"d_sae": 48, "k": 4}}
    raw["train"] |= {"n_tokens": 6 * 256, "checkpoint_every": 100, "evaluate_every": 3, "trackers": list(names)}
    raw["collect"]["store"] = str(collected.dir.store_path)
    return RunConfig.model_validate(raw)


def train_with_a_break(config: RunConfig, run: RunDir, store: ActivationStore) -> list[dict[str, Any]]:
    """Training that is interrupted after step 4 and goes on; returns the lines of metrics.jsonl."""
    threads, asked = torch.get_num_threads(), iter([False, False, False, True])
    try:
        with pytest.raises(Interrupted):
            train_worker(make_job(config, run, "main", store), interrupted=lambda: next(asked))
        train_worker(make_job(config, run, "main", store))
    finally:
        torch.set_num_threads(threads)
    lines = (run.checkpoints("main") / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "time"} for line in lines]


def test_tensorboard_has_every_figure_once(collected: Run, store: ActivationStore, tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import RecordWriter  # noqa: F401 - the format that is read below

    run = RunDir(tmp_path / "run")
    lines = train_with_a_break(configured(collected, "tensorboard"), run, store)
    found: dict[str, list[tuple[int, float]]] = {}
    for file in sorted((run.checkpoints("main") / "tensorboard").iterdir()):
        data, at = file.read_bytes(), 0
        while at < len(data):  # length, its checksum, the event, its checksum
            length = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    assert [step for step, _ in found["loss"]] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in found["heldout_fvu"]] == [3, 6]
    for name in ("loss", "l0", "batch_fvu", "lr", "n_tokens"):
        assert [value for _, value in found[name]] == pytest.approx([line[name] for line in lines]), name
    assert "step" not in found


def test_mlflow_run_survives_a_preemption(collected: Run, store: ActivationStore, tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    run = RunDir(tmp_path / "run")
    lines = train_with_a_break(configured(collected, "mlflow"), run, store)
    folder = run.checkpoints("main")
    client = mlflow.MlflowClient((folder / "mlruns").as_uri())
    identity = recorded(folder)["ids"]["mlflow"]
    history = client.get_metric_history(identity, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(line["step"], line["loss"]) for line in lines]
    told = client.get_run(identity)
    assert (told.info.status, told.info.run_name) == ("FINISHED", "tiny/main")
    assert told.data.params["d_sae"] == "48"
    assert not client.list_artifacts(identity)


def test_wandb_run_is_kept_offline_and_survives_a_preemption(
    collected: Run, store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = RunDir(tmp_path / "run")
    train_with_a_break(configured(collected, "wandb"), run, store)
    folder = run.checkpoints("main")
    identity = recorded(folder)["ids"]["wandb"]
    runs = sorted((folder / "wandb").glob("offline-run-*"))
    assert len(runs) == 2
    assert all(path.name.endswith(identity) for path in runs)
    assert "failed" not in recorded(folder)
    first, second = (next(path.glob("*.wandb")).read_bytes() for path in runs)
    assert b"heldout_fvu" in first + second
    assert b"W_enc" not in first + second


class Recording:
    """A tracker that keeps what it is given."""

    def __init__(self, wait_for: threading.Event | None = None, fail_at: int | None = None) -> None:
        self.lines: list[Any] = []
        self.closed = False
        self._wait_for, self._fail_at = wait_for, fail_at

    def log(self, lines: Any) -> None:
        if self._wait_for is not None:
            self._wait_for.wait()
        self.lines += lines
        if self._fail_at is not None and len(self.lines) >= self._fail_at:
            raise ConnectionError("the server is gone")

    def close(self) -> None:
        self.closed = True


def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tracker: Any) -> Trackers:
    monkeypatch.setattr(trackers, "TensorBoard", lambda *_: tracker)
    return Trackers(["tensorboard"], tmp_path, title="run/main", settings={}, step=0)


def test_tracker_gets_every_number_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recording = Recording()
    tracked = made(monkeypatch, tmp_path, recording)
    for step in range(1, 300):
        tracked.log({"step": step, "loss": step / 2, "time": "noon", "ce_loss_score": None})
    tracked.close()
    assert recording.lines == [(step, {"loss": step / 2}) for step in range(1, 300)]
    assert recording.closed


def test_tracker_that_fails_is_told_of_once_and_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracked = made(monkeypatch, tmp_path, Recording(fail_at=1))
    tracked.log({"step": 1, "loss": 1.0})
    with pytest.warns(UserWarning, match=r"the tracker tensorboard failed, .*: ConnectionError: the server is gone"):
        tracked.close()
    tracked.log({"step": 2, "loss": 1.0})  # no second warning, which would be an error here
    tracked.close()
    assert recorded(tmp_path)["failed"] == {"tensorboard": "ConnectionError: the server is gone"}
    made(monkeypatch, tmp_path, Recording()).close()
    assert "failed" not in recorded(tmp_path), "another attempt begins anew"


def test_tracker_that_hangs_does_not_hold_up_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "CLOSE_S", 0.2)
    released = threading.Event()
    tracked = made(monkeypatch, tmp_path, Recording(wait_for=released))
    tracked.log({"step": 1, "loss": 1.0})
    with pytest.warns(UserWarning, match="it did not finish within 0 s"):
        tracked.close()
    released.set()


def test_tracker_that_is_too_slow_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "_MOST_WAITING", 3)
    released = threading.Event()
    tracked = made(monkeypatch, tmp_path, Recording(wait_for=released))

    def many() -> None:
        for step in range(20):
            tracked.log({"step": step, "loss": 1.0})

    with pytest.warns(UserWarning, match="it is 3 steps behind"):
        many()
    released.set()
    tracked.close()


def test_tracker_without_its_library_is_refused_before_training(
    collected: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(trackers.MODULES, "mlflow", "no_such_library")
    with pytest.raises(
        UsageError, match=r"train\.trackers names mlflow, but no_such_library is not installed: install"
    ):
        check_settings(configured(collected, "mlflow"), HOOKS)
