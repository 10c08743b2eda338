"""A small store with known contents, for the tests and for the processes that they start."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from storage import ActivationWriter, HookSpec, StoreSpec, TableSpec
from storage.backends import Backend

WIDE, NARROW, DEEP = "model.layers.8", "model.layers.1:input", "model.layers.11"
SIDECARS = {"documents.parquet": b"opaque"}


def spec(*, n_contexts: int = 10, context_length: int = 8, contexts_per_shard: int = 4, seed: int = 0) -> StoreSpec:
    return StoreSpec(
        n_contexts=n_contexts,
        context_length=context_length,
        contexts_per_shard=contexts_per_shard,
        n_train_contexts=n_contexts - n_contexts // 4,
        hooks=(HookSpec(WIDE, 12), HookSpec(NARROW, 4, "float32")),
        tables=(TableSpec("flags", "uint8"), TableSpec("source", "int16")),
        provenance={"model": {"id": "tiny", "sha256": "00"}, "seed": seed},
    )


def coded_spec() -> StoreSpec:
    """As `spec`, but one hook is quantised, one compressed, and a third both."""
    hooks = (
        HookSpec(WIDE, 12, quantisation="int8"),
        HookSpec(NARROW, 4, "float32", compression="blosc"),
        HookSpec(DEEP, 12, "float32", quantisation="int8", compression="blosc"),
    )
    return StoreSpec(**{**vars(spec()), "hooks": hooks})


def tables(spec: StoreSpec) -> dict[str, NDArray[np.int64]]:
    """Tokens 0, 1, 2, …; two documents per context, the second from the middle on."""
    shape = (spec.n_contexts, spec.context_length)
    half = spec.context_length // 2
    offset = np.arange(spec.context_length)
    return {
        "tokens": np.arange(spec.n_tokens).reshape(shape),
        "document": 2 * np.arange(spec.n_contexts)[:, None] + (offset >= half),
        "position": np.broadcast_to(np.where(offset < half, offset, offset - half), shape).copy(),
    }


def extra_tables(spec: StoreSpec) -> dict[str, NDArray[np.int64]]:
    """BOS at the start of each document, the last token of every fourth context padding; sources -1, 0, 1, -1, …"""
    flags = (tables(spec)["position"] == 0).astype(np.int64)
    flags[3::4, -1] = 2
    return {"flags": flags, "source": np.arange(spec.n_tokens).reshape(flags.shape) % 3 - 1}


def activations(spec: StoreSpec, seed: int = 0) -> dict[str, NDArray[np.uint16] | NDArray[np.float32]]:
    """All activations per hook [n_contexts, context_length, d_in], as given; finite, none zero."""
    rng = np.random.default_rng(seed)
    wide = rng.normal(3.0, 1.0, (spec.n_contexts, spec.context_length, 12)).astype(np.float32)
    narrow = rng.normal(-1.0, 2.0, (spec.n_contexts, spec.context_length, 4)).astype(np.float32)
    values = {WIDE: (wide.view(np.uint32) >> 16).astype(np.uint16), NARROW: narrow, DEEP: wide}
    return {hook.name: values[hook.name] for hook in spec.hooks}


def fill(writer: ActivationWriter, seed: int = 0) -> None:
    values = activations(writer.spec, seed)
    for shard in writer.missing():
        start, stop = writer.spec.shard_range(shard)
        writer.write_shard(shard, {hook: array[start:stop] for hook, array in values.items()})


def create(path: Path | str, wanted: StoreSpec | None = None, *, backend: Backend | None = None) -> ActivationWriter:
    wanted = wanted or spec()
    return ActivationWriter.create(
        path, wanted, **tables(wanted), tables=extra_tables(wanted), sidecars=SIDECARS, backend=backend
    )


def build(path: Path | str, wanted: StoreSpec | None = None, *, backend: Backend | None = None, seed: int = 0) -> None:
    """Creates, fills and seals; goes on where a killed process stopped."""
    writer = create(path, wanted, backend=backend)
    fill(writer, seed)
    writer.seal()


def contents(path: Path) -> dict[str, bytes]:
    """Every file that must be the same however the store came about: all but commits, seal and staging."""
    files = (file for file in path.rglob("*") if file.is_file())
    keys = {str(file.relative_to(path)): file for file in files}
    return {
        key: file.read_bytes()
        for key, file in keys.items()
        if not key.startswith(("commits/", "staging/", "seal.json"))
    }
