"""`verify`: reads a store from end to end and lists everything that is wrong with it. `repair` discards the damaged
shards, so that the stage that writes the store writes those again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from storage.backends import Backend, ByteSource, backend_for
from storage.commits import CommitLog
from storage.errors import IncompleteError, NotFoundError, StorageError
from storage.latents import META, LatentWriter, latent_commit_log, read_meta
from storage.layout import SEAL, SPEC, TABLES, metadata_files, shard_arrays, tombstone_key
from storage.writer import ActivationWriter, Path, read_spec, read_tables

Kind = Literal[
    "missing file", "wrong size", "wrong digest", "wrong metadata", "not committed", "not sealed", "unreadable"
]

HASHED_AT_ONCE = 64 * 2**20
"""Bytes; bounds what is held of a remote file."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong."""

    file: str
    """Key relative to the store."""
    shard: int | None
    """None if the file does not belong to a shard."""
    kind: Kind
    detail: str


@dataclass(frozen=True)
class Repair:
    """What `repair` found and did."""

    problems: list[Problem]
    """As `verify` found them before anything was discarded; empty if the store is sound and sealed."""
    discarded: list[int]
    """Shards that were taken back, to be written again."""
    irreparable: list[Problem]
    """Those that belong to no shard: what a store has from the start is written once, when it is created."""


def verify(path: Path, fast: bool = False, *, backend: Backend | None = None) -> list[Problem]:
    """Every problem of an activation or latent store; an empty list means that each byte is as it was committed.

    Args:
        fast: look at names and sizes only, do not re-read and re-hash the data.
    Raises: NotFoundError if there is no store at all.
    """
    backend = backend or backend_for(path)
    if _is_latent(backend):
        try:
            return list(_check_commits(backend, latent_commit_log(backend, read_meta(backend)), fast))
        except StorageError as error:
            return [Problem(META, None, "unreadable", str(error))]
    try:
        spec = read_spec(backend)
    except NotFoundError:
        raise
    except StorageError as error:
        return [Problem(SPEC, None, "unreadable", str(error))]
    try:
        tables = read_tables(backend, spec)
    except NotFoundError:
        return [Problem(TABLES, None, "missing file", "the digests of tables and metadata are gone")]
    except StorageError as error:
        return [Problem(TABLES, None, "unreadable", str(error))]
    problems = []
    for key, data in metadata_files(spec).items():
        if backend.size(key) is not None and backend.read(key) != data:
            problems.append(Problem(key, None, "wrong metadata", "the file is not what the specification gives"))
    for key, record in tables["files"].items():
        problems += _check_file(backend, key, None, record["n_bytes"], record["sha256"], fast)
    log = CommitLog(backend, spec.fingerprint, spec.n_shards)
    problems += _check_commits(backend, log, fast)
    for shard in log.missing():
        for hook in spec.hooks:
            for array in shard_arrays(spec, hook):
                if backend.size(array.file_key(shard)) is not None:
                    key = array.file_key(shard)
                    problems.append(Problem(key, shard, "not committed", "a file stands here without a commit"))
    return problems


def repair(path: Path, *, backend: Backend | None = None) -> Repair:
    """Discards every damaged shard, and with it the seal. Killed anywhere it can be repeated.

    If something irreparable is found, nothing is discarded: the shards could not be written again.
    No reader or writer may be at work.

    Raises: NotFoundError if there is no store at all.
    """
    backend = backend or backend_for(path)
    try:
        writer: ActivationWriter | LatentWriter
        # Opening installs what is committed but not installed, which `verify` would take for missing.
        writer = (LatentWriter if _is_latent(backend) else ActivationWriter).open(path, backend=backend)
    except StorageError:
        problems = verify(path, backend=backend)
        return Repair(problems, [], problems)
    problems = verify(path, backend=backend)
    irreparable = [problem for problem in problems if problem.shard is None and problem.file != SEAL]
    if irreparable:
        return Repair(problems, [], irreparable)
    sealed = backend.size(SEAL) is not None  # if not, a shard without a commit is missing, not damaged
    damaged = {p.shard for p in problems if p.shard is not None and (sealed or p.kind != "not committed")}
    if any(problem.file == SEAL and problem.kind == "unreadable" for problem in problems):
        writer.unseal()
    for shard in sorted(damaged):
        writer.discard(shard)
    return Repair(problems, sorted(damaged), [])


def _is_latent(backend: Backend) -> bool:
    return backend.size(META) is not None and backend.size(SPEC) is None


def _check_commits(backend: Backend, log: CommitLog, fast: bool) -> Iterator[Problem]:
    tombstoned = log.tombstoned()
    for shard in range(log.n_shards):
        try:
            commit = log.read(shard)
        except StorageError as error:
            yield Problem(f"commits/{shard:06d}.json", shard, "unreadable", str(error))
            continue
        if shard in tombstoned:
            try:
                deleted = log.deleted_files(shard)
            except StorageError as error:
                yield Problem(tombstone_key(shard), shard, "unreadable", str(error))
                continue
        else:
            deleted = set()
        if commit is None and shard in tombstoned:
            continue  # given up before it was written
        if commit is None:
            yield Problem(f"commits/{shard:06d}.json", shard, "not committed", "the shard was not written")
            continue
        for file in commit.files:
            if file.key in deleted:
                continue
            yield from _check_file(backend, file.key, shard, file.n_bytes, file.sha256, fast)
    try:
        log.read_seal()
    except IncompleteError as error:
        yield Problem("seal.json", None, "not sealed", str(error))
    except StorageError as error:
        yield Problem("seal.json", None, "unreadable", str(error))


def _check_file(
    backend: Backend, key: str, shard: int | None, n_bytes: int, sha256: str, fast: bool
) -> Iterator[Problem]:
    size = backend.size(key)
    if size is None:
        yield Problem(key, shard, "missing file", f"{n_bytes:,} bytes are gone")
    elif size != n_bytes:
        yield Problem(key, shard, "wrong size", f"{size:,} bytes where {n_bytes:,} were committed")
    elif not fast and _sha256(backend.open(key)) != sha256:
        yield Problem(key, shard, "wrong digest", "the bytes are not those that were committed")


def _sha256(source: ByteSource) -> str:
    digest = hashlib.sha256()
    for start in range(0, source.size, HASHED_AT_ONCE):
        digest.update(source[start : min(start + HASHED_AT_ONCE, source.size)].data)
    return digest.hexdigest()
