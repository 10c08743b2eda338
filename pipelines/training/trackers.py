"""Experiment trackers beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow (`train.trackers`).

One run per SAE, under the flat names of metrics.jsonl. Its id is kept beside the checkpoints, so that a preempted run
goes on in the same one. Each tracker works in a thread of its own: one that is slow or fails is told of once, and
neither stops nor slows training. Only figures and settings are sent, never weights or code; where they go, and offline
mode, is up to each library's own environment variables.
"""

import json
import os
import queue
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from pipelines.rundir import write_json

MODULES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}
"""The library behind each name in `train.trackers`."""
TRACKERS_FILE = "trackers.json"
PROJECT = "sae-pipelines"
CLOSE_S = 20.0
"""How long the end of training waits for a tracker."""
_MOST_WAITING, _MOST_AT_ONCE = 100_000, 50
_MOST_METRICS = 1000
"""That MLflow takes in one request."""

Line = tuple[int, Mapping[str, float]]
"""A step and its figures."""


class Tracker(Protocol):
    """One library; made and used in one thread."""

    def log(self, lines: Sequence[Line]) -> None:
        """Record some steps, in order."""

    def close(self) -> None:
        """Flush."""


def missing_library(name: str) -> str | None:
    """What to install before a tracker can be used; None if it is there."""
    return None if find_spec(MODULES[name]) is not None else MODULES[name]


class Trackers:
    """The trackers of one SAE.

    Args:
        folder: where ids, and files of local trackers, are kept.
        title: name of the runs; the part before the first "/" groups them.
        settings: recorded with the run.
        step: steps finished before.
    """

    def __init__(
        self, names: Sequence[str], folder: Path, *, title: str, settings: Mapping[str, Any], step: int
    ) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        make: dict[str, Callable[[], Tracker]] = {
            "tensorboard": lambda: TensorBoard(folder / "tensorboard", step),
            "wandb": lambda: WandB(folder, self._kept("wandb", lambda: uuid.uuid4().hex[:12]), title, settings),
            "mlflow": lambda: MLflow(folder, self._kept, title, settings),
        }
        if names and "failed" in (record := recorded(folder)):  # by an earlier attempt
            write_json(folder / TRACKERS_FILE, {key: value for key, value in record.items() if key != "failed"})
        self._threads = {name: _Background(name, make[name]) for name in dict.fromkeys(names)}

    def log(self, figures: Mapping[str, Any]) -> None:
        """Hand on a line of metrics.jsonl; returns at once."""
        numbers = {
            name: float(value)
            for name, value in figures.items()
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
        }
        for thread in self._threads.values():
            thread.put((int(figures["step"]), numbers))
        self._drop_failed()

    def close(self) -> None:
        """Let each tracker finish, for a while."""
        deadline = time.monotonic() + CLOSE_S
        for thread in self._threads.values():
            thread.close(deadline - time.monotonic())
        self._drop_failed()

    def _kept(self, name: str, make: Callable[[], str]) -> str:
        """The id of this SAE's run, made once."""
        with self._lock:
            record = recorded(self._folder)
            ids = record.get("ids", {})
            if name not in ids:
                ids[name] = make()
                write_json(self._folder / TRACKERS_FILE, record | {"ids": ids})
            return str(ids[name])

    def _drop_failed(self) -> None:
        for name, why in [(name, why) for name, thread in self._threads.items() if (why := thread.failure) is not None]:
            del self._threads[name]
            with self._lock:
                record = recorded(self._folder)
                failed = record.get("failed", {}) | {name: why}
                write_json(self._folder / TRACKERS_FILE, record | {"failed": failed})
            warnings.warn(f"the tracker {name} failed, training goes on without it: {why}", stacklevel=3)


def recorded(folder: Path) -> dict[str, Any]:
    """What the trackers of an SAE left: `ids` of their runs, and why some `failed`."""
    file = folder / TRACKERS_FILE
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}


class _Background:
    """A tracker in a thread."""

    def __init__(self, name: str, make: Callable[[], Tracker]) -> None:
        self.failure: str | None = None
        """Why nothing more will be recorded."""
        self._lines: queue.Queue[Line | None] = queue.Queue(_MOST_WAITING)
        self._thread = threading.Thread(target=self._run, args=(make,), daemon=True, name=f"tracker {name}")
        self._thread.start()

    def put(self, line: Line | None) -> None:
        """Hand on a line; None ends."""
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self.failure = f"it is {_MOST_WAITING:,} steps behind"

    def close(self, timeout_s: float) -> None:
        self.put(None)
        self._thread.join(max(0.0, timeout_s))
        if self._thread.is_alive():
            self.failure = self.failure or f"it did not finish within {CLOSE_S:.0f} s"

    def _run(self, make: Callable[[], Tracker]) -> None:
        try:
            tracker = make()
            ended = False
            while not ended:
                lines, ended = self._waiting()
                if lines:
                    tracker.log(lines)
            tracker.close()
        except BaseException as error:  # noqa: BLE001 - whatever a library does, training goes on
            self.failure = f"{type(error).__name__}: {error}"

    def _waiting(self) -> tuple[list[Line], bool]:
        """The lines that wait, once there is one, and whether the end was among them."""
        lines: list[Line] = []
        line = self._lines.get()
        while line is not None and len(lines) < _MOST_AT_ONCE - 1:
            lines.append(line)
            try:
                line = self._lines.get_nowait()
            except queue.Empty:
                return lines, False
        return (lines, True) if line is None else ([*lines, line], False)


# -- libraries ---------------------------------------------------------------------------------------------------------


class TensorBoard:
    """Event files, written by tensorboardX. Lines that a killed run wrote after its last checkpoint are purged."""

    def __init__(self, folder: Path, step: int) -> None:
        from tensorboardX import SummaryWriter

        # The suffix, because names are otherwise of the second in which an attempt begins.
        self._writer = SummaryWriter(str(folder), purge_step=step + 1, flush_secs=10, filename_suffix=f".{step}")

    def log(self, lines: Sequence[Line]) -> None:
        """See `Tracker.log`."""
        for step, figures in lines:
            for name, value in figures.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """See `Tracker.close`."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases. Its own steps only grow, so ours are a figure: a resumed run repeats some."""

    def __init__(self, folder: Path, identity: str, title: str, settings: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=title,
            group=title.partition("/")[0],
            id=identity,
            resume="allow",
            dir=str(folder),
            config=dict(settings),
            reinit="create_new",
            save_code=False,
            settings=wandb.Settings(console="off", silent=True, disable_git=True, disable_code=True),
        )
        self._run.define_metric("*", step_metric="step")

    def log(self, lines: Sequence[Line]) -> None:
        """See `Tracker.log`."""
        for step, figures in lines:
            self._run.log({"step": step, **figures})

    def close(self) -> None:
        """See `Tracker.close`."""
        self._run.finish()


class MLflow:
    """A run of MLflow, at MLFLOW_TRACKING_URI or in a folder beside the checkpoints."""

    def __init__(
        self, folder: Path, kept: Callable[[str, Callable[[], str]], str], title: str, settings: Mapping[str, Any]
    ) -> None:
        where = os.environ.get("MLFLOW_TRACKING_URI")
        if where is None:  # the one kind of local store that needs no database library; MLflow asks whether it is meant
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            where = (folder / "mlruns").as_uri()
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric = Metric
        self._client = MlflowClient(where)

        def create() -> str:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            found = self._client.get_experiment_by_name(name)
            experiment = self._client.create_experiment(name) if found is None else found.experiment_id
            identity = str(self._client.create_run(experiment, run_name=title).info.run_id)
            self._client.log_batch(identity, params=[Param(key, str(value)) for key, value in settings.items()])
            return identity

        self._identity = kept("mlflow", create)
        self._client.update_run(self._identity, status="RUNNING")

    def log(self, lines: Sequence[Line]) -> None:
        """See `Tracker.log`."""
        now_ms = int(1000 * time.time())
        metrics = [
            self._metric(name, value, now_ms, step) for step, figures in lines for name, value in figures.items()
        ]
        for low in range(0, len(metrics), _MOST_METRICS):
            self._client.log_batch(self._identity, metrics=metrics[low : low + _MOST_METRICS])

    def close(self) -> None:
        """See `Tracker.close`."""
        self._client.set_terminated(self._identity)
