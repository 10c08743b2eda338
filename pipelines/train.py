"""train: activation store → trained dictionary, through Ray Train.

The driver checks the settings, starts a `TorchTrainer` whose workers run `train_worker`, and follows the steps that
rank 0 records. Resuming is ours, from checkpoints in the run directory: it works when driver and cluster are gone.
"""

import math
import os
import shutil
import threading
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.architectures import n_latents, sae_config
from pipelines.cluster.local import require_cpus, start_ray
from pipelines.collect import open_store, store_path
from pipelines.config import CollectConfig, RayConfig, RunConfig, SAESpec, TrainConfig
from pipelines.dictionaries import dictionary_files, dictionary_provenance, import_dictionary
from pipelines.errors import RunError, UsageError
from pipelines.progress import Reporter
from pipelines.rundir import RunDir
from pipelines.selection import Selection, selected
from pipelines.stores import absolute
from pipelines.train_worker import METRICS_FILE, TrainJob, last_line, train_worker
from storage import ActivationStore


def train(config: RunConfig, run: RunDir, ui: Reporter) -> dict[str, dict[str, Any]]:
    """Train every SAE of the run; returns the last step's figures of each."""
    store = open_store(config, run)
    if config.train is None:
        return {name: import_dictionary(config, run, name, store) for name in config.saes}
    check_settings(config, {hook.name: hook.d_in for hook in store.spec.hooks})
    _require_one_batch(config.train, store, config.selection("train"))
    figures = {}
    for name in config.saes:
        if not is_trained(run, name):
            if config.collect.mode == "stream":
                raise RunError(
                    f"there is no trained dictionary in {run.trained(name)}, and the activations that it was trained "
                    "on were deleted as they streamed by: start over in another --out"
                )
            run_ray(make_job(config, run, name, store), config, name, run, ui)
        figures[name] = last_line(run.checkpoints(name) / METRICS_FILE)
        run.event("mixing", sae=name, expected_same_context=figures[name].get("expected_same_context"))
    return figures


def make_job(config: RunConfig, run: RunDir, name: str, store: ActivationStore) -> TrainJob:
    """The job of one SAE."""
    assert config.train is not None
    return TrainJob(
        store=str(absolute(store_path(config, run))),
        hooks=config.hooks_of(name),
        spec=config.saes[name],
        config=config.train,
        sinks=config.sinks,
        seed=config.seed,
        n_threads=_threads_per_worker(config.train, config.ray),
        checkpoints=str(run.checkpoints(name).resolve()),
        output=str(run.trained(name).resolve()),
        provenance=dictionary_provenance(config, store, config.hook_of(name)),
        selection=config.selection("train"),
    )


def _threads_per_worker(train: TrainConfig, ray: RayConfig) -> int:
    shared_evenly = (ray.num_cpus or os.cpu_count() or 1) // train.num_workers
    return max(1, int(train.cpus_per_worker or shared_evenly))


def check_settings(config: RunConfig, widths: Mapping[str, int]) -> None:
    """Refuse, before anything is collected, what could not be trained.

    Args:
        widths: d_in of every hook.

    Raises:
        UsageError: listing all problems.
    """
    if config.train is None:
        return
    problems = [
        problem
        for name, spec in config.saes.items()
        for problem in _problems(config.train, spec, [widths[hook] for hook in config.hooks_of(name)], name)
    ]
    problems += _mixing_problems(config.train, config.collect)
    if config.collect.mode == "stream":
        from pipelines.stream import stream_problems

        problems += stream_problems(config)
    if problems:
        raise UsageError("; ".join(dict.fromkeys(problems)))
    if config.collect.mode == "stream":
        return  # trainers and harvesters share the CPUs
    n_cpus = _threads_per_worker(config.train, config.ray) * config.train.num_workers
    require_cpus(config.ray, n_cpus, "train.num_workers and train.cpus_per_worker")


def _problems(train: TrainConfig, spec: SAESpec, widths: Sequence[int], name: str) -> list[str]:
    d_sae = n_latents(spec, widths[0])
    problems = []
    if spec.k is not None and spec.k > d_sae:
        problems.append(
            f"saes.{name}.k is {spec.k}, more than its {d_sae} latents: lower k, or raise d_sae or expansion_factor"
        )
    else:
        try:
            sae_config(spec, widths)
        except ValueError as error:
            problems.append(f"saes.{name}: {error}")
    if train.n_tokens < train.batch_size:
        problems.append(f"train.n_tokens ({train.n_tokens:,}) is less than one batch ({train.batch_size:,})")
    if train.batch_size % train.streams:
        problems.append(f"train.batch_size ({train.batch_size}) must be a multiple of train.streams ({train.streams})")
    if train.streams % train.num_workers:
        problems.append(
            f"train.streams ({train.streams}) must be a multiple of train.num_workers ({train.num_workers})"
        )
    return problems


def _mixing_problems(train: TrainConfig, collect: CollectConfig) -> list[str]:
    """What `ShuffledReader` is sure to refuse when the store is there."""
    n_train = collect.n_tokens * (1 - collect.heldout_fraction) / collect.context_length
    same_context = train.batch_size / train.shuffle_contexts
    if n_train <= train.shuffle_contexts or same_context <= train.max_same_context:
        return []
    return [
        f"train.shuffle_contexts ({train.shuffle_contexts}) mixes too little for train.batch_size "
        f"({train.batch_size}): a token would meet about {same_context:.0f} others of its own context in a batch, and "
        f"train.max_same_context is {train.max_same_context:g}; raise it to "
        f"{math.ceil(train.batch_size / train.max_same_context)} or more"
    ]


def _require_one_batch(train: TrainConfig, store: ActivationStore, selection: Selection) -> None:
    n_train = store.spec.n_train_contexts * store.spec.context_length
    if n_train < train.batch_size:
        raise UsageError(
            f"the store has {n_train:,} training tokens, too few for one batch of {train.batch_size:,}: "
            "collect more documents (collect.n_tokens) or lower train.batch_size"
        )
    if not selection:
        return
    steps = range(0, store.spec.n_train_contexts, 4096)
    n_selected = sum(
        int(selected(store, low, min(low + 4096, store.spec.n_train_contexts), selection).sum()) for low in steps
    )
    if n_selected < train.batch_size:
        raise UsageError(
            f"train.select leaves {n_selected:,} of {n_train:,} training tokens, too few for one batch of "
            f"{train.batch_size:,}: select more, collect more documents (collect.n_tokens) or lower train.batch_size"
        )


def run_ray(job: TrainJob, config: RunConfig, name: str, run: RunDir, ui: Reporter) -> None:
    """Train under Ray Train, from the last checkpoint on."""
    train = job.config
    start_ray(config.ray)
    from ray.train import FailureConfig, ScalingConfig
    from ray.train import RunConfig as RayRunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    checkpoints = Path(job.checkpoints)
    checkpoints.mkdir(parents=True, exist_ok=True)
    n_steps = train.n_tokens // train.batch_size
    # Ray's own bookkeeping is per attempt: resuming is ours, from `checkpoints`, so that it works without the old
    # driver.
    scratch = checkpoints / ".ray"
    shutil.rmtree(scratch, ignore_errors=True)
    trainer = TorchTrainer(
        _ray_worker,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if train.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=train.num_workers,
            use_gpu=train.use_gpu,
            resources_per_worker={"CPU": job.n_threads, **({"GPU": 1} if train.use_gpu else {})},
        ),
        run_config=RayRunConfig(
            name=f"{name}-{uuid.uuid4().hex[:8]}",
            storage_path=str(scratch),
            failure_config=FailureConfig(max_failures=2),
        ),
    )
    done = int(last_line(checkpoints / METRICS_FILE).get("step", 0))
    finished = threading.Event()
    label = "train" if name == "main" else f"train {name}"
    with ui.stage(label, total=n_steps * train.batch_size, unit="tokens", done=done * train.batch_size) as bar:
        tail = threading.Thread(
            target=_follow, args=(checkpoints / METRICS_FILE, done, train.batch_size, bar, finished), daemon=True
        )
        tail.start()
        try:
            trainer.fit()
        except Exception as error:  # Ray wraps whatever the worker raised; the cause is what the user needs
            raise RunError(
                f"training {name} failed: {_root_cause(error)}; rerun to continue from the last checkpoint"
            ) from error
        finally:
            finished.set()
            tail.join()
            shutil.rmtree(scratch, ignore_errors=True)
    if not is_trained(run, name):
        raise RunError(f"training {name} ended without a dictionary in {run.trained(name)}; rerun to continue")


def is_trained(run: RunDir, name: str) -> bool:
    """Whether the SAE's dictionary is there."""
    return all(file.exists() for file in dictionary_files(run.trained(name)))


def _root_cause(error: BaseException) -> str:
    failures = getattr(error, "worker_failures", None)
    if failures:
        error = next(iter(failures.values()))
    while (inner := getattr(error, "cause", None) or error.__cause__) is not None and inner is not error:
        error = inner
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _follow(path: Path, done: int, batch_size: int, bar: Any, finished: threading.Event) -> None:
    """Move the bar as rank 0 appends steps."""
    while True:
        last = finished.wait(0.5)
        line = last_line(path)
        step = int(line.get("step", done))
        if step > done:
            bar.note(f"loss {line['loss']:.3f}  L0 {line['l0']:.1f}  dead {line['dead']}")
            bar.advance((step - done) * batch_size)
            done = step
        if last:
            return


def _ray_worker(settings: dict[str, Any]) -> None:
    """What Ray Train runs on every rank."""
    import ray.train
    from ray.train.torch import get_device

    context = ray.train.get_context()
    metrics = train_worker(
        settings["job"], rank=context.get_world_rank(), world_size=context.get_world_size(), device=get_device()
    )
    ray.train.report(metrics)
