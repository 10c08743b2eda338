"""The dictionary of a run before export: trained here or taken from elsewhere, and what it says about its origin."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.config import DictionarySource, RunConfig
from pipelines.errors import RunError, UsageError
from pipelines.rundir import RunDir
from pipelines.versions import versions
from sae import Dictionary
from storage import ActivationStore


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
        "imported_from": {
            **dictionary.metadata,
            **dictionary.provenance,
            "path": config.dictionary.path,
            "hook_names": list(dictionary.hook_names),
            "metrics": dictionary.metrics,
        },
    }
    Dictionary(dictionary.sae, hook_names=config.hooks_of(name), metadata=saelens_metadata(provenance)).save(
        run.trained(name), provenance=provenance, overwrite=True
    )
    return {}


def load_source(source: DictionarySource, hook: str, d_in: int) -> Dictionary:
    """The dictionary that a config names in place of `train:`.

    Raises:
        UsageError: it cannot be loaded, or its width is not `d_in`, that of the hook.
    """
    import pipelines.hub  # noqa: F401  for names that are no folder

    try:
        dictionary = Dictionary.load(source.path, subfolder=source.subfolder, revision=source.revision, verify=True)
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(f"dictionary.path: {error}") from error
    if dictionary.d_in != d_in:
        where = "/".join(part for part in (source.path, source.subfolder) if part)
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
        return Dictionary.load(run.trained(name), verify=True)
    except FileNotFoundError as error:
        raise RunError(f"the run has no trained dictionary {name!r}: run `sae train` first ({error})") from error
    except ValueError as error:
        raise RunError(
            f"{error} Delete {run.trained(name)} and run `sae train` again; it continues from the last checkpoint."
        ) from error


def dictionary_provenance(config: RunConfig, store: ActivationStore, hook: str) -> dict[str, Any]:
    """What a dictionary says about where it comes from."""
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


def saelens_metadata(provenance: dict[str, Any]) -> dict[str, Any]:
    """What SAELens looks for in cfg.json."""
    return {
        "model_name": provenance["model_name"],
        "context_size": provenance["context_size"],
        "dataset_path": ", ".join(text["origin"] for text in provenance["text"]),
        "prepend_bos": provenance["packing"]["prepend_bos"],
    }


def stored_input(store: ActivationStore, dictionary: Dictionary, start: int, stop: int) -> Tensor:
    """The stored activations that `dictionary.encode` takes, [stop - start, context_length, d_in]."""
    parts = [store.activations(hook, start, stop) for hook in dictionary.input_hooks]
    return parts[0] if len(parts) == 1 else torch.cat([part.float() for part in parts], dim=-1)


def stored_target(store: ActivationStore, dictionary: Dictionary, start: int, stop: int) -> Tensor:
    """What `dictionary` reconstructs, [stop - start, context_length, d_out]."""
    parts = [store.activations(hook, start, stop) for hook in dictionary.output_hooks]
    return parts[0] if len(parts) == 1 else torch.cat([part.float() for part in parts], dim=-1)


def dictionary_files(folder: Path) -> list[Path]:
    """The files without which a folder is no dictionary."""
    return [folder / name for name in ("dictionary.json", "cfg.json", "sae_weights.safetensors")]
