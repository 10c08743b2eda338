"""`sae plan`: what a config will cost, before anything starts.

Sizes follow from the config and the model's own settings, without weights and without text. Hours come from a short
calibration on this machine (a few forward passes, a few training steps, the first texts), or from an earlier run whose
stages are finished. What could not be measured is reported as unknown.
"""

import json
import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from pipelines.cluster.harvesters import n_workers_that_fit, threads_per_worker
from pipelines.config import RunConfig
from pipelines.errors import PipelineError, RunError
from pipelines.info import store_bytes
from pipelines.models import ResolvedModel, resolve_model, resolve_settings
from pipelines.rundir import RunDir, read_json
from pipelines.stores import StorePlace
from storage import StoreSpec
from storage.errors import StorageError
from storage.layout import shard_arrays

SAMPLE_TOKENS = 20_000
"""Tokens of text that a calibration packs in order to count documents."""
CALIBRATION_LATENTS = 8192
"""Widest SAE that a calibration trains; the time of a wider one is taken to grow with its width."""
TEXT_BYTES_PER_TOKEN = 6
"""Text and spans of the documents, kept beside the store: about four bytes of English a token, and its row."""
LATENT_BYTES = 8
"""One active latent of one token in the latent store: a row number and a value."""
FREE_SHARE = 0.02
"""Share of the free space that a plan must leave: file systems fail early, and metadata is not counted."""


@dataclass(frozen=True)
class Plan:
    """Costs of one run; None where a figure is unknown."""

    name: str
    n_tokens: int
    n_contexts: int
    n_documents: int | None
    n_shards: int
    n_shards_done: int
    d_in: dict[str, int]
    bytes_per_token: dict[str, float]
    """Per hook, with checksums and norms."""
    hook_bytes: dict[str, int]
    store_bytes: int
    """All hooks, token tables and texts."""
    other_bytes: int
    """Checkpoints, latents and dictionaries of all SAEs."""
    needed_bytes: int
    """What is still to be written, store and other results."""
    free_bytes: int | None
    """Where the store will be; None for an object store."""
    fits: bool
    collect_workers: int
    threads_per_worker: int
    train_steps: dict[str, int]
    hours: dict[str, float | None]
    gpu_hours: float | None
    rates: dict[str, float]
    """Tokens a second behind `hours`."""
    rates_from: str
    shortage: str | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        documents = "" if self.n_documents is None else f" of about {self.n_documents:,} documents"
        done = f", {self.n_shards_done:,} of them done" if self.n_shards_done else ""
        lines = [
            f"{self.name}: {self.n_tokens:,} tokens{documents}, {self.n_contexts:,} contexts, "
            f"{self.n_shards:,} shards{done}"
        ]
        lines += [
            f"  {hook}: d_in {self.d_in[hook]}, {self.bytes_per_token[hook]:,.0f} bytes a token, {size_text(n_bytes)}"
            for hook, n_bytes in self.hook_bytes.items()
        ]
        lines.append(f"  store {size_text(self.store_bytes)}, other results {size_text(self.other_bytes)}")
        if self.free_bytes is not None:
            lines.append(f"  disk: {size_text(self.needed_bytes)} to be written, {size_text(self.free_bytes)} free")
        lines.append(f"  collect with {self.collect_workers} workers of {self.threads_per_worker} threads")
        lines += [f"  {stage:<9}{_duration(hours)}" for stage, hours in self.hours.items()]
        if self.gpu_hours is not None:
            lines.append(f"  GPU hours {self.gpu_hours:,.1f}")
        lines.append(f"  times: {self.rates_from}")
        return lines


def make_plan(config: RunConfig, run: RunDir, *, calibrate: bool = True, like: Path | None = None) -> Plan:
    """Work out a run's costs; writes nothing.

    Args:
        calibrate: measure rates here, which loads the model and some text; off reads the model's settings alone.
        like: a run directory whose finished stages give the rates in place of a calibration.
    Raises: UsageError for a model, hook or text that cannot be used.
    """
    from pipelines.collect import hook_widths, store_path

    measured = calibrate and like is None
    resolved = resolve_model(config.model) if measured else resolve_settings(config.model)
    widths = hook_widths(config, resolved)
    spec = planned_spec(config, widths)
    hook_bytes = {hook.name: _bytes_of_hook(spec, name) for name, hook in zip(config.hooks, spec.hooks, strict=True)}
    n_documents, rates, source = None, dict[str, float](), "unknown, nothing was measured (--no-calibrate)"
    if like is not None:
        rates, source = recorded_rates(config, like), f"recorded in {like}"
    elif measured:
        n_documents = _estimated_documents(config, resolved)
        rates, source = calibrated_rates(config, resolved, widths), "a calibration of seconds on this machine"
    path = store_path(config, run)
    done = shards_done(path, spec.n_shards)
    store = store_bytes(spec) + TEXT_BYTES_PER_TOKEN * spec.n_tokens
    other = sum(_bytes_of_sae(config, name, widths) for name in config.saes)
    store_left = round(store * (1 - done / spec.n_shards))
    if config.collect.mode == "stream":
        store_left = min(store_left, round(store * _resident_share(config, spec)))
    needed, free, shortage = _room(path, run.path, store_left, other)
    workers = min(n_workers_that_fit(config), spec.n_shards)
    hours = _hours(config, spec, rates, workers, done)
    gpus = config.collect.gpus_per_worker * workers
    return Plan(
        name=config.name,
        n_tokens=spec.n_tokens,
        n_contexts=spec.n_contexts,
        n_documents=n_documents,
        n_shards=spec.n_shards,
        n_shards_done=done,
        d_in={hook.name: hook.d_in for hook in spec.hooks},
        bytes_per_token={name: n_bytes / spec.n_tokens for name, n_bytes in hook_bytes.items()},
        hook_bytes=hook_bytes,
        store_bytes=store,
        other_bytes=other,
        needed_bytes=needed,
        free_bytes=free,
        fits=shortage is None,
        collect_workers=workers,
        threads_per_worker=threads_per_worker(config),
        train_steps={}
        if config.train is None
        else dict.fromkeys(config.saes, config.train.n_tokens // config.train.batch_size),
        hours=hours,
        gpu_hours=gpus * hours["collect"] if gpus and hours["collect"] is not None else None,
        rates={name: round(rate, 1) for name, rate in rates.items()},
        rates_from=source,
        shortage=shortage,
    )


def require_room(plan: Plan) -> None:
    """Raises RunError if the plan does not fit the disk."""
    if plan.shortage is not None:
        raise RunError(
            f"the plan does not fit: {plan.shortage}; lower collect.n_tokens or the number of hooks, store int8 "
            "(collect.stored_dtype), or set collect.store to another disk"
        )


# -- sizes -------------------------------------------------------------------------------------------------------------


def planned_spec(config: RunConfig, widths: Mapping[str, int]) -> StoreSpec:
    """The store's shape before its text is packed: the last, incomplete context of each split is not counted."""
    from pipelines.collect import stored_hook
    from pipelines.tokens import TABLES

    length = config.collect.context_length
    n_contexts = max(1, -(-config.collect.n_tokens // length))
    return StoreSpec(
        n_contexts=n_contexts,
        context_length=length,
        contexts_per_shard=config.collect.contexts_per_shard,
        n_train_contexts=n_contexts - round(n_contexts * config.collect.heldout_fraction),
        tables=TABLES,
        hooks=tuple(stored_hook(config, name, widths[name]) for name in config.hooks),
        provenance={},
    )


def _resident_share(config: RunConfig, spec: StoreSpec) -> float:
    """Most of a streamed store that is on disk at once: what is kept, and the ring. Norms and tables are neglected."""
    from pipelines.collect import RETAINED_FRACTION

    kept = 1 - (1 - RETAINED_FRACTION) * spec.n_train_contexts / spec.n_contexts
    return min(1.0, kept + (config.collect.capacity_shards + 1) / spec.n_shards)


def _bytes_of_hook(spec: StoreSpec, name: str) -> int:
    """Bytes of all shards of a hook; for a compressed one the most that they can be."""
    last = spec.n_shards - 1
    arrays = shard_arrays(spec, spec.hook(name))
    return sum(last * array.file_bytes(0) + array.file_bytes(last) for array in arrays)


def _bytes_of_sae(config: RunConfig, name: str, widths: Mapping[str, int]) -> int:
    """Checkpoints (weights and two moments), dictionary, and the latents of every stored token."""
    d_in = widths[config.hook_of(name)]
    sae = config.saes[name]
    d_sae = sae.d_sae or round(sae.expansion_factor * d_in)
    weights = 4 * (2 * d_in * d_sae + d_in + 2 * d_sae)
    checkpoints = 0 if config.train is None else (config.train.checkpoints_kept + 1) * 3 * weights
    latents = config.collect.n_tokens * _l0(config, name) * LATENT_BYTES if config.label.enabled else 0
    return checkpoints + 2 * weights + latents


def _l0(config: RunConfig, name: str) -> int:
    """Active latents a token; for an architecture without `k` a usual number."""
    return int(getattr(config.saes[name], "k", None) or 64)


def shards_done(path: StorePlace, n_shards: int) -> int:
    """Shards of an unfinished or finished store there; none where there is no store, or one that cannot be read."""
    from storage import ActivationStore

    try:
        store = ActivationStore.open(path, tail=True)
        return store.spec.n_shards - len(store.missing()) if store.spec.n_shards == n_shards else 0
    except (StorageError, OSError):
        return 0


def _room(store: StorePlace, run: Path, store_bytes: int, other_bytes: int) -> tuple[int, int | None, str | None]:
    """Bytes to be written, bytes free for the store, and in words what does not fit where."""
    writes = [(run, other_bytes)]
    free_for_store = None
    if isinstance(store, Path):
        writes.insert(0, (store, store_bytes))
        free_for_store = shutil.disk_usage(_existing(store)).free
    by_device: dict[int, tuple[Path, int]] = {}
    for path, n_bytes in writes:
        first, before = by_device.get(_device(path), (path, 0))
        by_device[_device(path)] = (first, before + n_bytes)
    short = []
    for path, n_bytes in by_device.values():
        free = shutil.disk_usage(_existing(path)).free
        if n_bytes > free * (1 - FREE_SHARE):
            short.append(f"{size_text(n_bytes)} would be written below {path}, where {size_text(free)} are free")
    return store_bytes + other_bytes, free_for_store, "; ".join(short) or None


def _existing(path: Path) -> Path:
    path = path.absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _device(path: Path) -> int:
    return os.stat(_existing(path)).st_dev


# -- time --------------------------------------------------------------------------------------------------------------


def calibrated_rates(config: RunConfig, resolved: ResolvedModel, widths: Mapping[str, int]) -> dict[str, float]:
    """Tokens a second of one collect worker, of training all SAEs, and of a whole forward pass, measured here."""
    import torch

    from pipelines.models import LanguageModel

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads_per_worker(config))
        lm = LanguageModel(resolved, config.model)
        length, batch = config.collect.context_length, config.collect.batch_contexts
        n_vocabulary = int(lm.model.get_input_embeddings().weight.shape[0])
        tokens = torch.randint(n_vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))
        position = torch.arange(length).repeat(batch, 1).to(lm.device)
        tokens = tokens.to(lm.device)

        def synchronised(work: Callable[[], object]) -> Callable[[], None]:
            def run() -> None:
                work()
                if lm.device.type == "cuda":
                    torch.cuda.synchronize()

            return run

        def whole() -> None:
            with torch.inference_mode():
                lm.model(input_ids=tokens, position_ids=position, use_cache=False)

        forward = _seconds(synchronised(lambda: lm.capture(tokens, position, config.hooks)))
        rates = {"forward": batch * length / forward, "whole model": batch * length / _seconds(synchronised(whole))}
        del lm
        torch.set_num_threads(os.cpu_count() or 1)
        if config.train is not None:
            rates |= {
                f"train {name}": _training_rate(config, name, [widths[hook] for hook in config.hooks_of(name)])
                for name in config.saes
            }
        return rates
    finally:
        torch.set_num_threads(before)


def _training_rate(config: RunConfig, name: str, widths: Sequence[int]) -> float:
    """Tokens a second of training one SAE, on random activations."""
    import torch

    from pipelines.architectures import n_latents, sae_config
    from sae import Trainer, TrainerConfig, build

    assert config.train is not None
    spec = config.saes[name]
    d_sae = n_latents(spec, widths[0])
    try:
        n_trained = min(d_sae, CALIBRATION_LATENTS)
        sae = sae_config(spec.model_copy(update={"d_sae": n_trained}), widths)
    except ValueError:  # other settings, such as nested widths, need all latents
        n_trained, sae = d_sae, sae_config(spec, widths)
    rows = min(config.train.batch_size, 2048)
    generator = torch.Generator().manual_seed(0)
    batches = [tuple(torch.randn(rows, width, generator=generator) for width in widths) for _ in range(4)]
    device = "cuda" if config.train.use_gpu and torch.cuda.is_available() else "cpu"
    trainer = Trainer(build(sae, seed=0), TrainerConfig(), len(batches), device=device)
    trainer.initialise(batches[0])
    ends: list[float] = []

    def on_step(_: object) -> None:
        ends.append(time.perf_counter())

    trainer.fit(batches, on_step)
    step = statistics.median(after - before for before, after in pairwise(ends))
    return rows / step * n_trained / d_sae


def _seconds(work: Callable[[], object], least: int = 2, budget_s: float = 4.0) -> float:
    """Median duration after a warm-up."""
    work()
    spent: list[float] = []
    while len(spent) < least or (sum(spent) < budget_s and len(spent) < 10):
        began = time.perf_counter()
        work()
        spent.append(time.perf_counter() - began)
    return statistics.median(spent)


def recorded_rates(config: RunConfig, like: Path) -> dict[str, float]:
    """Tokens a second of each finished stage of another run, all of its workers together.

    Raises: RunError if no stage of it is finished.
    """
    from pipelines.configio import load_config

    other = load_config(like / "config.yaml")
    sizes = _stage_tokens(other)
    rates = {}
    for stage, n_tokens in sizes.items():
        marker = like / ".stages" / f"{stage}.json"
        if marker.exists() and (seconds := float(read_json(marker)["seconds"])) > 0:
            rates[stage] = n_tokens / seconds
    if not rates:
        raise RunError(f"{like} has no finished stage to take rates from; give another run to --like")
    return rates


def _stage_tokens(config: RunConfig) -> dict[str, int]:
    """Tokens that each stage works on."""
    stored = config.collect.n_tokens
    trained = 0 if config.train is None else config.train.n_tokens * len(config.saes)
    heldout = round(stored * config.collect.heldout_fraction) * len(config.saes)
    return {
        "collect": stored,
        "train": trained,
        "evaluate": heldout,
        "label": stored * len(config.saes),
        "audit": stored,
    }


def _hours(
    config: RunConfig, spec: StoreSpec, rates: Mapping[str, float], workers: int, done: int
) -> dict[str, float | None]:
    """Hours of every stage."""
    sizes = _stage_tokens(config)
    left = spec.n_tokens * (1 - done / spec.n_shards)
    if "collect" in rates:
        seconds: dict[str, float | None] = {
            stage: (left if stage == "collect" else n) / rates[stage] if stage in rates else None
            for stage, n in sizes.items()
        }
    elif "forward" in rates:
        trainings = [
            config.train.n_tokens / rates[f"train {name}"] / config.train.num_workers
            for name in config.saes
            if config.train is not None
        ]
        # One clean pass and three ablations for all, two splices an SAE.
        spliced = (4 + 2 * len(config.saes)) * config.evaluate.n_ce_tokens / rates["whole model"]
        # Encoding is the forward third of a training step.
        per_token = [1 / rates[f"train {name}"] / 3 for name in config.saes if f"train {name}" in rates]
        encoding = sum(per_token) * config.collect.n_tokens if per_token else None
        seconds = {
            "collect": left / (rates["forward"] * workers),
            "train": sum(trainings) if config.train is not None else 0.0,
            "evaluate": None if encoding is None else spliced + encoding * config.collect.heldout_fraction,
            "label": encoding if config.label.enabled else 0.0,
            "audit": None if config.audit.concepts else 0.0,
        }
    else:
        seconds = dict.fromkeys(sizes)
    return {stage: None if value is None else float(f"{value / 3600:.4g}") for stage, value in seconds.items()}


def _estimated_documents(config: RunConfig, resolved: ResolvedModel) -> int | None:
    """Documents that the tokens will come from, by the share of a small sample; None if there are too few texts."""
    from pipelines.collect import pack_texts

    n_sample = min(config.collect.n_tokens, max(SAMPLE_TOKENS, 40 * config.collect.context_length))
    sample = config.model_copy(update={"collect": config.collect.model_copy(update={"n_tokens": n_sample})})
    with tempfile.TemporaryDirectory() as cache:
        try:
            packed = pack_texts(sample, resolved, cache=Path(cache))
        except PipelineError:
            return None
    return math.ceil(len(packed.documents) * config.collect.n_tokens / n_sample)


def size_text(n_bytes: float) -> str:
    """Bytes for people, in decimal units as disks are sold."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if n_bytes < 1000:
            return f"{n_bytes:,.0f} {unit}" if unit == "bytes" else f"{n_bytes:,.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:,.1f} TB"


def _duration(hours: float | None) -> str:
    if hours is None:
        return "unknown"
    if hours < 1 / 60:
        return f"{hours * 3600:,.0f} s"
    return f"{hours * 60:,.0f} min" if hours < 1 else f"{hours:,.1f} h"


def plan_text(plan: Plan, as_json: bool) -> str:
    """What the command prints."""
    return json.dumps(plan.to_json(), indent=2, ensure_ascii=False) if as_json else "\n".join(plan.lines())
