"""`ActivationWriter`: creates an activation store and fills it shard by shard, from any number of processes.

Workers share nothing but the path. Each takes shard numbers from `missing()` (or from whoever hands them out), computes
the activations of the shard's contexts for all hooks in one forward pass, and calls `write_shard`; a shard written
twice is stored once (see `commits`).
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.backends import Backend, Buffer, as_bytes, backend_for
from storage.commits import Attempt, Commit, CommitLog
from storage.encoding import CHECKSUM_BYTES, compress, crc32c, encode_index, fill_value, stored_as, to_float32
from storage.errors import AlreadyExistsError, CorruptionError, FormatError, NotFoundError, SpecMismatchError
from storage.layout import (
    COMMITS,
    KEEP,
    RESERVED,
    RING,
    SPEC,
    STAGING,
    TABLES,
    ArrayLayout,
    activations_array,
    metadata_files,
    norms_array,
    scales_array,
    shard_arrays,
    table_array,
)
from storage.leases import DURATION_S, Leases, ShardQueue
from storage.quantisation import dequantise, quantise
from storage.rows import RowReader
from storage.spec import (
    FLAGS,
    FORMAT_VERSION,
    PADDING,
    TABLE_NAMES,
    HookSpec,
    StoreSpec,
    canonical_json,
    check_version,
    checked_json,
    parse_checked_json,
    parse_json_object,
    require_canonical,
    require_equal_settings,
)
from storage.statistics import Statistics, merge, summarise

Path = str | os.PathLike[str]
COMPRESSING = 2
"""Chunks that are compressed at the same time."""


@dataclass(frozen=True)
class Receipt:
    """What became of one `write_shard`: small enough to send anywhere."""

    shard: int
    n_tokens: int
    bytes: int
    """Bytes of the shard on disk, all hooks."""
    digests: Mapping[str, str]
    """SHA-256 of each file by key, as committed."""
    written: bool
    """False if the shard was committed already, by an earlier run or a faster worker, whose digests these are."""


class ActivationWriter:
    """Fills one store. Make it with `create` or `open`."""

    def __init__(self, backend: Backend, spec: StoreSpec) -> None:
        self.spec = spec
        self._backend = backend
        self._log = CommitLog(backend, spec.fingerprint, spec.n_shards)
        self._tables = {
            name: RowReader(backend, table_array(spec, name), verify=True)
            for name in ("position", FLAGS)
            if name in spec.table_dtypes
        }

    @classmethod
    def create(
        cls,
        path: Path,
        spec: StoreSpec,
        *,
        tokens: NDArray[np.integer[Any]],
        document: NDArray[np.integer[Any]],
        position: NDArray[np.integer[Any]],
        tables: Mapping[str, NDArray[np.integer[Any]]] | None = None,
        sidecars: Mapping[str, bytes] | None = None,
        backend: Backend | None = None,
    ) -> ActivationWriter:
        """Creates the store, or opens the one that is there if it was created from the same spec and tables.

        Args:
            tokens, document, position: integers [n_contexts, context_length]; `document` is the row in the caller's own
                table of documents, `position` counts from 0 in each document piece.
            tables: the extra tables of the spec by name, integers of the same shape.
            sidecars: files to keep beside the data, by file name; opaque here and not compared when the store exists.
        Raises: ValueError for tables of another shape; SpecMismatchError if the store there is another one;
            AlreadyExistsError if something else is there.
        """
        backend = backend or backend_for(path)
        every = _checked_tables(
            {**dict(zip(TABLE_NAMES, (tokens, document, position), strict=True)), **(tables or {})}, spec
        )
        sidecars = dict(sidecars or {})
        for name in sidecars:
            if not name or "/" in name or name.startswith(".") or name in RESERVED:
                raise ValueError(f"A sidecar must have a plain file name that the store does not use, got {name!r}.")
        digests = {name: hashlib.sha256(np.ascontiguousarray(table).data).hexdigest() for name, table in every.items()}
        if not backend.create(_store_files(spec, every, digests, sidecars)):
            _require_same_store(backend, spec, digests)
        return cls.open(path, backend=backend)

    @classmethod
    def open(cls, path: Path, *, backend: Backend | None = None) -> ActivationWriter:
        """Opens a store that `create` made, and finishes what killed workers left committed but not installed.

        Raises: NotFoundError if there is none; FormatError if it is of a newer format version.
        """
        backend = backend or backend_for(path)
        writer = cls(backend, read_spec(backend))
        writer._log.recover()
        return writer

    def missing(self) -> list[int]:
        """Shards still to be written, ascending. Reads the directory each time, so it sees other workers' commits."""
        return self._log.missing()

    def queue(self, shards: Iterable[int] | None = None, *, lease_s: float = DURATION_S) -> ShardQueue:
        """The missing shards, or those given, to be taken one by one so that several drivers do not take the same.

        Args:
            lease_s: after how long the shards of a driver that cannot be heard of any more are free again.
        """
        return ShardQueue(self._log, Leases(self._backend, duration_s=lease_s), shards)

    def write_shard(
        self, shard: int, activations: Mapping[str, NDArray[Any]], *, info: Mapping[str, Any] | None = None
    ) -> Receipt:
        """Stores all hooks of one shard, or nothing. Returns when the shard survives a power cut.

        Args:
            activations: per hook name [n_contexts of the shard, context_length, d_in]; floats, or uint16 for the bits
                of bfloat16. What is not stored as it is given is rounded to nearest even.
            info: JSON values to keep in the commit: versions, device, time. Not part of any digest.
        Returns: the receipt of the commit that stands, this call's or an earlier one's.
        Raises: ValueError if hooks, shapes or dtypes are not those of the spec.
        """
        start, stop = self.spec.shard_range(shard)
        rows = self._checked_rows(shard, activations)
        standing = self._log.read(shard)
        if standing is not None:
            self._log.roll_forward(standing)
            return self._receipt(standing, written=False)
        attempt = self._log.begin(shard)
        first = self._tables["position"].read(start, stop).ravel() == 0
        padding = np.zeros(len(first), bool)
        if FLAGS in self._tables:
            padding = self._tables[FLAGS].read(start, stop).ravel() & PADDING != 0
        with attempt.removed_on_error():
            statistics = {
                hook.name: self._stage_hook(attempt, hook, rows[hook.name], first, padding) for hook in self.spec.hooks
            }
        payload = {
            "contexts": [start, stop],
            "statistics": {name: value.to_json() for name, value in statistics.items()},
            "info": dict(info or {}),
        }
        commit, won = self._log.commit(attempt, payload)
        return self._receipt(commit, written=won)

    def seal(self) -> None:
        """Declares the store complete, with the statistics of its shards merged (of a ring, those of its retained
        training shards). Readers open sealed stores.

        Raises: IncompleteError listing the missing shards; CorruptionError if a committed file is gone or has another
            size.
        """
        self._log.recover()
        self._log.require_complete()
        first = read_first_retained(self._backend)
        shards = None if first is None else retained_train_shards(self.spec, first)
        self._log.seal({"statistics": merged_statistics(self._log, self.spec, shards)})

    def unseal(self) -> None:
        """Withdraws the seal; `seal` sets it again."""
        self._log.unseal()

    def discard(self, shard: int) -> None:
        """Takes back a damaged shard so that `missing` lists it again, and unseals the store.

        No reader or other writer may be at work.
        """
        self.spec.shard_range(shard)
        arrays = [array for hook in self.spec.hooks for array in shard_arrays(self.spec, hook)]
        self._log.discard(shard, [array.file_key(shard) for array in arrays])

    def _stage_hook(
        self,
        attempt: Attempt,
        hook: HookSpec,
        given: NDArray[Any],
        first: NDArray[np.bool_],
        padding: NDArray[np.bool_],
    ) -> Statistics:
        """Stages the files of one hook; the statistics are taken while another thread writes and syncs."""

        def write(array: ArrayLayout, rows: NDArray[Any]) -> None:
            attempt.write(array.file_key(attempt.shard), file_buffers(array, attempt.shard, rows))

        quantised = quantise(given, hook.dtype) if hook.quantisation == "int8" else None
        stored = given if quantised is None else quantised.values
        with ThreadPoolExecutor(max_workers=1) as pool:
            writing = pool.submit(write, activations_array(self.spec, hook), stored)
            if quantised is None:
                statistics, norms, _ = summarise(stored, first=first, padding=padding)
            else:
                values, scales, squared_error, squared_sum = quantised
                statistics, norms, ordinary = summarise(
                    values,
                    first=first,
                    padding=padding,
                    decode=lambda chosen: to_float32(dequantise(values[chosen], scales[chosen], hook.dtype)),
                )
                lost = to_float32(given[np.isnan(scales) & ~padding])
                statistics = replace(
                    statistics,
                    n_nan=int(np.isnan(lost).sum()),
                    n_inf=int(np.isinf(lost).sum()),
                    squared_error=float(squared_error[ordinary].sum()),
                    squared_sum=float(squared_sum[ordinary].sum()),
                )
            writing.result()
        if quantised is not None:
            write(scales_array(self.spec, hook), quantised.scales)
        write(norms_array(self.spec, hook), norms)
        return statistics

    def _checked_rows(self, shard: int, activations: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Stored rows [n_rows, d_in] per canonical hook name."""
        given = {self.spec.hook(name).name: values for name, values in activations.items()}
        start, stop = self.spec.shard_range(shard)
        problems, rows = [], {}
        for hook in self.spec.hooks:
            values = given.get(hook.name)
            shape = (stop - start, self.spec.context_length, hook.d_in)
            if values is None:
                problems.append(f"hook {hook.name!r} is absent")
            elif values.shape != shape:
                problems.append(f"hook {hook.name!r} must have shape {shape}, got {values.shape}")
            elif values.dtype.kind != "f" and values.dtype != np.uint16:
                problems.append(f"hook {hook.name!r} must hold floats or the bits of bfloat16, got {values.dtype}")
            else:
                if hook.quantisation == "none":
                    values = stored_as(values, hook.dtype)
                rows[hook.name] = np.ascontiguousarray(values).reshape(-1, hook.d_in)
        if problems:
            raise ValueError(
                f"The activations of shard {shard} do not fit the store at {self._backend.location()}: "
                + "; ".join(problems)
                + "."
            )
        return rows

    def _receipt(self, commit: Commit, *, written: bool) -> Receipt:
        start, stop = self.spec.shard_range(commit.shard)
        digests = {file.key: file.sha256 for file in commit.files}
        n_tokens = (stop - start) * self.spec.context_length
        return Receipt(commit.shard, n_tokens, commit.n_bytes, digests, written)


def file_buffers(array: ArrayLayout, file: int, rows: NDArray[Any]) -> Iterator[Buffer]:
    """The bytes of one file of an array, chunk by chunk; nothing is copied but the last, padded chunk."""
    lengths = []
    chunks: Iterator[bytes] | Iterator[NDArray[Any]] = _chunks(array, rows)
    if array.compressed:
        chunks = _compressed(_chunks(array, rows))
    for chunk in chunks:
        yield chunk
        yield crc32c(chunk)
        lengths.append(as_bytes(chunk).nbytes + CHECKSUM_BYTES)
    if array.sharded:
        yield encode_index(array.slots_per_file, lengths)


def _chunks(array: ArrayLayout, rows: NDArray[Any]) -> Iterator[NDArray[Any]]:
    for start in range(0, len(rows), array.rows_per_chunk):
        chunk = rows[start : start + array.rows_per_chunk]
        if len(chunk) < array.rows_per_chunk:
            padded = np.full((array.rows_per_chunk, *array.shape[1:]), fill_value(array.dtype), array.dtype)
            padded[: len(chunk)] = chunk
            chunk = padded
        yield chunk


def _compressed(chunks: Iterator[NDArray[Any]]) -> Iterator[bytes]:
    """The chunks compressed, in order, `COMPRESSING` at a time."""
    with ThreadPoolExecutor(max_workers=COMPRESSING) as pool:
        under_way: deque[Future[bytes]] = deque()
        for chunk in chunks:
            under_way.append(pool.submit(compress, chunk))
            if len(under_way) > COMPRESSING:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()


def merged_statistics(log: CommitLog, spec: StoreSpec, shards: Iterable[int] | None = None) -> dict[str, Any]:
    """Statistics per hook over the committed ones of the given shards, by default of all, in JSON form."""
    parts: dict[str, list[Statistics]] = {hook.name: [] for hook in spec.hooks}
    for shard in log.committed() if shards is None else shards:
        commit = log.read(shard)
        for name in parts:
            if commit is not None:
                parts[name].append(Statistics.from_json(commit.payload["statistics"][name]))
    return {name: merge(values).to_json() for name, values in parts.items()}


def read_spec(backend: Backend) -> StoreSpec:
    """The spec of the store.

    Raises: NotFoundError if there is no store; FormatError if it is of a newer format version.
    """
    try:
        data = backend.read(SPEC)
    except NotFoundError as error:
        raise NotFoundError(
            f"There must be an activation store at {backend.location()}, but it has no {SPEC}. "
            f"Check the path, or run the stage that collects activations."
        ) from error
    spec = StoreSpec.from_json(parse_json_object(data, backend.location(SPEC)), where=backend.location(SPEC))
    require_canonical(data, spec.to_json(), backend.location(SPEC))
    return spec


def read_first_retained(backend: Backend) -> int | None:
    """The shard from which on a ring deletes nothing; None if the store is not a ring (see `ring`)."""
    try:
        data = backend.read(RING)
    except NotFoundError:
        return None
    value = parse_checked_json(data, backend.location(RING))
    first = value.get("first_retained")
    if not isinstance(first, int) or first < 0:
        raise FormatError(f"{backend.location(RING)} must have a whole number `first_retained`, got {first!r}.")
    return first


def retained_train_shards(spec: StoreSpec, first_retained: int) -> range:
    """Shards of a ring that hold training contexts and stay: its statistics are theirs."""
    return range(first_retained, -(-spec.n_train_contexts // spec.contexts_per_shard))


def _checked_tables(given: Mapping[str, NDArray[np.integer[Any]]], spec: StoreSpec) -> dict[str, NDArray[Any]]:
    """The tables in their stored types, in the order of the spec.

    Raises: ValueError listing all that does not fit.
    """
    dtypes, shape = spec.table_dtypes, (spec.n_contexts, spec.context_length)
    problems = [f"table {name!r} is not in the spec" for name in given if name not in dtypes]
    for name, dtype in dtypes.items():
        table = given.get(name)
        low, high = (0, 2**31 - 1) if name in TABLE_NAMES else (np.iinfo(dtype).min, np.iinfo(dtype).max)
        if table is None:
            problems.append(f"table {name!r} is absent")
        elif table.shape != shape or table.dtype.kind not in "iu":
            problems.append(f"{name} must hold integers of shape {shape}, got {table.dtype} of shape {table.shape}")
        elif table.min() < low or table.max() > high:
            problems.append(f"{name} must lie in [{low}, {high}], got values in [{table.min()}, {table.max()}]")
    if problems:
        raise ValueError("The tables do not fit the specification: " + "; ".join(problems) + ".")
    return {name: np.ascontiguousarray(given[name], dtype) for name, dtype in dtypes.items()}


def _store_files(
    spec: StoreSpec, tables: Mapping[str, NDArray[Any]], digests: Mapping[str, str], sidecars: Mapping[str, bytes]
) -> Iterator[tuple[str, Buffer]]:
    """Every file that a store has from the start, with its key."""
    written = {}

    def record(key: str, data: bytes) -> tuple[str, Buffer]:
        written[key] = {"n_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        return key, data

    yield SPEC, canonical_json(spec.to_json())
    for key, data in metadata_files(spec).items():
        yield record(key, data)
    for name, table in tables.items():
        array = table_array(spec, name)
        for file in range(array.n_files):
            rows = table[file * array.rows_per_file : (file + 1) * array.rows_per_file]
            yield record(array.file_key(file), b"".join(bytes(buffer) for buffer in file_buffers(array, file, rows)))
    for name, data in sidecars.items():
        yield record(name, data)
    yield (
        TABLES,
        checked_json(
            {
                "format_version": FORMAT_VERSION,
                "fingerprint": spec.fingerprint,
                "tables": dict(digests),
                "files": written,
            }
        ),
    )
    for directory in (COMMITS, STAGING):
        yield f"{directory}/{KEEP}", b""


def _require_same_store(backend: Backend, spec: StoreSpec, digests: Mapping[str, str]) -> None:
    """Raises unless the store that stands there was created from the same spec and tables."""
    try:
        stored = parse_json_object(backend.read(SPEC), backend.location(SPEC))
    except NotFoundError as error:
        raise AlreadyExistsError(
            f"A store is to be created at {backend.location()}, but something else stands there. Choose another path, "
            "or remove it."
        ) from error
    check_version(stored, backend.location(SPEC))
    require_equal_settings(stored, spec.to_json(), backend.location())
    old = read_tables(backend, spec)["tables"]
    differing = [name for name in digests if old.get(name) != digests[name]]
    if differing:
        raise SpecMismatchError(
            f"The store at {backend.location()} has the same settings but other {', '.join(differing)}: the text or "
            "its packing changed "
            f"and the provenance does not say so. Use another path."
        )


def read_tables(backend: Backend, spec: StoreSpec) -> dict[str, Any]:
    """`tables.json`: digests of everything that a store has from the start."""
    value = parse_checked_json(backend.read(TABLES), backend.location(TABLES))
    if value.get("fingerprint") != spec.fingerprint:
        raise CorruptionError(
            f"{backend.location(TABLES)} belongs to the store {str(value.get('fingerprint'))[:12]}, but {SPEC} is "
            "that of "
            f"{spec.fingerprint[:12]}: one of the two was changed or copied here. Restore them."
        )
    return value
