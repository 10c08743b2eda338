"""Checkpoints for exact resume: one folder per step, safetensors and JSON only, written whole or not at all.

    DIRECTORY/step-00000150/tensors.safetensors
                            state.json           {"schema_version", "step", "values", "sha256" of the tensors}

A state is a flat mapping from names to tensors and JSON values, such as `Trainer.state_dict()` with the position of the
data stream added to it.
"""

import hashlib
import json
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from sae.architectures import empty
from sae.base import SAE
from sae.config import config_from_dict
from sae.normalise import Normaliser
from sae.trainer import folded

SCHEMA_VERSION = 1
_TENSORS, _STATE = "tensors.safetensors", "state.json"


def save_checkpoint(directory: str | os.PathLike[str], step: int, state: Mapping[str, Any], *, keep: int = 2) -> Path:
    """Write the state of `step`, then remove all but the `keep` newest checkpoints. Returns its folder.

    A process killed at any moment leaves the earlier checkpoints intact. Saving a step again replaces it.
    """
    root = Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    for abandoned in root.glob(".step-*.tmp"):
        shutil.rmtree(abandoned, ignore_errors=True)
    tensors = {
        name: value.detach().cpu().contiguous() for name, value in state.items() if isinstance(value, torch.Tensor)
    }
    values = {name: value for name, value in state.items() if not isinstance(value, torch.Tensor)}
    payload = save_tensors(tensors)
    record = {
        "schema_version": SCHEMA_VERSION,
        "step": step,
        "values": values,
        "sha256": hashlib.sha256(payload).hexdigest(),
    }
    target = root / f"step-{step:08d}"
    staging = root / f".{target.name}.{uuid.uuid4().hex}.tmp"
    staging.mkdir()
    _write(staging / _TENSORS, payload)
    _write(staging / _STATE, json.dumps(record, indent=2, sort_keys=True, allow_nan=False).encode())
    _fsync(staging)
    if target.exists():
        shutil.rmtree(target)
    staging.rename(target)
    _fsync(root)
    for outdated in checkpoints(root)[:-keep]:
        shutil.rmtree(outdated)
    return target


def latest_checkpoint(directory: str | os.PathLike[str]) -> Path | None:
    """The newest checkpoint that is whole, None if there is none. Warns about each damaged one that it passes over."""
    for folder in reversed(checkpoints(directory)):
        try:
            load_checkpoint(folder)
        except (ValueError, FileNotFoundError) as error:
            warnings.warn(f"Skipping a damaged checkpoint, the one before it is used: {error}", stacklevel=2)
        else:
            return folder
    return None


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The state that `save_checkpoint` wrote to this folder.

    Raises:
        FileNotFoundError: if the folder or a file of it is missing.
        ValueError: if a file is damaged, or written by another schema version.
    """
    folder = Path(path)
    for name in (_STATE, _TENSORS):
        if not (folder / name).exists():
            raise FileNotFoundError(
                f"A checkpoint folder holds {_STATE} and {_TENSORS}, but {folder / name} is missing."
            )
    try:
        record = json.loads((folder / _STATE).read_bytes())
    except ValueError as error:
        raise ValueError(f"{folder / _STATE} must hold JSON: {error}. Delete this checkpoint.") from error
    if not isinstance(record, dict) or record.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"`schema_version` in {folder / _STATE} must be {SCHEMA_VERSION}. Resume with the version that wrote it."
        )
    payload = (folder / _TENSORS).read_bytes()
    if hashlib.sha256(payload).hexdigest() != record["sha256"]:
        raise ValueError(
            f"{folder / _TENSORS} is not the file that {_STATE} records (sha256 differs). Delete this checkpoint."
        )
    try:
        tensors = load_tensors(payload)
    except SafetensorError as error:
        raise ValueError(f"{folder / _TENSORS} must be a safetensors file: {error}. Delete this checkpoint.") from error
    return {**record["values"], **tensors}


def exported_sae(state: Mapping[str, Any]) -> SAE:
    """The SAE of raw activations in a saved `Trainer.state_dict()`, on the CPU: what `Trainer.export` gives."""
    sae = empty(config_from_dict(state["sae_config"]))
    sae.load_state_dict({name: state[f"sae.{name}"] for name in sae.state_dict()})
    scales = state["normaliser_scales"]
    return folded(sae, [Normaliser(state[f"normaliser_shift.{i}"], torch.tensor(s)) for i, s in enumerate(scales)])


def checkpoints(directory: str | os.PathLike[str]) -> list[Path]:
    """The checkpoint folders in a directory, oldest first; whether they are whole is not looked at."""
    root = Path(directory)
    if not root.is_dir():
        return []
    return sorted(folder for folder in root.iterdir() if re.fullmatch(r"step-\d{8,}", folder.name))


def _write(file: Path, content: bytes) -> None:
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _fsync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
