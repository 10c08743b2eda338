"""`verify`: reads a store from end to end and lists everything that is wrong with it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from storage.backends import Backend, LocalBackend
from storage.commits import CommitLog
from storage.errors import IncompleteError, NotFoundError, StorageError
from storage.latents import META, latent_commit_log, read_meta
from storage.layout import SPEC, TABLES, activations_array, metadata_files, norms_array
from storage.spec import canonical_json
from storage.writer import Path, read_spec, read_tables

Kind = Literal[
    "missing file", "wrong size", "wrong digest", "wrong metadata", "not committed", "not sealed", "unreadable"
]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong."""

    file: str
    """Key relative to the store."""
    shard: int | None
    """None if the file does not belong to a shard."""
    kind: Kind
    detail: str


def verify(path: Path, fast: bool = False, *, backend: Backend | None = None) -> list[Problem]:
    """Every problem of an activation or latent store; an empty list means that each byte is as it was committed.

    Args:
        fast: look at names and sizes only, do not re-read and re-hash the data.
    Raises: NotFoundError if there is no store at all.
    """
    backend = backend or LocalBackend(path)
    if backend.size(META) is not None and backend.size(SPEC) is None:
        try:
            return list(_check_commits(backend, latent_commit_log(backend, read_meta(backend)), fast))
        except StorageError as error:
            return [Problem(META, None, "unreadable", str(error))]
    try:
        spec = read_spec(backend)
        tables = read_tables(backend, spec)
    except NotFoundError:
        if backend.size(SPEC) is None:
            raise
        return [Problem(TABLES, None, "missing file", "the digests of tables and metadata are gone")]
    except StorageError as error:
        return [Problem(SPEC, None, "unreadable", str(error))]
    problems = []
    if backend.read(SPEC) != canonical_json(spec.to_json()):
        problems.append(Problem(SPEC, None, "wrong metadata", "the file is not in canonical form: it was edited"))
    for key, data in metadata_files(spec).items():
        if backend.size(key) is not None and backend.read(key) != data:
            problems.append(Problem(key, None, "wrong metadata", "the file is not what the specification gives"))
    for key, record in tables["files"].items():
        problems += _check_file(backend, key, None, record["n_bytes"], record["sha256"], fast)
    log = CommitLog(backend, spec.fingerprint, spec.n_shards)
    problems += _check_commits(backend, log, fast)
    for shard in log.missing():
        for hook in spec.hooks:
            for array in (activations_array(spec, hook), norms_array(spec, hook)):
                if backend.size(array.file_key(shard)) is not None:
                    key = array.file_key(shard)
                    problems.append(Problem(key, shard, "not committed", "a file stands here without a commit"))
    return problems


def _check_commits(backend: Backend, log: CommitLog, fast: bool) -> Iterator[Problem]:
    for shard in range(log.n_shards):
        try:
            commit = log.read(shard)
        except StorageError as error:
            yield Problem(f"commits/{shard:06d}.json", shard, "unreadable", str(error))
            continue
        if commit is None:
            yield Problem(f"commits/{shard:06d}.json", shard, "not committed", "the shard was not written")
            continue
        for file in commit.files:
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
    elif not fast and hashlib.sha256(backend.map(key).data).hexdigest() != sha256:
        yield Problem(key, shard, "wrong digest", "the bytes are not those that were committed")
