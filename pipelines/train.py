"""train: activation store → trained dictionary, through Ray Train.

The driver checks the settings, starts one `TorchTrainer` for all SAEs of the run, whose workers run `train_worker`, and
follows the steps that rank 0 records. Resuming is ours, from checkpoints in the run directory: it works when driver and
cluster are gone.
"""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.architectures import n_latents, sae_config
from pipelines.cluster.local import require_cpus
from pipelines.cluster.training import run_ray
from pipelines.collect import open_store, store_path
from pipelines.config import CollectConfig, RayConfig, RunConfig, SAESpec, TrainConfig
from pipelines.dictionaries import dictionary_files, dictionary_provenance, import_dictionary
from pipelines.errors import RunError, UsageError
from pipelines.progress import Reporter
from pipelines.rundir import RunDir
from pipelines.selection import Selection, selected
from pipelines.stores import absolute
from pipelines.training.job import MemberJob, TrainJob
from pipelines.training.metrics import METRICS_FILE, last_line
from pipelines.training.trackers import missing_library
from pipelines.training.warm_start import absolute_if_here, identity_of, start_from
from sae import Dictionary, Normaliser
from sae.architectures import empty
from sae.features import require_splittable
from storage import ActivationStore

EVALUATE_EVERY = 100
"""Default of `train.evaluate_every`: held-out figures then cost about 1 % of training."""


def train(config: RunConfig, run: RunDir, ui: Reporter) -> dict[str, dict[str, Any]]:
    """Train every SAE of the run; returns the last step's figures of each."""
    store = open_store(config, run)
    if config.train is None:
        return {name: import_dictionary(config, run, name, store) for name in config.saes}
    check_settings(config, {hook.name: hook.d_in for hook in store.spec.hooks})
    _require_one_batch(config.train, store, config.selection("train"))
    if todo := untrained(config, run):
        if config.collect.mode == "stream":
            raise RunError(
                f"there is no trained dictionary in {run.trained(todo[0])}, and the activations that it was trained "
                "on were deleted as they streamed by: start over in another --out"
            )
        run_ray(make_job(config, run, todo, store), config.ray, scratch_path(run), ui)
    figures = {name: last_line(run.checkpoints(name) / METRICS_FILE) for name in config.saes}
    for name, last in figures.items():
        run.event("mixing", sae=name, expected_same_context=last.get("expected_same_context"))
    return figures


def scratch_path(run: RunDir) -> Path:
    """Where a training job keeps what is only needed while it runs."""
    return run.path / "checkpoints" / ".ray"


def untrained(config: RunConfig, run: RunDir) -> list[str]:
    """SAEs of the run whose dictionaries are not there."""
    return [name for name in config.saes if not is_trained(run, name)]


def make_job(config: RunConfig, run: RunDir, names: str | Sequence[str], store: ActivationStore) -> TrainJob:
    """The job of one SAE, or of several that share every batch."""
    assert config.train is not None
    return TrainJob(
        store=str(absolute(store_path(config, run))),
        members=tuple(_member_job(config, run, name, store) for name in ([names] if isinstance(names, str) else names)),
        config=config.train,
        sinks=config.sinks,
        seed=config.seed,
        n_threads=_threads_per_worker(config.train, config.ray),
        selection=config.selection("train"),
        evaluate_every=_evaluate_every(config),
        model=config.model if config.train.evaluate_ce_tokens else None,
    )


def _evaluate_every(config: RunConfig) -> int:
    assert config.train is not None
    by_default = 0 if config.collect.mode == "stream" else EVALUATE_EVERY
    return by_default if config.train.evaluate_every is None else config.train.evaluate_every


def init_from(train: TrainConfig, name: str) -> str | None:
    """The dictionary that an SAE starts from."""
    return train.init_from.get(name) if isinstance(train.init_from, dict) else train.init_from


def _member_job(config: RunConfig, run: RunDir, name: str, store: ActivationStore) -> MemberJob:
    spec = config.saes[name]
    provenance = dictionary_provenance(config, store, config.hook_of(name))
    if spec.seed is not None:
        provenance |= {"seed_of_weights": spec.seed}
    assert config.train is not None
    source = init_from(config.train, name)
    if source is not None:
        provenance |= {"init_from": identity_of(load_start(source), source)}
    return MemberJob(
        name=name,
        title=f"{config.name}/{name}",
        hooks=config.hooks_of(name),
        spec=spec,
        seed=config.seed if spec.seed is None else spec.seed,
        checkpoints=str(run.checkpoints(name).resolve()),
        output=str(run.trained(name).resolve()),
        provenance=provenance,
        init_from=None if source is None else absolute_if_here(source),
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
    problems += _start_problems(config, widths)
    problems += [
        f"train.trackers names {name}, but {library} is not installed: install the extra `trackers`, or drop it"
        for name in config.train.trackers
        if (library := missing_library(name)) is not None
    ]
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
            configured = sae_config(spec, widths)
            if train.layout == "features":
                require_splittable(configured, train.num_workers)
        except ValueError as error:
            problems.append(f"saes.{name}: {error}")
    if train.n_tokens < train.batch_size:
        problems.append(f"train.n_tokens ({train.n_tokens:,}) is less than one batch ({train.batch_size:,})")
    if train.batch_size % train.streams:
        problems.append(f"train.batch_size ({train.batch_size}) must be a multiple of train.streams ({train.streams})")
    if train.layout == "data" and train.streams % train.num_workers:
        problems.append(
            f"train.streams ({train.streams}) must be a multiple of train.num_workers ({train.num_workers})"
        )
    return problems


def load_start(source: str) -> Dictionary:
    """The dictionary that `train.init_from` names.

    Raises:
        UsageError: it cannot be loaded.
    """
    try:
        return Dictionary.load(source)
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(f"train.init_from: {error}") from error


def _start_problems(config: RunConfig, widths: Mapping[str, int]) -> list[str]:
    """Dictionaries that an SAE cannot start from."""
    assert config.train is not None
    given = config.train.init_from
    unknown = sorted(given.keys() - config.saes.keys()) if isinstance(given, dict) else []
    problems = [f"train.init_from names {name!r}, which is not under `saes:`" for name in unknown]
    for name, spec in config.saes.items():
        if (source := init_from(config.train, name)) is None:
            continue
        d_ins = [widths[hook] for hook in config.hooks_of(name)]
        try:
            sae = empty(sae_config(spec, d_ins))
        except ValueError:
            continue  # reported already
        try:
            start_from(sae, load_start(source), [Normaliser.none(width) for width in sae.batch_widths])
        except ValueError as error:
            problems.append(f"train.init_from for saes.{name} ({source}): {error}".replace("train.init_from: ", ""))
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


def is_trained(run: RunDir, name: str) -> bool:
    """Whether the SAE's dictionary is there."""
    return all(file.exists() for file in dictionary_files(run.trained(name)))
