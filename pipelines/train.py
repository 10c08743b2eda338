"""train: activation store → trained dictionary, through Ray Train.

`train_worker` runs in every Ray Train worker: it reads its share of each shuffled batch, trains, saves exact-resume
checkpoints on rank 0 and, at the end, calibrates the threshold and writes the dictionary. It takes plain values only,
so a test may call it without Ray.
"""

import json
import os
import shutil
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.cluster.local import require_cpus, start_ray
from pipelines.collect import open_store, store_path
from pipelines.config import DictionarySource, RayConfig, RunConfig, SAESpec, SinkConfig, TrainConfig
from pipelines.errors import RunError, UsageError
from pipelines.progress import Reporter
from pipelines.rundir import RunDir, now, write_text
from sae import BatchTopKConfig, Dictionary, StepMetrics, TopKConfig, Trainer, TrainerConfig, build
from sae.batchtopk import BatchTopKSAE
from sae.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from storage import ActivationStore, ShuffledReader

CALIBRATION_TOKENS = 2**17
"""Tokens behind b_dec's start and the input scale (a sixteenth) and behind the inference threshold."""

METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class TrainJob:
    """Everything that a worker needs; plain values and paths."""

    store: str
    hook: str
    spec: SAESpec
    config: TrainConfig
    sinks: SinkConfig
    seed: int
    n_threads: int
    checkpoints: str
    output: str
    provenance: dict[str, Any]


def train(config: RunConfig, run: RunDir, ui: Reporter) -> dict[str, dict[str, Any]]:
    """Train every SAE of the run; returns the last step's figures of each."""
    store = open_store(config, run)
    if config.train is None:
        return {name: import_dictionary(config, run, name, store) for name in config.saes}
    check_settings(config, {hook.name: hook.d_in for hook in store.spec.hooks})
    _require_one_batch(config.train, store)
    figures = {}
    for name in config.saes:
        if not (run.trained(name) / "dictionary.json").exists():
            _run_ray(make_job(config, run, name, store), config, name, run, ui)
        figures[name] = _last_line(run.checkpoints(name) / METRICS_FILE)
    return figures


def make_job(config: RunConfig, run: RunDir, name: str, store: ActivationStore) -> TrainJob:
    """The job of one SAE."""
    assert config.train is not None
    return TrainJob(
        store=str(store_path(config, run).resolve()),
        hook=config.hook_of(name),
        spec=config.saes[name],
        config=config.train,
        sinks=config.sinks,
        seed=config.seed,
        n_threads=_threads_per_worker(config.train, config.ray),
        checkpoints=str(run.checkpoints(name).resolve()),
        output=str(run.trained(name).resolve()),
        provenance=dictionary_provenance(config, store, config.hook_of(name)),
    )


def _threads_per_worker(train: TrainConfig, ray: RayConfig) -> int:
    shared_evenly = (ray.num_cpus or os.cpu_count() or 1) // train.num_workers
    return max(1, int(train.cpus_per_worker or shared_evenly))


def import_dictionary(config: RunConfig, run: RunDir, name: str, store: ActivationStore) -> dict[str, Any]:
    """Take an existing dictionary in place of training one.

    Raises:
        UsageError: see `load_source`.
    """
    assert config.dictionary is not None
    hook = config.hook_of(name)
    dictionary = load_source(config.dictionary, hook, store.spec.hook(hook).d_in)
    provenance = {
        **dictionary_provenance(config, store, hook),
        "imported_from": dictionary.provenance or config.dictionary.path,
    }
    Dictionary(dictionary.sae, hook_name=hook, metadata=saelens_metadata(provenance)).save(
        run.trained(name), provenance=provenance, overwrite=True
    )
    return {}


def load_source(source: DictionarySource, hook: str, d_in: int) -> Dictionary:
    """The dictionary that a config names in place of `train:`.

    Raises:
        UsageError: it cannot be loaded, or its width is not `d_in`, that of the hook.
    """
    where = Path(source.path, source.subfolder or "")
    try:
        dictionary = Dictionary.load(where)
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(f"dictionary.path: {error}") from error
    if dictionary.d_in != d_in:
        raise UsageError(
            f"the dictionary {where} has d_in {dictionary.d_in}, but {hook} of this model has width {d_in}: "
            "choose the hook it was trained on"
        )
    return dictionary


def load_trained(run: RunDir, name: str) -> Dictionary:
    """The trained dictionary of a run.

    Raises:
        RunError: it is not there yet, or damaged.
    """
    try:
        return Dictionary.load(run.trained(name))
    except FileNotFoundError as error:
        raise RunError(f"the run has no trained dictionary {name!r}: run `sae train` first ({error})") from error
    except ValueError as error:
        raise RunError(
            f"{error} Delete {run.trained(name)} and run `sae train` again; it continues from the last checkpoint."
        ) from error


def dictionary_provenance(config: RunConfig, store: ActivationStore, hook: str) -> dict[str, Any]:
    """What a dictionary says about where it comes from."""
    from pipelines.versions import versions

    provenance = store.spec.provenance
    return {
        "model_name": provenance["model"]["source"],
        "model": provenance["model"],
        "text": provenance["text"],
        "packing": provenance["packing"],
        "hook_name": hook,
        "context_size": store.spec.context_length,
        "store_fingerprint": store.spec.fingerprint,
        "dtype": provenance["forward"]["dtype"],
        "sink_multiple": config.sinks.multiple,
        "median_norm": store.statistics(hook).median_norm,
        "train": config.train.model_dump(mode="json") if config.train else None,
        "seed": config.seed,
        "versions": versions(),
    }


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
        for problem in _problems(config.train, spec, widths[config.hook_of(name)], name)
    ]
    if problems:
        raise UsageError("; ".join(dict.fromkeys(problems)))
    n_cpus = _threads_per_worker(config.train, config.ray) * config.train.num_workers
    require_cpus(config.ray, n_cpus, "train.num_workers and train.cpus_per_worker")


def _problems(train: TrainConfig, spec: SAESpec, d_in: int, name: str) -> list[str]:
    d_sae = spec.d_sae or round(spec.expansion_factor * d_in)
    problems = []
    if spec.k > d_sae:
        problems.append(
            f"saes.{name}.k is {spec.k}, more than its {d_sae} latents: lower k, or raise d_sae or expansion_factor"
        )
    if train.n_tokens < train.batch_size:
        problems.append(f"train.n_tokens ({train.n_tokens:,}) is less than one batch ({train.batch_size:,})")
    if train.batch_size % train.num_workers:
        problems.append(
            f"train.batch_size ({train.batch_size}) must be a multiple of train.num_workers ({train.num_workers})"
        )
    return problems


def _require_one_batch(train: TrainConfig, store: ActivationStore) -> None:
    n_train = store.spec.n_train_contexts * store.spec.context_length
    if n_train < train.batch_size:
        raise UsageError(
            f"the store has {n_train:,} training tokens, too few for one batch of {train.batch_size:,}: "
            "collect more documents (collect.n_tokens) or lower train.batch_size"
        )


def _run_ray(job: TrainJob, config: RunConfig, name: str, run: RunDir, ui: Reporter) -> None:
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
        torch_config=TorchConfig(backend="nccl" if train.use_gpu else "gloo"),
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
    done = int(_last_line(checkpoints / METRICS_FILE).get("step", 0))
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
    if not (run.trained(name) / "dictionary.json").exists():
        raise RunError(f"training {name} ended without a dictionary in {run.trained(name)}; rerun to continue")


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
        line = _last_line(path)
        step = int(line.get("step", done))
        if step > done:
            bar.note(f"loss {line['loss']:.3f}  L0 {line['l0']:.1f}  dead {line['dead']}")
            bar.advance((step - done) * batch_size)
            done = step
        if last:
            return


def _last_line(path: Path) -> dict[str, Any]:
    """The newest whole line of a JSON-lines file; empty when there is none."""
    if not path.exists():
        return {}
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = file.read().split(b"\n")[:-1]
    for line in reversed(lines):
        try:
            return dict(json.loads(line))
        except ValueError:
            continue
    return {}


def _ray_worker(settings: dict[str, Any]) -> None:
    """What Ray Train runs on every rank."""
    import ray.train
    from ray.train.torch import get_device

    context = ray.train.get_context()
    metrics = train_worker(
        settings["job"], rank=context.get_world_rank(), world_size=context.get_world_size(), device=get_device()
    )
    ray.train.report(metrics)


def train_worker(
    job: TrainJob, *, rank: int = 0, world_size: int = 1, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Train one SAE on this rank; rank 0 saves checkpoints and the dictionary."""
    torch.set_num_threads(job.n_threads)
    store = ActivationStore.open(Path(job.store))
    train = job.config
    d_in = store.spec.hook(job.hook).d_in
    n_steps = train.n_tokens // train.batch_size
    sample = _sample(store, job, CALIBRATION_TOKENS // 16)
    trainer = Trainer(
        build(_sae_config(job.spec, d_in), seed=job.seed),
        TrainerConfig(
            lr=train.lr,
            warmup_fraction=train.warmup_fraction,
            decay_fraction=train.decay_fraction,
            auxk_alpha=train.auxk_alpha,
        ),
        n_steps,
        device=device,
        input_scale=_input_scale(sample) if train.normalize == "scale" else 1.0,
    )
    checkpoints = Path(job.checkpoints)
    found = latest_checkpoint(checkpoints)
    if found is not None:
        trainer.load_state_dict(load_checkpoint(found))
    else:
        trainer.initialise(sample)
    reader = ShuffledReader(
        store,
        job.hook,
        split="train",
        batch_size=train.batch_size,
        seed=job.seed,
        window_contexts=train.shuffle_contexts,
        rank=rank,
        world_size=world_size,
        exclude_sinks=not job.sinks.train_on_them,
        sink_multiple=job.sinks.multiple,
        start_batch=trainer.step,
    )
    with nullcontext() if rank else _Metrics(checkpoints / METRICS_FILE, trainer.step) as metrics:

        def on_step(step: StepMetrics) -> None:
            if metrics is None:
                return
            metrics.write(step)
            if step.step % train.checkpoint_every == 0 or step.step == n_steps:
                save_checkpoint(checkpoints, step.step, trainer.state_dict())

        trainer.fit(reader, on_step)
    if rank == 0:
        _finish(trainer, store, job)
    return _last_line(checkpoints / METRICS_FILE)


def _finish(trainer: Trainer, store: ActivationStore, job: TrainJob) -> None:
    """Calibrate the inference threshold and write the trained dictionary."""
    sae = trainer.export()
    if isinstance(sae, BatchTopKSAE):
        sae.calibrate_threshold(_calibration(store, job, CALIBRATION_TOKENS))
    Dictionary(sae, hook_name=job.hook, metadata=saelens_metadata(job.provenance)).save(
        job.output, provenance=job.provenance, overwrite=True
    )


def saelens_metadata(provenance: dict[str, Any]) -> dict[str, Any]:
    """What SAELens looks for in cfg.json."""
    return {
        "model_name": provenance["model_name"],
        "context_size": provenance["context_size"],
        "dataset_path": ", ".join(text["origin"] for text in provenance["text"]),
        "prepend_bos": provenance["packing"]["prepend_bos"],
    }


def _sae_config(spec: SAESpec, d_in: int) -> BatchTopKConfig | TopKConfig:
    d_sae = spec.d_sae or round(spec.expansion_factor * d_in)
    if spec.architecture == "batchtopk":
        return BatchTopKConfig(d_in=d_in, d_sae=d_sae, k=spec.k)
    return TopKConfig(d_in=d_in, d_sae=d_sae, k=spec.k)


def _calibration(store: ActivationStore, job: TrainJob, n_tokens: int) -> Iterator[Tensor]:
    """Training tokens in store order (contexts are already shuffled), sinks left out as in training."""
    start, stop = store.spec.split_range("train")
    step = max(1, 4096 // store.spec.context_length)
    for low in range(start, stop, step):
        high = min(low + step, stop)
        if (low - start) * store.spec.context_length >= n_tokens:
            return
        x = store.activations(job.hook, low, high).float()
        if job.sinks.train_on_them:
            yield x.flatten(0, 1)
        else:
            yield x[~torch.from_numpy(store.sink_mask(job.hook, low, high, job.sinks.multiple))]


def _sample(store: ActivationStore, job: TrainJob, n_tokens: int) -> Tensor:
    """The same rows on every rank."""
    return torch.cat(list(_calibration(store, job, n_tokens)))


def _input_scale(sample: Tensor) -> float:
    """Factor that makes the mean squared distance from the mean equal to the width."""
    centred = sample.double() - sample.double().mean(0)
    return float((sample.shape[1] / centred.square().sum(1).mean()).sqrt())


class _Metrics:
    """JSON lines, one a step; lines past the step that a resume starts from are dropped."""

    def __init__(self, path: Path, step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line)
                except ValueError:
                    continue  # the line that a killed process was writing
        write_text(path, "".join(f"{line}\n" for line in kept))
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def __enter__(self) -> "_Metrics":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, step: StepMetrics) -> None:
        self._file.write(json.dumps({**step._asdict(), "time": now()}) + "\n")
