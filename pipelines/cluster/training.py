"""A training job under Ray Train: workers that run `train_worker`, started again when one is lost.

Resuming is ours, from checkpoints in the run directory, so that it works when driver and cluster are gone. A worker
that gets SIGTERM, whose node is drained, or whose driver gets SIGTERM, finishes its step and saves before it goes.
"""

import json
import shutil
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from pipelines.cluster.local import start_ray
from pipelines.config import RayConfig
from pipelines.dictionaries import dictionary_files
from pipelines.errors import RunError, StoppedError
from pipelines.progress import Bar, Reporter
from pipelines.rundir import write_json
from pipelines.train_worker import train_worker
from pipelines.training.interruption import Interrupted, install_notice, notice
from pipelines.training.job import TrainJob
from pipelines.training.metrics import METRICS_FILE, last_line
from pipelines.training.trackers import recorded
from sae.trainer import DivergedError

STOP_FILE = "stop"
"""Made by the driver: the workers save and end."""
OUTCOME_FILE = "outcome-{}.json"
"""Made by a worker, with its rank: why it ended without an exception, which another attempt would only meet again."""
OUTCOMES = ("failed", "interrupted")
POLL_S = 0.5


def run_ray(job: TrainJob, ray: RayConfig, scratch: Path, ui: Reporter) -> None:
    """Train the job's SAEs, each from its last checkpoint on.

    Args:
        scratch: folder that all workers see, for what is only needed while they run; deleted before and after.
    Raises:
        RunError: training failed; the message says where it can go on from.
        StoppedError: this process got SIGTERM; everything is saved.
    """
    start_ray(ray)
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    train = job.config
    names = ", ".join(member.name for member in job.members)
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    trainer = TorchTrainer(
        _ray_worker,
        train_loop_config={"job": job, "scratch": str(scratch.resolve())},
        torch_config=_torch_config("cpu:gloo,cuda:nccl" if train.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=train.num_workers,
            use_gpu=train.use_gpu,
            resources_per_worker={"CPU": job.n_threads, **({"GPU": 1} if train.use_gpu else {})},
        ),
        run_config=RunConfig(
            name=f"train-{uuid.uuid4().hex[:8]}",
            storage_path=str(scratch.resolve()),
            failure_config=FailureConfig(max_failures=2),
        ),
    )
    try:
        with followed(job, ui), _sigterm_as(scratch / STOP_FILE):
            trainer.fit()
        outcomes = [json.loads(file.read_text()) for file in sorted(scratch.glob(OUTCOME_FILE.format("*")))]
    except Exception as error:  # Ray wraps whatever the worker raised; the cause is what the user needs
        raise RunError(
            f"training {names} failed: {_root_cause(error)}; rerun to continue from the last checkpoint"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    for member in job.members:
        for name, why in recorded(Path(member.checkpoints)).get("failed", {}).items():
            ui.say(f"the tracker {name} failed for {member.name}: {why}")
    failed, interrupted = (list(dict.fromkeys(o[key] for o in outcomes if key in o)) for key in OUTCOMES)
    if failed:
        raise RunError(f"training {names} failed: {' '.join(failed)}")
    if interrupted:
        raise StoppedError(f"training {names} {interrupted[0]}; the same command continues from there")
    for member in job.members:
        if not all(file.exists() for file in dictionary_files(Path(member.output))):
            raise RunError(f"training {member.name} ended without a dictionary in {member.output}; rerun to continue")


def _torch_config(backend: str) -> Any:
    """Ray's set-up of torch.distributed, and SIGTERM caught in each worker's main thread, where alone it can be."""
    from ray.train.torch import TorchConfig
    from ray.train.torch.config import _TorchBackend

    class Backend(_TorchBackend):  # type: ignore[misc]
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            super().on_start(worker_group, backend_config)
            worker_group.execute(install_notice)

    class Config(TorchConfig):  # type: ignore[misc]
        @property
        def backend_cls(self) -> type[Backend]:
            return Backend

    return Config(backend=backend)


def _ray_worker(settings: dict[str, Any]) -> None:
    """What Ray Train runs on every rank."""
    import ray.train
    from ray.train.torch import get_device

    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    scratch = Path(settings["scratch"])
    told_to_stop = now_and_then((scratch / STOP_FILE).exists)
    drained = _drain_notice()
    outcome: dict[str, str] = {}
    with notice.heeded() as terminated:
        try:
            train_worker(
                settings["job"],
                rank=rank,
                world_size=world_size,
                device=get_device(),
                interrupted=lambda: terminated() or told_to_stop() or drained(),
            )
        except Interrupted as error:
            if not (scratch / STOP_FILE).exists():  # Ray starts workers anew, from what was saved
                notice.deliver()
                raise
            outcome = {"interrupted": str(error)}
        except ValueError as error:
            if world_size > 1 and not isinstance(error, DivergedError):  # the other ranks do not know of it
                raise
            outcome = {"failed": str(error)}
    if outcome:
        write_json(scratch / OUTCOME_FILE.format(rank), outcome)
    ray.train.report({})


def _drain_notice() -> Callable[[], bool]:
    """Whether Ray has told this worker that a node of the job is about to go.

    `ray.train.get_preemption_info` would ask all workers at once, by a call to an actor in each step; our workers agree
    by themselves.
    """
    try:
        from ray.train.v2._internal.execution.context import get_train_context

        notice_of_ray = get_train_context().preemption_context
    except (ImportError, AttributeError):  # a Ray that does not know of it
        return lambda: False
    return lambda: notice_of_ray.preemption_info is not None


def now_and_then(ask: Callable[[], bool], every_s: float = POLL_S) -> Callable[[], bool]:
    """`ask`, but its answer may be `every_s` old: a step may take a millisecond, a look at a shared disk longer."""
    asked_at, answer = -every_s, False

    def cached() -> bool:
        nonlocal asked_at, answer
        if time.monotonic() - asked_at >= every_s:
            asked_at, answer = time.monotonic(), ask()
        return answer

    return cached


@contextmanager
def _sigterm_as(file: Path) -> Iterator[None]:
    """While the block lasts, the first SIGTERM of this process makes a file; a second does what it would have done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, before)
        file.touch()

    before = signal.signal(signal.SIGTERM, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _root_cause(error: BaseException) -> str:
    failures = getattr(error, "worker_failures", None)
    if failures:
        error = next(iter(failures.values()))
    while (inner := getattr(error, "cause", None) or error.__cause__) is not None and inner is not error:
        error = inner
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


# -- what the user sees meanwhile --------------------------------------------------------------------------------------


@contextmanager
def followed(job: TrainJob, ui: Reporter) -> Iterator[None]:
    """While the block lasts, show what rank 0 writes into the members' metrics."""
    files = [Path(member.checkpoints) / METRICS_FILE for member in job.members]
    done = max(_steps(file) for file in files)
    names = [member.name for member in job.members]
    label = "train" if names == ["main"] else f"train {names[0]}" if len(names) == 1 else f"train {len(names)} SAEs"
    batch_size = job.config.batch_size
    finished = threading.Event()
    with ui.stage(label, total=job.n_steps * batch_size, unit="tokens", done=done * batch_size) as bar:
        tail = threading.Thread(target=_follow, args=(files, done, batch_size, bar, finished), daemon=True)
        tail.start()
        try:
            yield
        finally:
            finished.set()
            tail.join()


def _steps(file: Path) -> int:
    return int(last_line(file).get("step", 0))


def _follow(files: Sequence[Path], done: int, batch_size: int, bar: Bar, finished: threading.Event) -> None:
    """Move the bar as rank 0 appends steps."""
    while True:
        last = finished.wait(POLL_S)
        lines = [line for file in files if (line := last_line(file))]
        step = max((int(line["step"]) for line in lines), default=0)
        if step > done:
            bar.note(live_line(lines))
            bar.advance((step - done) * batch_size)
            done = step
        if last:
            return


def live_line(lines: Sequence[dict[str, Any]]) -> str:
    """The latest figures in a few words; of several SAEs, their range."""

    def span(name: str, digits: int) -> str:
        low, high = (f"{pick(line[name] for line in lines):,.{digits}f}" for pick in (min, max))
        return low if low == high else f"{low}–{high}"

    return f"loss {span('loss', 3)}  FVU {span('batch_fvu', 3)}  L0 {span('l0', 1)}  dead {span('dead', 0)}"
