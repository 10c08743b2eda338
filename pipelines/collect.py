"""collect: text → tokens → language model → activation store.

The driver plans: it chooses and packs the documents and creates the store with every token in it. Harvesters
(`harvester`), plain objects that Ray wraps in actors (`cluster.harvesters`), take shards, run the model up to the last
hook and commit them. A killed worker, node or driver loses at most the shards in flight.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.config import RunConfig
from pipelines.documents import DOCUMENTS_FILE, SPANS_FILE
from pipelines.errors import RunError
from pipelines.harvester import Harvester
from pipelines.models import ResolvedModel, load_tokenizer, resolve_model
from pipelines.progress import Reporter
from pipelines.rundir import RunDir
from pipelines.sources import locate
from pipelines.stores import StorePlace, has, place
from pipelines.tokenising import TextTokenizer
from pipelines.tokens import TABLES, Packed, plan_tokens
from storage import ActivationStore, ActivationWriter, HookSpec, IncompleteError, Receipt, StoreSpec, ring_sidecar
from storage.layout import RING as RING_FILE

RETAINED_FRACTION = 0.1
"""Least share of the training contexts that `collect.mode: stream` keeps."""

__all__ = ["Harvester", "collect", "hook_widths", "open_store", "pack_texts", "prepare_store", "store_path"]


def store_path(config: RunConfig, run: RunDir) -> StorePlace:
    """Where the run's activations are."""
    return place(config.collect.store) if config.collect.store else run.store_path


def open_store(config: RunConfig, run: RunDir) -> ActivationStore:
    """The sealed store of a run.

    Raises:
        RunError: collect has not finished.
    """
    path = store_path(config, run)
    if not has(path, "spec.json"):
        raise RunError(f"there is no activation store at {path}: run `sae collect` first")
    try:
        return ActivationStore.open(path)
    except IncompleteError as error:
        raise RunError(
            f"the activation store is unfinished ({error}): run `sae collect` again, it continues"
        ) from error


def collect(config: RunConfig, run: RunDir, ui: Reporter) -> dict[str, Any]:
    """Run the stage; returns its figures. Continues an unfinished store, refuses one made with another config."""
    if config.collect.mode == "stream":
        from pipelines.stream import stream

        return stream(config, run, ui)
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
    packed = pack_texts(config, resolved, ui=ui)
    spec = StoreSpec(
        n_contexts=len(packed.tokens),
        context_length=config.collect.context_length,
        contexts_per_shard=config.collect.contexts_per_shard,
        n_train_contexts=packed.n_train_contexts,
        tables=TABLES,
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
    sidecars = {DOCUMENTS_FILE: packed.documents.to_parquet(), SPANS_FILE: packed.spans.to_parquet()}
    if config.collect.mode == "stream":
        sidecars[RING_FILE] = ring_sidecar(spec, RETAINED_FRACTION)
    elif has(path, RING_FILE) and config.train is not None:
        raise RunError(
            f"the store at {path} was filled with collect.mode: stream and does not keep all training tokens: use that "
            "mode, or another store"
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
        tables=packed.tables,
        sidecars=sidecars,
    )


def pack_texts(
    config: RunConfig, resolved: ResolvedModel, *, ui: Reporter | None = None, cache: Path | None = None
) -> Packed:
    """Choose, tokenise and pack the documents; `cache` is the folder of tokenised sources, if not the usual one."""
    return plan_tokens(config.text, config.collect, text_tokenizer(config, resolved), config.seed, cache=cache, ui=ui)


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


def text_tokenizer(config: RunConfig, resolved: ResolvedModel) -> TextTokenizer:
    """The model's tokenizer, with the chat template of the config if that names one.

    Raises:
        UsageError: the template cannot be read, or the tokenizer is not usable.
    """
    template = None
    if config.collect.chat_template_path is not None:
        template = locate(config.collect.chat_template_path).read_text(encoding="utf-8")
    tokenizer = load_tokenizer(resolved, config.model.trust_remote_code)
    return TextTokenizer.of(tokenizer, chat_template=template, sha256=resolved.tokenizer_sha256)


def hook_widths(config: RunConfig, resolved: ResolvedModel) -> dict[str, int]:
    """Width of every hook, without loading weights.

    Raises:
        UsageError: a hook that the model does not have, with the nearest module names.
    """
    from pipelines.skeleton import probe_widths

    return probe_widths(resolved, config.hooks, config.model.trust_remote_code)


def _harvest_all(config: RunConfig, path: StorePlace, resolved: ResolvedModel, shards: list[int]) -> Iterator[Receipt]:
    """Receipts of the shards, as they become durable; without those that another driver does meanwhile."""
    from pipelines.cluster.harvesters import HarvesterPool

    queue = ActivationWriter.open(path).queue(shards)
    with queue, HarvesterPool(config, path, resolved, len(shards)) as pool:
        yield from pool.receipts(queue)
