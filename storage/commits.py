"""Exactly-once effect from workers that may run twice, be killed anywhere, or wake up late.

    1 stage     every file of a shard goes to staging/<attempt>/ and is made durable, with its digest
    2 decide    commits/<shard>.json, which names attempt and digests, is created exclusively: this is the one decision
    3 install   the named files move to their keys; whoever finds a commit may repeat this, the result is the same
    4 seal      when every shard is committed and installed, seal.json is created; then staging/ and leases/ are emptied

The loser of step 2 drops its own files and takes the winner's commit. Nothing that is not committed ever stands at a
final key. All state is in the files, so that losing any process loses nothing. Both kinds of store (`activations`,
`latents`) use this module.
"""

from __future__ import annotations

import contextlib
import hashlib
import uuid
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from storage.backends import Backend, Buffer, as_bytes
from storage.errors import CorruptionError, FormatError, IncompleteError, NotFoundError, StorageError
from storage.layout import COMMITS, KEEP, LEASES, SEAL, STAGING, TOMBSTONES, commit_key, tombstone_key
from storage.spec import FORMAT_VERSION, checked_json, parse_checked_json


@dataclass(frozen=True)
class FileRecord:
    """One file of a shard."""

    key: str
    """Where the file belongs."""
    staged: str
    """Its name under staging/<attempt>/ until it is installed."""
    n_bytes: int
    sha256: str


@dataclass(frozen=True)
class Commit:
    """What `commits/<shard>.json` says."""

    shard: int
    attempt: str
    files: tuple[FileRecord, ...]
    payload: Mapping[str, Any]
    """What the kind of store adds: statistics, row ranges, versions."""

    @property
    def n_bytes(self) -> int:
        return sum(file.n_bytes for file in self.files)


class Attempt:
    """Files of one shard under way; visible to nobody until `CommitLog.commit`."""

    def __init__(self, backend: Backend, shard: int) -> None:
        self.shard = shard
        self.name = f"{shard:06d}-{uuid.uuid4().hex}"
        self.prefix = f"{STAGING}/{self.name}"
        self.files: list[FileRecord] = []
        self._backend = backend

    def write(self, key: str, buffers: Iterable[Buffer]) -> None:
        """Stages one file durably; its digest is taken by a second thread while it is written."""
        staged = f"{len(self.files):03d}"
        digest, n_bytes = hashlib.sha256(), 0
        hashing: list[Future[None]] = []
        with ThreadPoolExecutor(max_workers=1) as pool:

            def counted() -> Iterator[memoryview]:
                nonlocal n_bytes
                for buffer in buffers:
                    view = as_bytes(buffer)
                    hashing.append(pool.submit(digest.update, view))
                    n_bytes += view.nbytes
                    yield view

            try:
                self._backend.write(f"{self.prefix}/{staged}", counted())
            except FileNotFoundError:  # removed under our hands: a faster writer committed, `commit` will find it
                if self._backend.size(commit_key(self.shard)) is None:
                    raise
        for future in hashing:
            future.result()
        self.files.append(FileRecord(key, staged, n_bytes, digest.hexdigest()))

    @contextlib.contextmanager
    def removed_on_error(self) -> Iterator[None]:
        """Drops what is staged if the block raises, so that a full disk is not kept full."""
        try:
            yield
        except BaseException:
            self._backend.remove(self.prefix)
            raise


class CommitLog:
    """The commits of one store."""

    def __init__(self, backend: Backend, fingerprint: str, n_shards: int) -> None:
        self.backend = backend
        self.fingerprint = fingerprint
        self.n_shards = n_shards

    def committed(self) -> list[int]:
        """Numbers of the shards that are committed, ascending."""
        names = self.backend.list(COMMITS)
        return [int(name.removesuffix(".json")) for name in names if name.endswith(".json")]

    def missing(self) -> list[int]:
        """Numbers of the shards still to be written, ascending: neither committed nor deleted on purpose."""
        return sorted(set(range(self.n_shards)) - set(self.committed()) - self.tombstoned())

    def tombstoned(self) -> set[int]:
        """Numbers of the shards that were deleted on purpose (see `ring`)."""
        names = self.backend.list(TOMBSTONES)
        return {int(name.removesuffix(".json")) for name in names if name.endswith(".json")}

    def deleted_files(self, shard: int) -> set[str]:
        """Keys of the files of a shard that were deleted on purpose.

        Raises: FormatError or CorruptionError if the tombstone is not one of this store.
        """
        key = tombstone_key(shard)
        try:
            value = parse_checked_json(self.backend.read(key), self.backend.location(key))
        except NotFoundError:
            return set()
        if value.get("fingerprint") != self.fingerprint or value.get("shard") != shard:
            raise CorruptionError(
                f"{self.backend.location(key)} must be the tombstone of shard {shard} of this store, but it is another "
                "one's: it was copied here from elsewhere. Remove it."
            )
        return set(value["files"])

    def read(self, shard: int) -> Commit | None:
        """A shard's commit, None if there is none yet.

        Raises: FormatError or CorruptionError if the file is not a commit of this store.
        """
        key = commit_key(shard)
        try:
            data = self.backend.read(key)
        except NotFoundError:
            return None
        value = parse_checked_json(data, self.backend.location(key))
        if value.get("fingerprint") != self.fingerprint or value.get("shard") != shard:
            raise CorruptionError(
                f"{self.backend.location(key)} must be the commit of shard {shard} of the store "
                f"{self.fingerprint[:12]}, but it says "
                f"shard {value.get('shard')!r} of {str(value.get('fingerprint'))[:12]}: it was copied here from "
                "elsewhere. Remove it."
            )
        try:
            files = tuple(FileRecord(**file) for file in value["files"])
            return Commit(shard, value["attempt"], files, value["payload"])
        except (KeyError, TypeError) as error:
            raise FormatError(
                f"{self.backend.location(key)} is not a commit of format version 1: {error!r}."
            ) from error

    def begin(self, shard: int) -> Attempt:
        """A new attempt at a shard, for `commit`."""
        return Attempt(self.backend, shard)

    def commit(self, attempt: Attempt, payload: Mapping[str, Any]) -> tuple[Commit, bool]:
        """Decides the shard for this attempt unless it is decided already, and installs what was decided.

        Returns: the commit that stands, and whether it is this attempt's.
        """
        record = f"{attempt.prefix}/commit.json"
        value = {
            "format_version": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "shard": attempt.shard,
            "attempt": attempt.name,
            "files": [asdict(file) for file in attempt.files],
            "payload": dict(payload),
        }
        try:
            with attempt.removed_on_error():
                self.backend.write(record, [checked_json(value)])
                self.backend.sync(attempt.prefix)
                self.backend.sync(STAGING)
            won = self.backend.publish(record, commit_key(attempt.shard))
        except FileNotFoundError:  # the staged files are gone: somebody committed this shard, or sealed, and cleaned up
            won = False
        commit = self.read(attempt.shard)
        if commit is None:
            raise StorageError(
                f"The staged files of shard {attempt.shard} vanished from {self.backend.location(attempt.prefix)} "
                "before they were "
                f"committed. Nothing under staging/ may be removed while workers run; write the shard again."
            )
        if not won:
            self.backend.remove(attempt.prefix)
        self.roll_forward(commit)
        return commit, won

    def roll_forward(self, commit: Commit) -> None:
        """Installs the files of a commit as far as they are still staged. Safe to repeat, also in several processes."""
        prefix = f"{STAGING}/{commit.attempt}"
        if not self.backend.list(prefix):
            return
        for file in commit.files:
            self.backend.install(f"{prefix}/{file.staged}", file.key)
        self.backend.remove(prefix)

    def recover(self) -> None:
        """Installs commits that are not installed yet; removes what other attempts at those shards left behind."""
        for name in self.backend.list(STAGING):
            shard = name.partition("-")[0]
            try:
                commit = self.read(int(shard)) if shard.isdigit() else None
            except StorageError:  # a damaged commit is for `verify` to report, not a reason to open nothing
                continue
            if commit is None:
                continue  # an attempt that may still be under way
            if commit.attempt == name:
                self.roll_forward(commit)
            else:
                self.backend.remove(f"{STAGING}/{name}")

    def unseal(self) -> None:
        """Makes the store unfinished, durably; `seal` finishes it again."""
        self.backend.remove(SEAL)
        self.backend.sync("")

    def discard(self, shard: int, keys: Iterable[str]) -> None:
        """Takes a shard back so that it can be written again; no reader or writer may be at work.

        The store is unsealed first and the commit goes last: killed in between, the store is unfinished and the shard
        still known as damaged. The commit is not read, for it may be what is damaged.

        Args:
            keys: the shard's files.
        """
        self.unseal()
        for key in keys:
            self.backend.remove(key)
        for name in self.backend.list(STAGING):
            if name.startswith(f"{shard:06d}-"):
                self.backend.remove(f"{STAGING}/{name}")
        self.backend.remove(commit_key(shard))
        self.backend.sync(COMMITS)

    def seal(self, payload: Mapping[str, Any]) -> None:
        """Declares the store complete. Sealing a sealed store changes nothing.

        Raises: IncompleteError listing the shards that are missing; CorruptionError if a committed file is not in its
            place.
        """
        self.recover()
        self.require_complete()
        tombstoned = self.tombstoned()
        for shard in range(self.n_shards):
            commit = self.read(shard)
            for file in commit.files if commit else ():
                if shard not in tombstoned or file.key not in self.deleted_files(shard):
                    self.require_file(shard, file.key, file.n_bytes)
        value = {
            "format_version": FORMAT_VERSION,
            "fingerprint": self.fingerprint,
            "n_shards": self.n_shards,
            "payload": dict(payload),
        }
        if self.backend.size(SEAL) is None:
            draft = f"{STAGING}/seal-{uuid.uuid4().hex}"
            try:
                self.backend.write(draft, [checked_json(value)])
                self.backend.sync(STAGING)
                self.backend.publish(draft, SEAL)
            except FileNotFoundError:  # another process sealed first and emptied staging/
                if self.backend.size(SEAL) is None:
                    raise
            except BaseException:
                self.backend.remove(draft)
                raise
        for name in self.backend.list(STAGING):
            if name != KEEP:
                self.backend.remove(f"{STAGING}/{name}")
        self.backend.remove(LEASES)

    def require_complete(self) -> None:
        """Raises IncompleteError unless every shard is committed."""
        missing = self.missing()
        if missing:
            listed = ", ".join(map(str, missing[:20])) + (", …" if len(missing) > 20 else "")
            raise IncompleteError(
                f"All {self.n_shards} shards of {self.backend.location()} must be committed, but {len(missing)} are "
                f"missing ({listed}). "
                f"Run the stage that writes it again: it writes only those."
            )

    def read_seal(self) -> Mapping[str, Any]:
        """The seal's payload.

        Raises: IncompleteError if the store is not sealed.
        """
        try:
            data = self.backend.read(SEAL)
        except NotFoundError as error:
            self.require_complete()
            raise IncompleteError(
                f"{self.backend.location()} has all of its shards but is not sealed. Run the stage that writes it "
                "again: it seals."
            ) from error
        value = parse_checked_json(data, self.backend.location(SEAL))
        if value.get("fingerprint") != self.fingerprint:
            raise CorruptionError(
                f"{self.backend.location(SEAL)} seals the store {str(value.get('fingerprint'))[:12]}, but this is "
                f"{self.fingerprint[:12]}: it was copied here from elsewhere. Remove it and run the stage that writes "
                "the store again."
            )
        payload: Mapping[str, Any] = value["payload"]
        return payload

    def require_file(self, shard: int, key: str, n_bytes: int) -> None:
        """Raises CorruptionError unless the file stands at its key with that many bytes."""
        size = self.backend.size(key)
        if size == n_bytes:
            return
        found = "it is missing" if size is None else f"it has {size:,}"
        raise CorruptionError(
            f"{self.backend.location(key)} (shard {shard}) must have {n_bytes:,} bytes, but {found}. "
            f"{advice(self.backend.location())}"
        )


def advice(store: str) -> str:
    """What to do about a damaged shard of the store there."""
    return (
        f"Restore the file from a copy, or run `sae verify {store} --repair`, which discards what is damaged, and then "
        "the stage that writes the store: it writes only that again."
    )
