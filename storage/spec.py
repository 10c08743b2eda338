"""Frozen records that say what a store holds. The SHA-256 of their JSON form names the store.

A store is cut in contexts (packed sequences of `context_length` tokens); a row is one token, and row = context *
context_length + position in the context. A shard is `contexts_per_shard` consecutive contexts, the last one may be
shorter. Contexts [0, n_train_contexts) are the training split, the rest is held out.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from storage.errors import CorruptionError, FormatError, SpecMismatchError

FORMAT_VERSION = 1

Split = Literal["train", "heldout", "all"]
DTypeName = Literal["bfloat16", "float16", "float32"]
Quantisation = Literal["none", "int8"]
Compression = Literal["none", "blosc"]
TableDType = Literal["uint8", "int8", "int16", "int32", "uint32"]
TABLE_NAMES = ("tokens", "document", "position")
"""The per-token tables that every store has, int32 each."""
FLAGS = "flags"
"""Name of the extra table whose bits `BOS`, `PADDING` and `SPECIAL` a store understands."""
STORED_DTYPE: Mapping[str, str] = {"bfloat16": "uint16", "float16": "float16", "float32": "float32"}
"""Element type in which rows are read, and stored unless quantised. Zarr v3 has no bfloat16: uint16 holds its bits."""
BOS, PADDING, SPECIAL, SINK, DELETED = 1, 2, 4, 8, 16
"""Bits of `ActivationStore.mask`: first token of a text, filler without meaning, other special token, attention sink.
The first three are those of the table `flags`; a store without it has none of them."""

_TABLE_NAME = re.compile(r"[a-z][a-z0-9_]*")
_MODULE_PATH = re.compile(r"[A-Za-z0-9_\-]+(\.[A-Za-z0-9_\-]+)*")


def canonical_json(value: object) -> bytes:
    """`value` as JSON with sorted keys, two-space indent, UTF-8 and a final newline: equal values give equal bytes."""
    text = json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode()


def parse_json_object(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `data`.

    Raises: FormatError naming `where` if it is not JSON, or not an object.
    """
    try:
        value = json.loads(data)
    except ValueError as error:
        raise FormatError(f"{where} must be a JSON object, but it does not parse: {error}.") from error
    if not isinstance(value, dict):
        raise FormatError(f"{where} must be a JSON object, but it holds a {type(value).__name__}.")
    return value


def checked_json(value: Mapping[str, Any]) -> bytes:
    """Canonical JSON of `value` and, under `sha256`, the digest of the canonical JSON of the rest."""
    return canonical_json({**value, "sha256": hashlib.sha256(canonical_json(value)).hexdigest()})


def parse_checked_json(data: bytes, where: str) -> dict[str, Any]:
    """What `checked_json` was given.

    Raises: FormatError if it is not JSON or of another format version; CorruptionError if any bit of it was changed.
    """
    value = parse_json_object(data, where)
    check_version(value, where)
    digest = value.pop("sha256", None)
    if data != checked_json(value):
        raise CorruptionError(
            f"{where} must match the digest in it, but it says {str(digest)[:12]} and is "
            f"{hashlib.sha256(canonical_json(value)).hexdigest()[:12]}: it was changed after it was written. "
            "Restore the file from a copy, or run `sae verify` with `--repair`."
        )
    return value


def require_canonical(data: bytes, value: object, where: str) -> None:
    """Raises CorruptionError unless `data` is the canonical JSON of `value`."""
    if data != canonical_json(value):
        raise CorruptionError(f"{where} must be in canonical form, but it was edited. Restore the file from a copy.")


def canonical_hook_name(name: str) -> str:
    """`name` without a trailing ":output", which is what a module path without a suffix means."""
    return name.removesuffix(":output")


def zarr_name(hook_name: str) -> str:
    """Name of the hook's group inside `data.zarr/hooks`: the module path, with ":input" written "@input".

    Raises: ValueError if the module path holds characters that are not safe in a file name or a Zarr node name.
    """
    path, colon, site = canonical_hook_name(hook_name).partition(":")
    if (colon and site != "input") or not _MODULE_PATH.fullmatch(path) or path.startswith("__"):
        raise ValueError(
            f"A hook name must be a module path (letters, digits, '_', '-' and single dots, not starting with '__'), "
            f"optionally followed by ':output' or ':input'; got {hook_name!r}. Example: 'model.layers.8:input'."
        )
    return f"{path}@input" if colon else path


@dataclass(frozen=True)
class HookSpec:
    """One place in the model whose activations are stored."""

    name: str
    """Module path, optionally with ":input"; ":output" is the default and is dropped."""
    d_in: int
    """Width of one activation."""
    dtype: DTypeName = "bfloat16"
    """Element type in which the activations are read, and stored unless they are quantised."""
    quantisation: Quantisation = "none"
    """`int8`: a byte per element and a float32 scale per token (`quantisation`)."""
    compression: Compression = "none"
    """`blosc`: zstd after a bit shuffle. A compressed file cannot be read through a memory map."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", canonical_hook_name(self.name))
        zarr_name(self.name)
        if self.d_in < 1:
            raise ValueError(f"d_in of hook {self.name!r} must be at least 1, got {self.d_in}.")
        for name, allowed in (("dtype", DTypeName), ("quantisation", Quantisation), ("compression", Compression)):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(
                    f"{name} of hook {self.name!r} must be one of {', '.join(get_args(allowed))}; "
                    f"got {getattr(self, name)!r}."
                )

    @property
    def element_type(self) -> str:
        """NumPy type of the rows that readers give; uint16 holds the bits of bfloat16."""
        return STORED_DTYPE[self.dtype]

    @property
    def stored_type(self) -> str:
        """NumPy type of the rows in the Zarr array."""
        return "int8" if self.quantisation == "int8" else self.element_type


@dataclass(frozen=True)
class TableSpec:
    """One more integer per token, beside token, document and position."""

    name: str
    """Lower-case letters, digits and underscores. `flags` holds the bits of `ActivationStore.mask`."""
    dtype: TableDType = "int32"

    def __post_init__(self) -> None:
        if not _TABLE_NAME.fullmatch(self.name) or self.name in (*TABLE_NAMES, "hooks"):
            raise ValueError(
                "The name of a table must be of lower-case letters, digits and '_', start with a letter, and not be "
                f"{', '.join(TABLE_NAMES)} or hooks; got {self.name!r}."
            )
        if self.dtype not in get_args(TableDType):
            raise ValueError(
                f"dtype of table {self.name!r} must be one of {', '.join(get_args(TableDType))}; got {self.dtype!r}."
            )
        if self.name == FLAGS and self.dtype != "uint8":
            raise ValueError(f"The table {FLAGS!r} holds bits and must be uint8, got {self.dtype}.")


@dataclass(frozen=True, kw_only=True)
class StoreSpec:
    """Everything that decides the bytes of a store. Two stores with the same fingerprint hold the same data."""

    n_contexts: int
    context_length: int
    contexts_per_shard: int
    n_train_contexts: int
    hooks: tuple[HookSpec, ...]
    tables: tuple[TableSpec, ...] = ()
    """Extra per-token tables."""
    provenance: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Model, tokenizer and text with hashes, batch size, …: opaque here, part of the fingerprint. JSON values only."""
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        problems = []
        for name in ("n_contexts", "context_length", "contexts_per_shard"):
            if getattr(self, name) < 1:
                problems.append(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.n_train_contexts <= self.n_contexts:
            problems.append(f"n_train_contexts must lie in [0, {self.n_contexts}], got {self.n_train_contexts}")
        if self.format_version != FORMAT_VERSION:
            problems.append(f"format_version must be {FORMAT_VERSION}, got {self.format_version}")
        names = [hook.name for hook in self.hooks]
        if not names or len(set(names)) != len(names):
            problems.append(f"hooks must be one or more different hooks, got {names}")
        tables = [table.name for table in self.tables]
        if len(set(tables)) != len(tables):
            problems.append(f"tables must differ in name, got {tables}")
        try:
            provenance = json.loads(canonical_json(dict(self.provenance)))
        except (TypeError, ValueError) as error:
            problems.append(f"provenance must hold JSON values only: {error}")
        if problems:
            raise ValueError("Not a valid store specification: " + "; ".join(problems) + ".")
        object.__setattr__(self, "hooks", tuple(self.hooks))
        object.__setattr__(self, "tables", tuple(self.tables))
        object.__setattr__(self, "provenance", provenance)

    @property
    def n_shards(self) -> int:
        return -(-self.n_contexts // self.contexts_per_shard)

    @property
    def n_tokens(self) -> int:
        return self.n_contexts * self.context_length

    @property
    def table_dtypes(self) -> dict[str, str]:
        """Element type of every per-token table by name, the extra ones last."""
        return dict.fromkeys(TABLE_NAMES, "int32") | {table.name: table.dtype for table in self.tables}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the bytes of `spec.json`."""
        return hashlib.sha256(canonical_json(self.to_json())).hexdigest()

    def shard_range(self, shard: int) -> tuple[int, int]:
        """Contexts [start, stop) of a shard."""
        if not 0 <= shard < self.n_shards:
            raise ValueError(f"A shard number must lie in [0, {self.n_shards}), got {shard}.")
        start = shard * self.contexts_per_shard
        return start, min(start + self.contexts_per_shard, self.n_contexts)

    def split_range(self, split: Split) -> tuple[int, int]:
        """Contexts [start, stop) of a split."""
        ranges = {
            "train": (0, self.n_train_contexts),
            "heldout": (self.n_train_contexts, self.n_contexts),
            "all": (0, self.n_contexts),
        }
        if split not in ranges:
            raise ValueError(f"split must be one of {', '.join(ranges)}; got {split!r}.")
        return ranges[split]

    def hook(self, name: str) -> HookSpec:
        """The stored hook of that name, with or without ":output"."""
        for hook in self.hooks:
            if hook.name == canonical_hook_name(name):
                return hook
        raise ValueError(f"The store has no hook {name!r}; it holds {', '.join(hook.name for hook in self.hooks)}.")

    def to_json(self) -> dict[str, Any]:
        """The JSON object in `spec.json`."""
        return {
            "format_version": self.format_version,
            "n_contexts": self.n_contexts,
            "context_length": self.context_length,
            "contexts_per_shard": self.contexts_per_shard,
            "n_train_contexts": self.n_train_contexts,
            "hooks": [asdict(hook) for hook in self.hooks],
            "tables": [asdict(table) for table in self.tables],
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any], *, where: str = "spec.json") -> StoreSpec:
        """The specification written by `to_json`.

        Raises: FormatError if it was written by a newer format version, or is not a specification.
        """
        check_version(value, where)
        try:
            hooks = tuple(HookSpec(**hook) for hook in value["hooks"])
            tables = tuple(TableSpec(**table) for table in value["tables"])
            return cls(**{**value, "hooks": hooks, "tables": tables})
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(f"{where} is not a store specification of format version 1: {error}") from error


def check_version(value: Mapping[str, Any], where: str) -> None:
    """Raises FormatError unless `value` says a format version that this package reads."""
    version = value.get("format_version")
    if version == FORMAT_VERSION:
        return
    advice = (
        "upgrade this package to read it" if isinstance(version, int) and version > FORMAT_VERSION else "is it a store?"
    )
    raise FormatError(f"The store must have format version {FORMAT_VERSION}, but {where} says {version!r}: {advice}.")


def require_equal_settings(stored: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> None:
    """Raises SpecMismatchError listing every key in which two JSON objects differ."""
    old, new = _flatten(stored), _flatten(wanted)
    absent = object()
    differing = [key for key in sorted({*old, *new}) if old.get(key, absent) != new.get(key, absent)]
    if not differing:
        return
    lines = "; ".join(
        f"{key}: store {old.get(key, 'absent')!r}, asked for {new.get(key, 'absent')!r}" for key in differing
    )
    raise SpecMismatchError(
        f"The store at {where} was made from other settings. They differ in {lines}. "
        f"Use those settings, or another path; stores are never mixed."
    )


def _flatten(value: object, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested objects and lists under dotted keys."""
    if isinstance(value, Mapping):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list):
        items = [(str(index), item) for index, item in enumerate(value)]
    else:
        return {prefix: value}
    if not items:
        return {prefix: value}
    return {
        key: leaf
        for name, item in items
        for key, leaf in _flatten(item, f"{prefix}.{name}" if prefix else name).items()
    }
