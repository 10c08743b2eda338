"""Dictionary: a trained SAE with what is known about it, in one folder that SAELens reads too.

cfg.json, sae_weights.safetensors, sparsity.safetensors     the SAELens 6 layout (`sae.interop.saelens`)
dictionary.json                                             ours and authoritative, see `Dictionary.save`
features.parquet                                            one row per latent, optional
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae.base import SAE, SparseLatents
from sae.config import SAEConfig, config_from_dict
from sae.crosscoder import Crosscoder
from sae.edits import Edit, Exclude, Excluded
from sae.interop.saelens import from_saelens, to_saelens
from sae.tapping import Tap, attach
from sae.transcoder import Transcoder

SCHEMA_VERSION = 1
_CFG, _WEIGHTS, _SPARSITY = "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"
_DICTIONARY, _FEATURES = "dictionary.json", "features.parquet"


class Dictionary:
    """A trained SAE, where it belongs in a language model, and its provenance, metrics and feature table.

    `encode` and `decode` run without gradients; use `dictionary.sae` for differentiable calls.

    Args:
        hook_name: the module whose activations the SAE reads, such as "model.layers.8".
        hook_names: for an SAE of several hooks, one for each tensor of its training batches: a transcoder's input and
            target, a crosscoder's sources. By default `hook_name` alone.
        metadata: written to cfg.json under `metadata`, where SAELens looks for model_name, context_size, dataset_path
            and prepend_bos.
    """

    _resolver: ClassVar[Callable[[str], Path] | None] = None

    def __init__(
        self,
        sae: SAE,
        *,
        hook_name: str | None = None,
        hook_names: Sequence[str] | None = None,
        metadata: Mapping[str, Any] | None = None,
        provenance: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
        path: Path | None = None,
    ) -> None:
        self.sae = sae
        self.hook_names = tuple(hook_names or ([] if hook_name is None else [hook_name]))
        self.hook_name = self.hook_names[0] if self.hook_names else None
        self.metadata = dict(metadata or {})
        self.provenance = dict(provenance or {})
        self.metrics = dict(metrics or {})
        self.path = path

    # ---- what it is -----------------------------------------------------------------------------------------------

    @property
    def required_hook_name(self) -> str:
        """`hook_name`. Raises: ValueError if this dictionary does not record it."""
        if self.hook_name is None:
            raise ValueError("This dictionary does not record its hook. Pass `hook_name`, such as 'model.layers.8'.")
        return self.hook_name

    @property
    def input_hooks(self) -> tuple[str, ...]:
        """The hooks whose activations `encode` takes, joined: one, but for a crosscoder."""
        return self.hook_names if isinstance(self.sae, Crosscoder) else self.hook_names[:1]

    @property
    def output_hooks(self) -> tuple[str, ...]:
        """The hooks that are reconstructed: those of the input, but for a transcoder."""
        return self.hook_names[1:] if isinstance(self.sae, Transcoder) else self.input_hooks

    @property
    def config(self) -> SAEConfig:
        return self.sae.config

    @property
    def d_in(self) -> int:
        return self.sae.d_in

    @property
    def d_sae(self) -> int:
        return self.sae.d_sae

    @property
    def W_dec(self) -> Float[Tensor, "d_sae d_in"]:
        """The decoder directions, one row per latent, without gradient."""
        return self.sae.W_dec.detach()

    @cached_property
    def features(self) -> Any:
        """The pyarrow Table of features.parquet, read on first use; None if the folder has none. Needs pyarrow."""
        if self.path is None or not (self.path / _FEATURES).exists():
            return None
        import pyarrow.parquet

        return pyarrow.parquet.read_table(self.path / _FEATURES)

    @cached_property
    def log10_frequency(self) -> Float[Tensor, " d_sae"] | None:
        """log10 of the share of tokens on which each latent fires; None if it was not recorded."""
        if self.path is None or not (self.path / _SPARSITY).exists():
            return None
        tensors: dict[str, Tensor] = load_file(self.path / _SPARSITY)
        return tensors["sparsity"]

    # ---- what it does ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Latent activations of `x`."""
        return self.sae.encode(x)

    @torch.no_grad()
    def encode_sparse(self, x: Float[Tensor, "batch d_in"]) -> SparseLatents:
        """The nonzero latent activations of `x`, in row-major order."""
        return self.sae.encode_sparse(x)

    @torch.no_grad()
    def decode(self, latent_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_in"]:
        """Reconstruction from latent activations."""
        return self.sae.decode(latent_acts)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Dictionary":
        """Move the SAE, in place, and return self."""
        self.sae.to(device=device, dtype=dtype)
        return self

    @property
    def sinks(self) -> Exclude:
        """The tokens that training left out, for `attach(exclude=…)`: first positions and outliers by norm.

        The limit is the recorded multiple of the recorded median norm; first positions alone where they are not known.
        """
        multiple, median = self.provenance.get("sink_multiple"), self.provenance.get("median_norm")
        return Exclude(max_norm=None if multiple is None or median is None else float(multiple) * float(median))

    def attach(
        self,
        model: Any,
        *,
        splice: bool = False,
        error: Literal["drop", "keep"] = "drop",
        edits: Sequence[Edit] = (),
        exclude: Excluded = None,
        grad: bool = False,
        hook_name: str | None = None,
    ) -> AbstractContextManager[Tap]:
        """Read, splice or edit at this dictionary's hook while a `with` block lasts; see `sae.attach`.

        A transcoder reads at its first hook and replaces what its second gives; a crosscoder can only be read.

        Args:
            hook_name: attach here instead; an SAE of one hook only.
        """
        if hook_name is not None and len(self.hook_names) > 1:
            raise ValueError(
                f"`hook_name` moves an SAE of one hook, but this {self.config.architecture} has "
                f"{', '.join(self.hook_names)}. Leave it out."
            )
        return attach(
            model,
            self.sae,
            hook_name or (self.required_hook_name if len(self.input_hooks) < 2 else self.input_hooks),
            splice=splice,
            error=error,
            edits=edits,
            exclude=exclude,
            grad=grad,
            output_hook=self.output_hooks[0] if isinstance(self.sae, Transcoder) and self.output_hooks else None,
        )

    # ---- folders --------------------------------------------------------------------------------------------------

    @classmethod
    def register_resolver(cls, resolver: Callable[[str], Path] | None) -> None:
        """Set what turns a name that is no local folder (a Hub id, a URL) into one; None removes it."""
        cls._resolver = resolver

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], *, device: torch.device | str = "cpu", verify: bool = True
    ) -> "Dictionary":
        """The dictionary in a folder that `save` or SAELens wrote.

        Args:
            path: a folder, or a name that the registered resolver knows.
            verify: compare the weights with the hash in dictionary.json. cfg.json is always compared.
        Raises:
            FileNotFoundError: if the folder, its cfg.json or its weights do not exist.
            ValueError: if the folder is damaged or of an unknown kind, naming the file and the key or tensor.
        """
        folder = cls._folder(path)
        cfg_bytes = _read(folder / _CFG)
        record = _read_json(folder / _DICTIONARY) if (folder / _DICTIONARY).exists() else None
        config = None
        if record is not None:
            config = _check_record(folder, record, cfg_bytes, verify)
        cfg = _parse_json(folder / _CFG, cfg_bytes)
        tensors = _load_weights(folder / _WEIGHTS)
        try:
            sae = from_saelens(cfg, tensors, config)
        except ValueError as error:
            raise ValueError(
                f"The dictionary in {folder} cannot be loaded ({_CFG}, {_WEIGHTS}): {error} "
                "Restore the folder from its source."
            ) from error
        metadata = cfg.get("metadata") or {}
        record = record or {}
        return cls(
            sae.to(device).requires_grad_(False),
            hook_name=record.get("hook_name") or metadata.get("hf_hook_name") or metadata.get("hook_name"),
            hook_names=record.get("hook_names"),
            metadata=metadata,
            provenance=record.get("provenance"),
            metrics=record.get("metrics"),
            path=folder,
        )

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        provenance: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
        sparsity: Float[Tensor, " d_sae"] | None = None,
        features: Any = None,
        overwrite: bool = False,
    ) -> Path:
        """Write the folder; it appears whole or not at all.

        dictionary.json holds `schema_version`, `config` (the trained architecture and its k), `hook_name`,
        `provenance`, `metrics`, and `sha256` of cfg.json and of the weights.

        Args:
            provenance, metrics: JSON values; by default those that this dictionary already has.
            sparsity: share of tokens on which each latent fires.
            features: a pyarrow Table with one row per latent.
            overwrite: replace an existing folder with everything in it.
        Raises:
            FileExistsError: if the folder exists and `overwrite` is off.
        """
        target = Path(path)
        if target.exists() and not overwrite:
            raise FileExistsError(
                f"{target} exists already. Choose another folder or pass overwrite=True to replace it."
            )
        provenance = self.provenance if provenance is None else dict(provenance)
        metrics = self.metrics if metrics is None else dict(metrics)
        metadata = self.metadata | ({"hook_name": self.hook_name} if self.hook_name else {})
        if len(self.hook_names) > 1:
            metadata |= {"hook_name_out": self.output_hooks[0], "hook_names": list(self.hook_names)}
        cfg, tensors = to_saelens(self.sae, metadata)
        cfg_bytes = _json_bytes(cfg)
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
        staging.mkdir()
        try:
            (staging / _CFG).write_bytes(cfg_bytes)
            save_file(tensors, staging / _WEIGHTS)
            if sparsity is not None:
                save_file({"sparsity": (sparsity.double() + 1e-10).log10().float()}, staging / _SPARSITY)
            if features is not None:
                import pyarrow.parquet

                pyarrow.parquet.write_table(features, staging / _FEATURES)
            record = {
                "schema_version": SCHEMA_VERSION,
                "config": asdict(self.config),
                "hook_name": self.hook_name,
                "hook_names": list(self.hook_names),
                "provenance": provenance,
                "metrics": metrics,
                "sha256": {_CFG: hashlib.sha256(cfg_bytes).hexdigest(), _WEIGHTS: _sha256(staging / _WEIGHTS)},
            }
            (staging / _DICTIONARY).write_bytes(_json_bytes(record))
            _publish(staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return target

    @classmethod
    def _folder(cls, path: str | os.PathLike[str]) -> Path:
        folder = Path(path)
        if not folder.is_dir() and cls._resolver is not None:
            folder = cls._resolver(str(path))
        if not folder.is_dir():
            raise FileNotFoundError(f"A dictionary is a folder, but {path} is not one. Check the path.")
        return folder


def _check_record(folder: Path, record: Mapping[str, Any], cfg_bytes: bytes, verify: bool) -> SAEConfig:
    """The trained configuration in dictionary.json, once its schema and hashes are known to hold."""
    file = folder / _DICTIONARY
    version = record.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"`schema_version` in {file} must be {SCHEMA_VERSION}, got {version!r}. "
            "Load it with the version that wrote it."
        )
    hashes = record.get("sha256")
    if not isinstance(hashes, Mapping) or not {_CFG, _WEIGHTS} <= hashes.keys() or "config" not in record:
        raise ValueError(
            f"{file} must hold `config` and `sha256` of {_CFG} and {_WEIGHTS}. Restore it from its source."
        )
    if hashlib.sha256(cfg_bytes).hexdigest() != hashes[_CFG]:
        raise ValueError(
            f"{folder / _CFG} is not the file that {_DICTIONARY} records (sha256 differs). "
            f"{_DICTIONARY} is authoritative: restore {_CFG}, or save the dictionary again."
        )
    if verify and (folder / _WEIGHTS).exists() and _sha256(folder / _WEIGHTS) != hashes[_WEIGHTS]:
        raise ValueError(
            f"{folder / _WEIGHTS} is not the file that {_DICTIONARY} records (sha256 differs). "
            "Restore it from its source."
        )
    try:
        return config_from_dict(record["config"])
    except ValueError as error:
        raise ValueError(f"`config` in {file} cannot be read: {error}") from error


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


def _read(file: Path) -> bytes:
    if not file.exists():
        raise FileNotFoundError(
            f"A dictionary folder holds {_CFG} and {_WEIGHTS}, but {file} is missing. Check the path."
        )
    return file.read_bytes()


def _read_json(file: Path) -> dict[str, Any]:
    return _parse_json(file, _read(file))


def _parse_json(file: Path, content: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{file} must hold JSON: {error}. Restore it from its source.") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(parsed).__name__}. Restore it from its source.")
    return parsed


def _load_weights(file: Path) -> dict[str, Tensor]:
    if not file.exists():
        raise FileNotFoundError(
            f"A dictionary folder holds {_CFG} and {_WEIGHTS}, but {file} is missing. Check the path."
        )
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} must be a safetensors file: {error}. Restore it from its source.") from error
    return {name: tensor.float() for name, tensor in tensors.items()}


def _json_bytes(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
