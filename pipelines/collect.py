"""collect: text → tokens → language model → activation store.

The driver plans: it chooses and packs the documents and creates the store with every token in it. Harvesters, plain
objects that Ray wraps in actors, each take one shard at a time, run the model up to the last hook and commit the
shard. A killed worker or driver loses at most the shards in flight.
"""

import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from pipelines.cluster.local import require_cpus, start_ray
from pipelines.config import ModelConfig, RunConfig
from pipelines.documents import DOCUMENTS_FILE, SPANS_FILE
from pipelines.errors import RunError
from pipelines.models import LanguageModel, ResolvedModel, load_tokenizer, resolve_model
from pipelines.progress import Reporter
from pipelines.rundir import RunDir
from pipelines.tokens import plan_tokens
from storage import ActivationStore, ActivationWriter, HookSpec, IncompleteError, Receipt, StoreSpec


def store_path(config: RunConfig, run: RunDir) -> Path:
    """Where the run's activations are."""
    return Path(config.collect.store) if config.collect.store else run.store_path


def open_store(config: RunConfig, run: RunDir) -> ActivationStore:
    """The sealed store of a run.

    Raises:
        RunError: collect has not finished.
    """
    path = store_path(config, run)
    if not path.exists():
        raise RunError(f"there is no activation store at {path}: run `sae collect` first")
    try:
        return ActivationStore.open(path)
    except IncompleteError as error:
        raise RunError(
            f"the activation store is unfinished ({error}): run `sae collect` again, it continues"
        ) from error


class Harvester:
    """Fills shards of one store; knows no Ray. The model comes with the first shard, whose caller hears what fails."""

    def __init__(
        self, path: Path, resolved: ResolvedModel, config: ModelConfig, batch_contexts: int, n_threads: int | None
    ) -> None:
        if n_threads is not None:
            torch.set_num_threads(n_threads)
        self._resolved, self._config = resolved, config
        self._writer = ActivationWriter.open(path)
        self._store = ActivationStore.open(path, tail=True)
        self._hooks = [hook.name for hook in self._writer.spec.hooks]
        self._batch = batch_contexts

    @cached_property
    def _lm(self) -> LanguageModel:
        lm = LanguageModel(self._resolved, self._config)
        if self._writer.spec.provenance["packing"]["isolate_documents"]:
            for hook in self._hooks:
                lm.check_isolation(hook)
        return lm

    def harvest(self, shard: int) -> Receipt:
        """Run the model on one shard's contexts and commit them. Batches are a function of the shard alone."""
        start, stop = self._writer.spec.shard_range(shard)
        contexts = self._store.contexts(start, stop)
        tokens, position = torch.from_numpy(contexts.tokens).long(), torch.from_numpy(contexts.position).long()
        if not self._writer.spec.provenance["packing"]["isolate_documents"]:
            position = torch.arange(tokens.shape[1]).expand_as(tokens)
        batches: dict[str, list[torch.Tensor]] = {name: [] for name in self._hooks}
        for low in range(0, len(tokens), self._batch):
            rows = slice(low, low + self._batch)
            captured = self._lm.capture(
                tokens[rows].to(self._lm.device), position[rows].to(self._lm.device), self._hooks
            )
            for name, value in captured.items():
                batches[name].append(value.cpu())
        return self._writer.write_shard(shard, {name: _to_numpy(torch.cat(parts)) for name, parts in batches.items()})


def _to_numpy(activations: torch.Tensor) -> Any:
    if activations.dtype == torch.bfloat16:
        return activations.contiguous().view(torch.uint16).numpy()
    return activations.contiguous().numpy()


def collect(config: RunConfig, run: RunDir, ui: Reporter) -> dict[str, Any]:
    """Run the stage; returns its figures. Continues an unfinished store, refuses one made with another config."""
    resolved = resolve_model(config.model)
    writer = prepare_store(config, run, resolved, ui)
    spec = writer.spec
    missing = writer.missing()
    began, written = time.monotonic(), 0
    with ui.stage(
        "collect", total=spec.n_tokens, unit="tokens", done=_tokens(spec, set(range(spec.n_shards)) - set(missing))
    ) as bar:
        if missing:
            for receipt in _harvest_all(config, store_path(config, run), resolved, missing):
                written += receipt.n_tokens
                bar.advance(receipt.n_tokens)
                run.event("shard", shard=receipt.shard, tokens=receipt.n_tokens)
    seconds = time.monotonic() - began
    writer.seal()
    figures = {
        "n_tokens": spec.n_tokens,
        "n_train_tokens": spec.n_train_contexts * spec.context_length,
        "fingerprint": spec.fingerprint,
    }
    run.update_metrics("collect", figures)
    return figures | {"tokens_per_s": round(written / seconds, 1) if written else None}


def _tokens(spec: StoreSpec, shards: set[int]) -> int:
    return sum((stop - start) * spec.context_length for start, stop in map(spec.shard_range, shards))


def prepare_store(config: RunConfig, run: RunDir, resolved: ResolvedModel, ui: Reporter) -> ActivationWriter:
    """Plan the tokens and create the store, or open it when it is the same one.

    Raises:
        storage.SpecMismatchError: the store there was made with another config.
    """
    path = store_path(config, run)
    widths = hook_widths(config, resolved)
    packed = plan_tokens(
        config.text, config.collect, load_tokenizer(resolved, config.model.trust_remote_code), config.seed
    )
    spec = StoreSpec(
        n_contexts=len(packed.tokens),
        context_length=config.collect.context_length,
        contexts_per_shard=config.collect.contexts_per_shard,
        n_train_contexts=packed.n_train_contexts,
        hooks=tuple(stored_hook(config, name, widths[name]) for name in config.hooks),
        provenance={
            "model": resolved.provenance(),
            "text": packed.text_provenance,
            "packing": {
                "seed": config.seed,
                "n_tokens": config.collect.n_tokens,
                "heldout_fraction": config.collect.heldout_fraction,
                "isolate_documents": config.collect.isolate_documents,
                "prepend_bos": config.collect.prepend_bos,
            },
            "forward": {
                "batch_contexts": config.collect.batch_contexts,
                "attention": "sdpa",
                "dtype": config.model.dtype,
            },
        },
    )
    topics = {topic for topic in packed.documents.topic if topic}
    ui.say(
        f"text: {spec.n_tokens:,} tokens of {len(packed.documents):,} documents in {spec.n_contexts:,} contexts"
        + (f", {len(topics)} topics" if topics else "")
    )
    return ActivationWriter.create(
        path,
        spec,
        tokens=packed.tokens,
        document=packed.document,
        position=packed.position,
        sidecars={DOCUMENTS_FILE: packed.documents.to_parquet(), SPANS_FILE: packed.spans.to_parquet()},
    )


def stored_hook(config: RunConfig, name: str, d_in: int) -> HookSpec:
    """How a hook's activations are stored: int8 reads back in the model's dtype."""
    wanted = config.collect.stored_dtype
    return HookSpec(
        name=name,
        d_in=d_in,
        dtype=config.model.dtype if wanted == "auto" or wanted == "int8" else wanted,
        quantisation="int8" if wanted == "int8" else "none",
        compression=config.collect.compression,
    )


def hook_widths(config: RunConfig, resolved: ResolvedModel) -> dict[str, int]:
    """Width of every hook, without loading weights.

    Raises:
        UsageError: a hook that the model does not have, with the nearest module names.
    """
    from pipelines.skeleton import probe_widths

    return probe_widths(resolved, config.hooks, config.model.trust_remote_code)


def _harvest_all(config: RunConfig, path: Path, resolved: ResolvedModel, shards: list[int]) -> Iterator[Receipt]:
    """Hand out shards to actors, one at a time each; yields receipts as they come.

    Only an actor that has started gets a shard: where the CPUs suffice for some of the actors, those do all the work.
    """
    settings = config.collect
    require_cpus(config.ray, settings.cpus_per_worker, "collect.cpus_per_worker")
    start_ray(config.ray)
    import ray

    threads = max(1, int(settings.cpus_per_worker))
    actor_class = ray.remote(
        num_cpus=settings.cpus_per_worker, num_gpus=settings.gpus_per_worker, max_restarts=-1, max_task_retries=-1
    )(Harvester)
    n_workers = min(settings.n_workers, len(shards))
    actors = [
        actor_class.remote(path.resolve(), resolved, config.model, settings.batch_contexts, threads)
        for _ in range(n_workers)
    ]
    try:
        queue, n_done = iter(shards), 0
        in_flight = {actor.__ray_ready__.remote(): actor for actor in actors}
        while n_done < len(shards):
            (done, *_), _ = ray.wait(list(in_flight), num_returns=1)
            actor = in_flight.pop(done)
            try:
                receipt = ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise error.cause or error from None
            except ray.exceptions.RayActorError as error:
                raise RunError(f"a collect worker could not be kept alive: {error}; rerun to continue") from error
            next_shard = next(queue, None)
            if next_shard is not None:
                in_flight[actor.harvest.remote(next_shard)] = actor
            if isinstance(receipt, Receipt):  # not the answer that the actor has started
                n_done += 1
                yield receipt
    finally:
        for actor in actors:
            ray.kill(actor)
