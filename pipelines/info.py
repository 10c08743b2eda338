"""Facts about a path for `sae info` and `sae verify`."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import UsageError
from pipelines.stores import StorePlace, has

if TYPE_CHECKING:
    from storage import StoreSpec


def describe(path: StorePlace) -> dict[str, Any]:
    """Facts about an activation store, a latent store, a dictionary folder or a run directory.

    Raises:
        UsageError: the path is none of them.
    """
    kind = _kind_of_store(path)
    if kind is not None:
        return _describe_store(path) if kind == "spec.json" else _describe_latents(path)
    if isinstance(path, str):
        raise UsageError(f"{path} is not a store: it has neither spec.json (activations) nor meta.json (latents)")
    if (path / "cfg.json").exists():
        return _describe_dictionary(path)
    if (path / "config.yaml").exists():
        return _describe_run(path)
    from sae.folder import is_dictionary

    if path.is_dir() and is_dictionary(path):
        return _describe_dictionary(path)
    raise UsageError(
        f"{path} is not a store (spec.json or meta.json), a dictionary (cfg.json, or another tool's files) or a run "
        "directory (config.yaml)"
    )


def store_problems(path: StorePlace, *, quick: bool = False) -> list[dict[str, Any]]:
    """What is wrong with the files of an activation or latent store.

    Args:
        quick: names and sizes only, without re-reading the data.

    Raises:
        UsageError: there is no store.
    """
    require_store(path)
    from storage import verify

    return [asdict(problem) for problem in verify(path, fast=quick)]


def require_store(path: StorePlace) -> None:
    """Raise UsageError unless the path looks like a store."""
    if _kind_of_store(path) is None:
        raise UsageError(f"{path} is not a store: it has neither spec.json (activations) nor meta.json (latents)")


def _kind_of_store(path: StorePlace) -> str | None:
    """The file that tells which kind of store is there."""
    return next((name for name in ("spec.json", "meta.json") if has(path, name)), None)


def store_bytes(spec: "StoreSpec") -> int:
    """Bytes of all arrays of a complete store; of compressed ones the most that they can be."""
    from storage.layout import shard_arrays, table_array

    arrays = [table_array(spec, name) for name in spec.table_dtypes]
    arrays += [array for hook in spec.hooks for array in shard_arrays(spec, hook)]
    return sum((array.n_files - 1) * array.file_bytes(0) + array.file_bytes(array.n_files - 1) for array in arrays)


def _describe_store(path: StorePlace) -> dict[str, Any]:
    from storage import ActivationStore

    sealed = has(path, "seal.json")
    store = ActivationStore.open(path, tail=not sealed)
    spec, missing = store.spec, store.missing()
    facts: dict[str, Any] = {
        "kind": "activation store",
        "fingerprint": spec.fingerprint,
        "tokens": spec.n_tokens,
        "contexts": f"{spec.n_contexts} of {spec.context_length} tokens, {spec.n_train_contexts} for training",
        "shards": f"{spec.n_shards - len(missing)} of {spec.n_shards}",
        "sealed": sealed,
        "bytes": store_bytes(spec),
        "tables": list(spec.table_dtypes),
        "provenance": spec.provenance,
    }
    for hook in spec.hooks:
        facts[hook.name] = f"d_in {hook.d_in}, {hook.dtype}"
        if hook.quantisation != "none" or hook.compression != "none":
            coding = [value for value in (hook.quantisation, hook.compression) if value != "none"]
            facts[hook.name] += f" as {' and '.join(coding)}, {store.compression_ratio(hook.name):.3g} times smaller"
        if sealed:
            statistics = store.statistics(hook.name)
            facts[hook.name] += (
                f", median norm {statistics.median_norm:.4g}, {statistics.n_sinks(3.0):,} sinks at 3 median norms"
            )
            if hook.quantisation != "none":
                facts[hook.name] += f", relative squared error {statistics.relative_error:.3g}"
            if statistics.n_nan or statistics.n_inf:
                facts[hook.name] += f", {statistics.n_nan:,} NaN and {statistics.n_inf:,} infinite elements"
    return facts


def _describe_latents(path: StorePlace) -> dict[str, Any]:
    from storage.backends import backend_for
    from storage.latents import latent_commit_log, read_meta

    backend = backend_for(path)
    meta = read_meta(backend)
    log, sealed = latent_commit_log(backend, meta), has(path, "seal.json")
    facts: dict[str, Any] = {
        "kind": "latent store",
        "fingerprint": meta["fingerprint"],
        "tokens": meta["n_rows"],
        "d_sae": meta["d_sae"],
        "shards": f"{len(log.committed())} of {log.n_shards}",
        "sealed": sealed,
    }
    if sealed:
        entries = int(log.read_seal()["n_entries"])
        facts |= {"active latents": entries, "a token": round(entries / max(1, int(meta["n_rows"])), 3)}
    return facts


def _describe_dictionary(path: Path) -> dict[str, Any]:
    from sae import Dictionary

    try:
        dictionary = Dictionary.load(path, verify=True)
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(str(error)) from error
    features = dictionary.features
    return {
        "kind": "dictionary",
        "architecture": dictionary.config.architecture,
        "hook_name": dictionary.hook_name,
        "d_in": dictionary.d_in,
        "d_sae": dictionary.d_sae,
        "features": 0 if features is None else features.num_rows,
        "metrics": {key: value for key, value in dictionary.metrics.items() if not isinstance(value, list)},
        "provenance": dictionary.provenance or dictionary.metadata,
    }


def _describe_run(path: Path) -> dict[str, Any]:
    from pipelines.configio import load_config
    from pipelines.run import STAGES, Run
    from pipelines.rundir import RunDir

    run = Run(load_config(path / "config.yaml"), RunDir(path))
    return {
        "kind": "run",
        "name": run.config.name,
        "stages": {stage: "finished" if run.finished(stage) else "to do" for stage in STAGES},
        "metrics": {key: value for key, value in run.dir.metrics().items() if not isinstance(value, list)},
    }
