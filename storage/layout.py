"""Where everything in an activation store is: keys, chunk shapes and Zarr metadata. `FORMAT.md` is the normative text.

The metadata is written here as plain JSON rather than through zarr-python, so that its bytes depend on the store alone
and not on the version of a library; the tests hold it against what stock zarr reads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from storage.encoding import BLOSC, CHECKSUM_BYTES, fill_value, index_bytes
from storage.spec import HookSpec, StoreSpec, canonical_json, zarr_name

SPEC = "spec.json"
TABLES = "tables.json"
SEAL = "seal.json"
COMMITS = "commits"
STAGING = "staging"
LEASES = "leases"
RING = "ring.json"
CONSUMERS = "consumers"
TOMBSTONES = "tombstones"
GROUP = "data.zarr"
KEEP = ".keep"
"""Empty file that keeps a directory through copies that drop empty ones."""
RESERVED = frozenset({SPEC, TABLES, SEAL, COMMITS, STAGING, LEASES, CONSUMERS, TOMBSTONES, GROUP})
"""Names in the root of a store that a sidecar may not take."""

MIB = 2**20


@dataclass(frozen=True)
class ArrayLayout:
    """One Zarr array cut along its first axis; `rows_*` count entries along that axis."""

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    rows_per_file: int
    rows_per_chunk: int
    sharded: bool
    attributes: tuple[tuple[str, str], ...] = ()
    compressed: bool = False

    @property
    def is_table(self) -> bool:
        """Whether the array is there from the start, rather than written shard by shard."""
        return self.key.count("/") == 1

    @property
    def n_files(self) -> int:
        return -(-self.shape[0] // self.rows_per_file)

    @property
    def slots_per_file(self) -> int:
        """Chunks that a whole file has room for."""
        return self.rows_per_file // self.rows_per_chunk

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        return self.rows_per_chunk, *self.shape[1:]

    @property
    def chunk_bytes(self) -> int:
        """Data bytes of one chunk; its checksum follows them."""
        return self.rows_per_chunk * math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def stored_chunk_bytes(self) -> int:
        """Bytes of one chunk with its checksum."""
        return self.chunk_bytes + CHECKSUM_BYTES

    def rows_in_file(self, file: int) -> int:
        return min(self.rows_per_file, self.shape[0] - file * self.rows_per_file)

    def chunks_in_file(self, file: int) -> int:
        """Chunks that the file really holds: those slots of the last file that are wholly past the end are left out."""
        return -(-self.rows_in_file(file) // self.rows_per_chunk)

    def file_bytes(self, file: int) -> int:
        """Exact size of a file; what it would be without compression if the array is compressed."""
        data = self.chunks_in_file(file) * self.stored_chunk_bytes
        return data + index_bytes(self.slots_per_file) if self.sharded else data

    def file_key(self, file: int) -> str:
        """Key of a file, by Zarr's default chunk key encoding."""
        return f"{self.key}/c/" + "/".join([str(file), *["0"] * (len(self.shape) - 1)])

    def metadata(self) -> bytes:
        """The array's `zarr.json`."""
        value = fill_value(self.dtype)
        chunk_codecs: list[dict[str, Any]] = [
            {"name": "bytes", "configuration": {"endian": "little"}},
            {"name": "crc32c"},
        ]
        index_codecs = chunk_codecs
        if self.compressed:
            blosc = {"name": "blosc", "configuration": BLOSC | {"typesize": self.dtype.itemsize}}
            chunk_codecs = [chunk_codecs[0], blosc, chunk_codecs[1]]
        codecs = chunk_codecs
        if self.sharded:
            configuration = {
                "chunk_shape": [self.rows_per_chunk, *self.shape[1:]],
                "codecs": chunk_codecs,
                "index_codecs": index_codecs,
                "index_location": "end",
            }
            codecs = [{"name": "sharding_indexed", "configuration": configuration}]
        return canonical_json(
            {
                "zarr_format": 3,
                "node_type": "array",
                "shape": list(self.shape),
                "data_type": self.dtype.name,
                "chunk_grid": {
                    "name": "regular",
                    "configuration": {"chunk_shape": [self.rows_per_file, *self.shape[1:]]},
                },
                "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
                "fill_value": "NaN" if value != value else value,
                "codecs": codecs,
                "attributes": dict(self.attributes),
                "storage_transformers": [],
            }
        )


def contexts_per_chunk(spec: StoreSpec, hook: HookSpec) -> int:
    """Whole contexts in one chunk of activations: the fewest that make 2 MiB, among the divisors of
    `contexts_per_shard`.

    If that exceeds 8 MiB, the most that stay within 8 MiB (at least one). Smaller chunks cost every Zarr reader time
    per chunk, larger ones make a single context dear to read.
    """
    context_bytes = spec.context_length * hook.d_in * np.dtype(hook.stored_type).itemsize
    divisors = [n for n in range(1, spec.contexts_per_shard + 1) if spec.contexts_per_shard % n == 0]
    small_enough = [n for n in divisors if n * context_bytes <= 8 * MIB] or [1]
    return next((n for n in small_enough if n * context_bytes >= 2 * MIB), small_enough[-1])


def activations_array(spec: StoreSpec, hook: HookSpec) -> ArrayLayout:
    """`activations` of a hook: one row per token, one file per shard, chunks of whole contexts."""
    attributes = [("hook_name", hook.name), ("logical_dtype", hook.dtype)]
    if hook.quantisation == "int8":
        attributes += [("quantisation", "int8"), ("scales", "../scales")]
    return ArrayLayout(
        key=f"{GROUP}/hooks/{zarr_name(hook.name)}/activations",
        shape=(spec.n_tokens, hook.d_in),
        dtype=np.dtype(hook.stored_type),
        rows_per_file=spec.contexts_per_shard * spec.context_length,
        rows_per_chunk=contexts_per_chunk(spec, hook) * spec.context_length,
        sharded=True,
        attributes=tuple(attributes),
        compressed=hook.compression == "blosc",
    )


def norms_array(spec: StoreSpec, hook: HookSpec) -> ArrayLayout:
    """`norms` of a hook: the L2 norm of each row, one file per shard."""
    return _float_per_row(spec, hook, "norms")


def scales_array(spec: StoreSpec, hook: HookSpec) -> ArrayLayout:
    """`scales` of a quantised hook: the factor of each row, one file per shard."""
    return _float_per_row(spec, hook, "scales")


def shard_arrays(spec: StoreSpec, hook: HookSpec) -> list[ArrayLayout]:
    """The arrays of a hook of which every shard has one file each."""
    scales = [scales_array(spec, hook)] if hook.quantisation == "int8" else []
    return [activations_array(spec, hook), *scales, norms_array(spec, hook)]


def _float_per_row(spec: StoreSpec, hook: HookSpec, name: str) -> ArrayLayout:
    rows = spec.contexts_per_shard * spec.context_length
    return ArrayLayout(
        key=f"{GROUP}/hooks/{zarr_name(hook.name)}/{name}",
        shape=(spec.n_tokens,),
        dtype=np.dtype(np.float32),
        rows_per_file=rows,
        rows_per_chunk=rows,
        sharded=False,
        attributes=(("hook_name", hook.name),),
    )


def table_array(spec: StoreSpec, name: str) -> ArrayLayout:
    """A per-token table: one row per context, files of at most about 1 MiB, the same rows in those of every table."""
    rows = max(1, min(spec.n_contexts, MIB // (4 * spec.context_length)))
    shape = (spec.n_contexts, spec.context_length)
    return ArrayLayout(f"{GROUP}/{name}", shape, np.dtype(spec.table_dtypes[name]), rows, rows, sharded=False)


def group_metadata(attributes: dict[str, str]) -> bytes:
    """A group's `zarr.json`."""
    return canonical_json({"zarr_format": 3, "node_type": "group", "attributes": attributes})


def metadata_files(spec: StoreSpec) -> dict[str, bytes]:
    """Every `zarr.json` of the store by key."""
    files = {
        f"{GROUP}/zarr.json": group_metadata({"fingerprint": spec.fingerprint}),
        f"{GROUP}/hooks/zarr.json": group_metadata({}),
    }
    arrays = [table_array(spec, name) for name in spec.table_dtypes]
    for hook in spec.hooks:
        files[f"{GROUP}/hooks/{zarr_name(hook.name)}/zarr.json"] = group_metadata({"hook_name": hook.name})
        arrays += shard_arrays(spec, hook)
    return files | {f"{array.key}/zarr.json": array.metadata() for array in arrays}


def commit_key(shard: int) -> str:
    """Key of a shard's commit."""
    return f"{COMMITS}/{shard:06d}.json"


def tombstone_key(shard: int) -> str:
    """Key of the record that a shard was deleted on purpose."""
    return f"{TOMBSTONES}/{shard:06d}.json"


def consumer_key(name: str) -> str:
    """Key of a consumer's cursor."""
    return f"{CONSUMERS}/{name}.json"
