"""The dictionary folder: what is in it, and reading and writing it whole.

cfg.json, sae_weights.safetensors, sparsity.safetensors     the SAELens 6 layout (`sae.interop.saelens`)
dictionary.json                                             ours and authoritative
features.parquet                                            one row per latent, optional

dictionary.json holds `schema_version`, `config` (the trained architecture and its k), `hook_name`, `hook_names`,
`provenance`, `metrics`, and `sha256` of cfg.json and of the weights. A folder without it is of another tool
(`sae.interop`).
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from sae.base import SAE
from sae.config import SAEConfig, config_from_dict
from sae.interop import read_file, read_foreign, recognise
from sae.interop.files import contained, parse_json, read_safetensors
from sae.interop.saelens import CFG, SPARSITY, WEIGHTS, from_saelens, hook_metadata, to_saelens

SCHEMA_VERSION = 1
DICTIONARY, FEATURES = "dictionary.json", "features.parquet"
_SKIPPED = {".git", "checkpoints", "activations"}
"""Folders without dictionaries of their own: a training run's states, a store."""


class Contents(NamedTuple):
    """What a folder holds beside its tables."""

    sae: SAE
    hook_names: tuple[str, ...]
    metadata: Mapping[str, Any]
    provenance: Mapping[str, Any]
    metrics: Mapping[str, Any]


def is_dictionary(folder: Path) -> bool:
    """Whether the folder is a dictionary, ours or of a tool whose files are known.

    Raises: ValueError if it is of several tools at once.
    """
    return (folder / DICTIONARY).is_file() or recognise(folder) is not None


def list_dictionaries(root: Path) -> list[str]:
    """Relative paths ("." for the root itself) of the dictionary folders at and below a folder, sorted."""
    found = []
    for path, folders, _ in os.walk(root):
        folder = Path(path)
        if is_dictionary(folder):
            found.append(folder.relative_to(root).as_posix())
        folders[:] = sorted(name for name in folders if name not in _SKIPPED and not name.startswith("."))
    return sorted(found)


def read(place: Path, *, verify: bool) -> Contents:
    """The dictionary in a folder, or in a file of a format that is a single file.

    Args:
        verify: compare the weights with the hash in dictionary.json. cfg.json is always compared.
    Raises:
        FileNotFoundError: if a needed file does not exist.
        ValueError: if something is damaged or of an unknown kind, naming the file and the key or tensor.
    """
    if place.is_file():
        foreign = read_file(place)
    elif (place / DICTIONARY).exists():
        return _read_ours(place, verify)
    else:
        known = recognise(place)
        if known is None:
            raise FileNotFoundError(
                f"A dictionary folder holds {DICTIONARY}, {CFG} and {WEIGHTS}, or the files of a tool that is known, "
                f"but in {place} {WEIGHTS} is missing, as is any other. {_below(place)}"
            )
        if WEIGHTS in known[1]:
            _require(place / CFG if CFG in known[1] else place / WEIGHTS)
        foreign = read_foreign(place, *known)
    return Contents(*foreign, provenance={}, metrics={})


def _below(place: Path) -> str:
    below = [name for name in list_dictionaries(place) if name != "."][:5]
    return f"There are some below it: {', '.join(below)}. Pass one as `subfolder`." if below else "Check the path."


def _read_ours(folder: Path, verify: bool) -> Contents:
    record = parse_json(folder / DICTIONARY, _require(folder / DICTIONARY).read_bytes())
    cfg_bytes = _require(contained(folder, CFG)).read_bytes()
    weights = _require(contained(folder, WEIGHTS))
    config = _check_record(folder, record, cfg_bytes, verify)
    cfg = parse_json(folder / CFG, cfg_bytes)
    tensors = read_safetensors(weights)
    try:
        sae = from_saelens(cfg, tensors, config)
    except ValueError as error:
        raise ValueError(
            f"The dictionary in {folder} cannot be loaded ({CFG}, {WEIGHTS}): {error} "
            "Restore the folder from its source."
        ) from error
    hooks = record.get("hook_names") or [name for name in (record.get("hook_name"),) if name]
    return Contents(
        sae,
        tuple(hooks),
        cfg.get("metadata") or {},
        record.get("provenance") or {},
        record.get("metrics") or {},
    )


def _check_record(folder: Path, record: Mapping[str, Any], cfg_bytes: bytes, verify: bool) -> SAEConfig:
    """The trained configuration in dictionary.json, once its schema and hashes are known to hold."""
    file = folder / DICTIONARY
    version = record.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"`schema_version` in {file} must be {SCHEMA_VERSION}, got {version!r}. "
            "Load it with the version that wrote it."
        )
    hashes = record.get("sha256")
    if not isinstance(hashes, Mapping) or not {CFG, WEIGHTS} <= hashes.keys() or "config" not in record:
        raise ValueError(f"{file} must hold `config` and `sha256` of {CFG} and {WEIGHTS}. Restore it from its source.")
    if hashlib.sha256(cfg_bytes).hexdigest() != hashes[CFG]:
        raise ValueError(
            f"{folder / CFG} is not the file that {DICTIONARY} records (sha256 differs). "
            f"{DICTIONARY} is authoritative: restore {CFG}, or save the dictionary again."
        )
    if verify and _sha256(folder / WEIGHTS) != hashes[WEIGHTS]:
        raise ValueError(
            f"{folder / WEIGHTS} is not the file that {DICTIONARY} records (sha256 differs). "
            "Restore it from its source."
        )
    try:
        return config_from_dict(record["config"])
    except ValueError as error:
        raise ValueError(f"`config` in {file} cannot be read: {error}") from error


def _require(file: Path) -> Path:
    if not file.exists():
        raise FileNotFoundError(
            f"A dictionary folder holds {CFG} and {WEIGHTS}, but {file} is missing. Check the path."
        )
    return file


# ---- writing ---------------------------------------------------------------------------------------------------------


def write(
    target: Path,
    sae: SAE,
    *,
    hook_names: Sequence[str],
    output_hooks: Sequence[str],
    metadata: Mapping[str, Any],
    provenance: Mapping[str, Any],
    metrics: Mapping[str, Any],
    sparsity: Float[Tensor, " d_sae"] | None,
    features: Any,
    overwrite: bool,
) -> None:
    """Write the folder; it appears whole or not at all.

    Raises:
        FileExistsError: if the folder exists and `overwrite` is off.
    """
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists already. Choose another folder or pass overwrite=True to replace it.")
    metadata = dict(metadata) | (hook_metadata("", hook_names[0]) if hook_names else {})
    if len(hook_names) > 1:
        metadata |= hook_metadata("_out", output_hooks[0]) | {"hook_names": list(hook_names)}
    cfg, tensors = to_saelens(sae, metadata)
    cfg_bytes = _json_bytes(cfg)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    staging.mkdir()
    try:
        (staging / CFG).write_bytes(cfg_bytes)
        save_file(tensors, staging / WEIGHTS)
        if sparsity is not None:
            save_file({"sparsity": (sparsity.double() + 1e-10).log10().float()}, staging / SPARSITY)
        if features is not None:
            import pyarrow.parquet

            pyarrow.parquet.write_table(features, staging / FEATURES)
        record = {
            "schema_version": SCHEMA_VERSION,
            "config": asdict(sae.config),
            "hook_name": hook_names[0] if hook_names else None,
            "hook_names": list(hook_names),
            "provenance": dict(provenance),
            "metrics": dict(metrics),
            "sha256": {CFG: hashlib.sha256(cfg_bytes).hexdigest(), WEIGHTS: _sha256(staging / WEIGHTS)},
        }
        (staging / DICTIONARY).write_bytes(_json_bytes(record))
        _publish(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _publish(staging: Path, target: Path) -> None:
    """Make the staged folder durable and put it in place of whatever is there."""
    for file in (*staging.iterdir(), staging):
        _fsync(file)
    if target.exists():
        replaced = staging.with_suffix(".old")
        target.rename(replaced)
        staging.rename(target)
        shutil.rmtree(replaced)
    else:
        staging.rename(target)
    _fsync(target.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _json_bytes(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
