"""Sparse latent activations of a whole store: written shard by shard as they are computed, read latent by latent.

Each shard becomes one piece, compressed by latent (CSC): `indptr` int64 [d_sae + 1], `row` uint32 [n] (relative to the
piece's first row) and `value` float32 [n] as .npy files, entries of one latent by ascending row. Row r is token r of
the activation store: r = context * context_length + offset. Pieces are committed as the shards of an activation store
are (see `commits`).
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from storage.backends import Backend, backend_for
from storage.commits import Commit, CommitLog, advice
from storage.errors import AlreadyExistsError, CorruptionError, FormatError, NotFoundError
from storage.layout import COMMITS, KEEP, STAGING
from storage.spec import (
    FORMAT_VERSION,
    canonical_json,
    check_version,
    parse_json_object,
    require_canonical,
    require_equal_settings,
)
from storage.writer import Path, Receipt

META = "meta.json"
REQUIRED = ("d_sae", "n_shards", "n_rows", "fingerprint")
PIECE_DTYPES: Mapping[str, np.dtype[Any]] = {
    "indptr": np.dtype("<i8"),
    "row": np.dtype("<u4"),
    "value": np.dtype("<f4"),
}


class LatentBlock(NamedTuple):
    """Activations of latents [lo, hi), compressed by latent: those of latent lo + j are at indptr[j]:indptr[j + 1]."""

    indptr: NDArray[np.int64]
    row: NDArray[np.int64]
    """Rows of the whole store, ascending within a latent."""
    value: NDArray[np.float32]


class LatentWriter:
    """Fills one latent store, from any number of processes. Make it with `create` or `open`."""

    def __init__(self, backend: Backend, meta: Mapping[str, Any]) -> None:
        self.meta = meta
        self._log = latent_commit_log(backend, meta)

    @classmethod
    def create(cls, path: Path, meta: Mapping[str, Any], *, backend: Backend | None = None) -> LatentWriter:
        """Creates the store, or opens the one that is there if it has the same `meta`.

        Args:
            meta: JSON values, among them d_sae, n_shards, n_rows (tokens of the activation store) and fingerprint (what
                the latents were computed from: store and dictionary).
        Raises: ValueError if one of these is absent; SpecMismatchError if another store is there; AlreadyExistsError if
            something else is.
        """
        backend = backend or backend_for(path)
        absent = [key for key in REQUIRED if key not in meta]
        if absent:
            raise ValueError(
                f"The meta of a latent store must have {', '.join(REQUIRED)}; {', '.join(absent)} is absent."
            )
        value = {**meta, "format_version": FORMAT_VERSION, "kind": "latents"}
        if not backend.create([(META, canonical_json(value)), (f"{COMMITS}/{KEEP}", b""), (f"{STAGING}/{KEEP}", b"")]):
            if backend.size(META) is None:
                raise AlreadyExistsError(
                    f"A latent store is to be created at {backend.location()}, but something else stands there. "
                    "Choose another path, or remove it."
                )
            require_equal_settings(
                read_meta(backend), parse_json_object(canonical_json(value), META), backend.location()
            )
        return cls.open(path, backend=backend)

    @classmethod
    def open(cls, path: Path, *, backend: Backend | None = None) -> LatentWriter:
        """Opens a store that `create` made, and finishes what killed workers left committed but not installed."""
        backend = backend or backend_for(path)
        writer = cls(backend, read_meta(backend))
        writer._log.recover()
        return writer

    def missing(self) -> list[int]:
        """Shards still to be written, ascending."""
        return self._log.missing()

    def write_shard(
        self,
        shard: int,
        row: NDArray[np.integer[Any]],
        latent: NDArray[np.integer[Any]],
        value: NDArray[np.floating[Any]],
    ) -> Receipt:
        """Stores one shard's nonzero latent activations, or nothing.

        Args:
            row, latent, value: one entry per nonzero, 1-D of equal length, in any order; rows are those of the whole
                store.
        Raises: ValueError if lengths differ, or a row, latent or value is out of range or not finite, or a (row,
            latent) pair comes twice.
        """
        indptr, row, value, base = self._compressed(shard, row, latent, value)
        standing = self._log.read(shard)
        if standing is None:
            attempt = self._log.begin(shard)
            for name, array in (
                ("indptr", indptr),
                ("row", (row - base).astype("<u4")),
                ("value", value.astype("<f4")),
            ):
                with attempt.removed_on_error():
                    attempt.write(_piece_key(shard, name), [_npy_header(array), array])
            last = int(row.max()) + 1 if len(row) else base
            standing, written = self._log.commit(attempt, {"first_row": base, "stop_row": last, "n_entries": len(row)})
        else:
            self._log.roll_forward(standing)
            written = False
        digests = {file.key: file.sha256 for file in standing.files}
        n_tokens = standing.payload["stop_row"] - standing.payload["first_row"]
        return Receipt(shard, n_tokens, standing.n_bytes, digests, written)

    def seal(self) -> None:
        """Declares the store complete.

        Raises: IncompleteError listing the missing shards; CorruptionError if pieces overlap or a file is gone.
        """
        self._log.recover()
        self._log.require_complete()
        stop = 0
        commits = [commit for shard in range(self._log.n_shards) if (commit := self._log.read(shard))]
        for commit in commits:
            if commit.payload["n_entries"] and commit.payload["first_row"] < stop:
                raise CorruptionError(
                    f"Rows of the shards of {self._log.backend.location()} must ascend, but shard {commit.shard} "
                    "starts at row "
                    f"{commit.payload['first_row']}, before the end of an earlier one at {stop}. Discard it and write "
                    "it again."
                )
            stop = max(stop, commit.payload["stop_row"])
        self._log.seal({"n_entries": sum(commit.payload["n_entries"] for commit in commits)})

    def unseal(self) -> None:
        """Withdraws the seal; `seal` sets it again."""
        self._log.unseal()

    def discard(self, shard: int) -> None:
        """Takes back a damaged shard so that `missing` lists it again, and unseals the store.

        No reader or other writer may be at work.
        """
        if not 0 <= shard < self.meta["n_shards"]:
            raise ValueError(f"A shard number must lie in [0, {self.meta['n_shards']}), got {shard}.")
        self._log.discard(shard, [_piece_key(shard, name) for name in PIECE_DTYPES])

    def _compressed(
        self, shard: int, row: NDArray[Any], latent: NDArray[Any], value: NDArray[Any]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32], int]:
        d_sae, n_rows = self.meta["d_sae"], self.meta["n_rows"]
        if not 0 <= shard < self.meta["n_shards"]:
            raise ValueError(f"A shard number must lie in [0, {self.meta['n_shards']}), got {shard}.")
        problems = []
        if not (row.ndim == latent.ndim == value.ndim == 1 and len(row) == len(latent) == len(value)):
            raise ValueError(
                f"row, latent and value must be 1-D of equal length, got shapes {row.shape}, {latent.shape}, "
                f"{value.shape}."
            )
        if len(row) and not (row.min() >= 0 and row.max() < n_rows):
            problems.append(f"rows must lie in [0, {n_rows}), got [{row.min()}, {row.max()}]")
        if len(row) and not (latent.min() >= 0 and latent.max() < d_sae):
            problems.append(f"latents must lie in [0, {d_sae}), got [{latent.min()}, {latent.max()}]")
        if not np.isfinite(value).all():
            problems.append("values must be finite")
        if problems:
            raise ValueError(f"The latent activations of shard {shard} are not valid: " + "; ".join(problems) + ".")
        base = int(row.min()) if len(row) else 0
        span = int(row.max()) - base + 1 if len(row) else 1
        keys = latent.astype(np.int64) * span + (row.astype(np.int64) - base)
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        if len(keys) > 1 and not (keys[1:] > keys[:-1]).all():
            raise ValueError(
                f"The latent activations of shard {shard} are not valid: a (row, latent) pair comes twice."
            )
        indptr = np.searchsorted(keys, np.arange(d_sae + 1, dtype=np.int64) * span).astype(np.int64)
        return indptr, keys % span + base, value[order].astype(np.float32), base


class LatentStore:
    """Read access to one sealed latent store."""

    def __init__(self, backend: Backend, meta: Mapping[str, Any], *, verify: bool) -> None:
        self.meta = meta
        self._backend = backend
        log = latent_commit_log(backend, meta)
        log.read_seal()
        log.require_complete()
        self._commits = [commit for shard in range(log.n_shards) if (commit := log.read(shard))]
        self._verify = verify
        self._verified: set[str] = set()

    @classmethod
    def open(cls, path: Path, *, verify: bool = True, backend: Backend | None = None) -> LatentStore:
        """Opens a store for reading.

        Args:
            verify: test the digest of every file when it is first read.
        Raises: NotFoundError if there is no store; IncompleteError if it is not sealed; FormatError if it is of a newer
            format version.
        """
        backend = backend or backend_for(path)
        return cls(backend, read_meta(backend), verify=verify)

    @property
    def n_rows(self) -> int:
        """Tokens of the activation store, with or without active latents."""
        return int(self.meta["n_rows"])

    @property
    def d_sae(self) -> int:
        return int(self.meta["d_sae"])

    @property
    def n_entries(self) -> int:
        """Nonzero latent activations in all."""
        return sum(commit.payload["n_entries"] for commit in self._commits)

    def block(self, lo: int, hi: int) -> LatentBlock:
        """Activations of the latents [lo, hi) over all rows. Memory: 12 bytes per entry of the block.

        Raises: ValueError for a range outside of the dictionary; CorruptionError naming file and shard.
        """
        if not 0 <= lo <= hi <= self.d_sae:
            raise ValueError(f"Latents must lie in [0, {self.d_sae}], got [{lo}, {hi}).")
        starts = [self._piece(commit, "indptr")[lo : hi + 1].copy() for commit in self._commits]
        counts = np.array([np.diff(start) for start in starts], np.int64).reshape(len(starts), hi - lo)
        indptr = np.concatenate([[0], counts.sum(axis=0).cumsum()]).astype(np.int64)
        row, value = np.empty(indptr[-1], np.int64), np.empty(indptr[-1], np.float32)
        target = indptr[:-1].copy()  # where the next piece's entries of each latent go
        for commit, start, count in zip(self._commits, starts, counts, strict=True):
            first, last = int(start[0]), int(start[-1])
            to = np.repeat(target - (start[:-1] - first), count) + np.arange(last - first)
            row[to] = self._piece(commit, "row")[first:last].astype(np.int64) + commit.payload["first_row"]
            value[to] = self._piece(commit, "value")[first:last]
            target += count
        return LatentBlock(indptr, row, value)

    def counts(self, start_row: int | None = None, stop_row: int | None = None) -> NDArray[np.int64]:
        """Rows in [start_row, stop_row) on which each latent is active, int64 [d_sae]; None means the store's end."""
        start, stop = start_row or 0, self.n_rows if stop_row is None else stop_row
        if not 0 <= start <= stop <= self.n_rows:
            raise ValueError(f"Rows must lie in [0, {self.n_rows}], got [{start}, {stop}).")
        counts = np.zeros(self.d_sae, np.int64)
        for commit in self._commits:
            first, last = commit.payload["first_row"], commit.payload["stop_row"]
            if last <= start or stop <= first:
                continue
            per_latent = np.diff(self._piece(commit, "indptr"))
            if first < start or stop < last:
                row = self._piece(commit, "row").astype(np.int64) + first
                latent = np.repeat(np.arange(self.d_sae), per_latent)
                per_latent = np.bincount(latent[(start <= row) & (row < stop)], minlength=self.d_sae)
            counts += per_latent
        return counts

    def _piece(self, commit: Commit, name: str) -> NDArray[Any]:
        key = _piece_key(commit.shard, name)
        record = next(file for file in commit.files if file.key == key)
        where = f"{self._backend.location(key)} (shard {commit.shard})"
        repair = advice(self._backend.location())
        try:
            data = self._backend.map(key)
        except NotFoundError as error:
            raise CorruptionError(f"{where} must exist, but it is missing. {repair}") from error
        if data.size != record.n_bytes:
            raise CorruptionError(f"{where} must have {record.n_bytes:,} bytes, but it has {data.size:,}. {repair}")
        if self._verify and key not in self._verified:
            if hashlib.sha256(data.data).hexdigest() != record.sha256:
                raise CorruptionError(f"{where} must match its SHA-256, but it does not. {repair}")
            self._verified.add(key)
        dtype = PIECE_DTYPES[name]
        n = self.d_sae + 1 if name == "indptr" else commit.payload["n_entries"]
        array: NDArray[Any] = data[data.size - n * dtype.itemsize :].view(dtype)
        return array


def _piece_key(shard: int, name: str) -> str:
    return f"pieces/{shard:06d}/{name}.npy"


def _npy_header(array: NDArray[Any]) -> bytes:
    """What numpy writes before the data of a .npy file (version 1.0)."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, np.lib.format.header_data_from_array_1_0(array))
    return stream.getvalue()


def latent_commit_log(backend: Backend, meta: Mapping[str, Any]) -> CommitLog:
    """The commits of the latent store with that meta."""
    return CommitLog(backend, hashlib.sha256(canonical_json(dict(meta))).hexdigest(), meta["n_shards"])


def read_meta(backend: Backend) -> dict[str, Any]:
    """The meta of the store.

    Raises: NotFoundError if there is no store; FormatError if it is of a newer format version.
    """
    try:
        data = backend.read(META)
    except NotFoundError as error:
        raise NotFoundError(
            f"There must be a latent store at {backend.location()}, but it has no {META}. "
            f"Check the path, or run the stage that computes latent activations."
        ) from error
    meta = parse_json_object(data, backend.location(META))
    check_version(meta, backend.location(META))
    absent = [key for key in REQUIRED if key not in meta]
    if absent:
        raise FormatError(f"{backend.location(META)} must have {', '.join(REQUIRED)}; {', '.join(absent)} is absent.")
    require_canonical(data, meta, backend.location(META))
    return meta
