"""One rank of a training run: reads its share of each shuffled batch, trains, and on rank 0 saves.

Knows no Ray: `pipelines.train` runs it under Ray Train, and a test may call it inline.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.architectures import sae_config
from pipelines.config import SAESpec, SinkConfig, TrainConfig
from pipelines.dictionaries import saelens_metadata
from pipelines.rundir import now, write_text
from pipelines.selection import Selection, kept, selected
from sae import Dictionary, StepMetrics, Trainer, TrainerConfig, build
from sae.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from sae.normalise import fit_normaliser
from sae.threshold import thresholded
from sae.trainer import DivergedError
from storage import ActivationStore, Consumer, Ring, ShuffledReader

CALIBRATION_TOKENS = 2**17
"""Tokens behind b_dec's start and the input scale (a sixteenth) and behind the inference threshold."""

METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class TrainJob:
    """Everything that a worker needs; plain values and paths."""

    store: str
    hooks: tuple[str, ...]
    """`RunConfig.hooks_of`; the first says which tokens are sinks."""
    spec: SAESpec
    config: TrainConfig
    sinks: SinkConfig
    seed: int
    n_threads: int
    checkpoints: str
    output: str
    provenance: dict[str, Any]
    selection: Selection = field(default_factory=dict)
    """Tokens to train on, as codes of the store's tables."""
    consumer: str | None = None
    """Name in the ring that the store is, if training goes on while it is filled."""
    capacity: int = 0
    """Shards that the ring may have on disk."""
    failure: str | None = None
    """File that says why no more shards will come, once it exists."""


def train_worker(
    job: TrainJob, *, rank: int = 0, world_size: int = 1, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Train one SAE on this rank; rank 0 saves checkpoints and the dictionary."""
    torch.set_num_threads(job.n_threads)
    store = ActivationStore.open(job.store, tail=job.consumer is not None)
    consumer = _consumer(job)
    train = job.config
    widths = [store.spec.hook(hook).d_in for hook in job.hooks]
    n_steps = train.n_tokens // train.batch_size
    sample = _sample(store, job, CALIBRATION_TOKENS // 16)
    trainer = Trainer(
        build(sae_config(job.spec, widths), seed=job.seed),
        TrainerConfig(
            lr=train.lr,
            warmup_fraction=train.warmup_fraction,
            decay_fraction=train.decay_fraction,
            auxk_alpha=train.auxk_alpha,
        ),
        n_steps,
        device=device,
        normalisers=[fit_normaliser(part, train.normalize) for part in sample],
    )
    checkpoints = Path(job.checkpoints)
    found = latest_checkpoint(checkpoints)
    if found is not None:
        trainer.load_state_dict(load_checkpoint(found))
    else:
        trainer.initialise(sample)
    readers = [
        ShuffledReader(
            store,
            hook,
            split="train",
            batch_size=train.batch_size,
            seed=job.seed,
            window_contexts=train.shuffle_contexts,
            n_streams=train.streams,
            max_same_context=train.max_same_context,
            rank=rank,
            world_size=world_size,
            exclude_sinks=not job.sinks.train_on_them,
            sink_multiple=job.sinks.multiple,
            sink_hook=job.hooks[0],
            select=job.selection or None,
            epochs=None if consumer is None else 1,
            start_batch=trainer.step,
            ring=consumer,
        )
        for hook in job.hooks
    ]
    batches: Iterable[tuple[Tensor, ...]] = zip(*readers, strict=True)  # the same rows, since only the hooks differ
    with nullcontext() if rank else _Metrics(checkpoints / METRICS_FILE, trainer.step) as metrics:

        def on_step(step: StepMetrics) -> None:
            if metrics is None:
                return
            metrics.write(step, readers[0].expected_same_context)
            if step.step % train.checkpoint_every == 0 or step.step == n_steps:
                save_checkpoint(checkpoints, step.step, trainer.state_dict())
                if consumer is not None:
                    consumer.advance(min(reader.first_needed(step.step) for reader in readers))

        try:
            trainer.fit(batches, on_step)
        except ValueError as error:
            raise ValueError(f"{error} {_last_good(error, trainer, checkpoints, rank)}") from error
    if rank == 0:
        _finish(trainer, store, job)
    return last_line(checkpoints / METRICS_FILE)


def _last_good(error: ValueError, trainer: Trainer, checkpoints: Path, rank: int) -> str:
    """Where training can go on from: saved here unless the weights themselves are what is wrong."""
    if rank == 0 and trainer.step > 0 and not isinstance(error, DivergedError):
        save_checkpoint(checkpoints, trainer.step, trainer.state_dict())
    found = latest_checkpoint(checkpoints)
    return "No checkpoint was saved yet." if found is None else f"The last good checkpoint is {found}."


def _consumer(job: TrainJob) -> Consumer | None:
    if job.consumer is None:
        return None
    failure = None if job.failure is None else Path(job.failure)

    def failed() -> str | None:
        return failure.read_text(encoding="utf-8") if failure is not None and failure.exists() else None

    return Consumer(Ring.open(job.store), job.consumer, capacity=job.capacity, failure=failed)


def _finish(trainer: Trainer, store: ActivationStore, job: TrainJob) -> None:
    """Calibrate the inference threshold and write the trained dictionary."""
    sae = trainer.export()
    if (selecting := thresholded(sae)) is not None:
        selecting.calibrate_threshold(
            sae.input_and_target(batch)[0] for batch in _calibration(store, job, CALIBRATION_TOKENS)
        )
    Dictionary(sae, hook_names=job.hooks, metadata=saelens_metadata(job.provenance)).save(
        job.output, provenance=job.provenance, overwrite=True
    )


def _calibration(store: ActivationStore, job: TrainJob, n_tokens: int) -> Iterator[tuple[Tensor, ...]]:
    """Activations of all hooks at about `n_tokens` tokens that training may use, in store order, which is shuffled."""
    start, stop = store.retained_range("train")
    step = max(1, 4096 // store.spec.context_length)
    found = 0
    for low in range(start, stop, step):
        high = min(low + step, stop)
        if found >= n_tokens:
            return
        chosen = selected(store, low, high, job.selection)
        found += int(chosen.sum())  # sinks too: contexts are read as whole as they are without a selection
        if not job.sinks.train_on_them:
            chosen = kept(store, job.hooks[0], low, high, job.sinks.multiple, job.selection)
        rows = torch.from_numpy(chosen)
        yield tuple(store.activations(hook, low, high).float()[rows] for hook in job.hooks)


def _sample(store: ActivationStore, job: TrainJob, n_tokens: int) -> list[Tensor]:
    """The same rows on every rank, of each hook."""
    return [torch.cat(parts) for parts in zip(*_calibration(store, job, n_tokens), strict=True)]


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

    def write(self, step: StepMetrics, same_context: float) -> None:
        line = {**step._asdict(), "expected_same_context": round(same_context, 3), "time": now()}
        self._file.write(json.dumps(line) + "\n")


def last_line(path: Path) -> dict[str, Any]:
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
