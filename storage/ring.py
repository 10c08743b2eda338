"""A store as a bounded ring: filled, read once in order and emptied behind its readers, but for a slice that stays.

    harvester    writes shard i only while i < first_standing + capacity        (`may_write`)
    consumer     reads shards in ascending order as they are committed; with each durable checkpoint it moves its cursor
                 to the first shard from which it would rebuild its buffer      (`Consumer.advance`)
    janitor      deletes the shards before every cursor, tombstone first        (`sweep`)

The slice from shard `first_retained` on, which ends with all held-out contexts, is written without waiting, never
deleted, and sealed like any store; the contexts of a store are in random order, so it is a random sample. Statistics
of such a store are those of its retained training shards, so that what is a sink does not depend on what has been
deleted when somebody asks. Norms are kept of every shard (4 bytes a row): which rows are usable stays known.
"""

from __future__ import annotations

import re
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Collection
from typing import Any

from storage.backends import Backend, backend_for
from storage.commits import CommitLog
from storage.errors import FormatError, SpecMismatchError, StorageError
from storage.layout import CONSUMERS, RING, STAGING, activations_array, consumer_key, tombstone_key
from storage.leases import POLL_S, Leases, ShardQueue
from storage.spec import FORMAT_VERSION, StoreSpec, checked_json, parse_checked_json
from storage.writer import Path, read_first_retained, read_spec, retained_train_shards

_NAME = re.compile(r"[A-Za-z0-9_-]+")


def ring_sidecar(spec: StoreSpec, retained_fraction: float) -> bytes:
    """`ring.json`, to be given to `ActivationWriter.create` as a sidecar of that name.

    Args:
        retained_fraction: least share of the training contexts that is never deleted.
    Raises: ValueError unless the fraction lies in (0, 1].
    """
    if not 0 < retained_fraction <= 1:
        raise ValueError(f"retained_fraction must lie in (0, 1], got {retained_fraction}.")
    first = int(spec.n_train_contexts * (1 - retained_fraction)) // spec.contexts_per_shard
    return checked_json({"format_version": FORMAT_VERSION, "first_retained": first})


class Ring:
    """The shared state of one ring; all of it is in the store, so any process may hold one."""

    def __init__(self, backend: Backend, spec: StoreSpec, first_retained: int) -> None:
        self.spec = spec
        self.backend = backend
        self.first_retained = first_retained
        self.log = CommitLog(backend, spec.fingerprint, spec.n_shards)

    @classmethod
    def open(cls, path: Path, *, backend: Backend | None = None) -> Ring:
        """The ring of a store that was created with `ring_sidecar`.

        Raises: NotFoundError if there is no store; SpecMismatchError if it is not a ring.
        """
        backend = backend or backend_for(path)
        spec, first = read_spec(backend), read_first_retained(backend)
        if first is None:
            raise SpecMismatchError(
                f"The store at {backend.location()} must be a ring to be read while it is written, but it has no "
                f"{RING}: it keeps every shard. Read it as it is, or choose another path."
            )
        return cls(backend, spec, first)

    @property
    def retained_train(self) -> range:
        """Shards with training contexts that stay."""
        return retained_train_shards(self.spec, self.first_retained)

    def writing_order(self) -> list[int]:
        """All shards: the retained ones for training, whose statistics everybody needs, the ring, the held-out ones."""
        ring, last = range(self.first_retained), range(self.retained_train.stop, self.spec.n_shards)
        return [*self.retained_train, *ring, *last]

    def cursors(self) -> dict[str, int]:
        """First shard that each consumer still needs, by name."""
        found = {}
        for file in self.backend.list(CONSUMERS):
            if file.endswith(".json"):
                value = self._read(f"{CONSUMERS}/{file}")
                found[file.removesuffix(".json")] = int(value["first_needed"])
        return found

    def first_standing(self) -> int:
        """The first shard that is not tombstoned; those before it are gone."""
        tombstoned = self.log.tombstoned()
        return next(shard for shard in range(self.spec.n_shards + 1) if shard not in tombstoned)

    def may_write(self, shard: int, capacity: int) -> bool:
        """Whether a shard may be written without having more than `capacity` on disk besides the retained ones."""
        return shard >= self.first_retained or shard < self.first_standing() + capacity

    def sweep(self) -> list[int]:
        """Deletes what no consumer needs any more, tombstones first; returns the shards. Nothing without consumers."""
        end = min([self.first_retained, *self.cursors().values()]) if self.cursors() else 0
        swept = list(range(self.first_standing(), end))
        for shard in swept:
            self._bury(shard)
            self._delete(shard)
        return swept

    def recover(self) -> None:
        """Deletes what a janitor killed after the tombstone, or a late writer, left behind."""
        for shard in self.log.tombstoned():
            self._delete(shard)

    def readable(self, shard: int) -> bool:
        """Whether a shard is committed and in place.

        Raises: StorageError if it was deleted.
        """
        if self._in_place(shard, set()):
            return True
        if shard in self.log.tombstoned():
            raise StorageError(
                f"Shard {shard} of {self.backend.location()} is needed, but it was deleted on purpose "
                f"({tombstone_key(shard)}): no consumer had its cursor at or before it. Collect into a new store."
            )
        return False

    def known(self, shard: int) -> bool:
        """Whether the norms of a shard are there: those of a deleted one stay."""
        return self._in_place(shard, set(self._deletable(shard)))

    def _in_place(self, shard: int, besides: set[str]) -> bool:
        commit = self.log.read(shard)
        if commit is None:
            return False
        return all(self.backend.size(file.key) == file.n_bytes for file in commit.files if file.key not in besides)

    def _bury(self, shard: int) -> None:
        value = {
            "format_version": FORMAT_VERSION,
            "fingerprint": self.spec.fingerprint,
            "shard": shard,
            "files": self._deletable(shard),
        }
        draft = f"{STAGING}/tombstone-{uuid.uuid4().hex}"
        self.backend.write(draft, [checked_json(value)])
        self.backend.publish(draft, tombstone_key(shard))
        self.backend.remove(draft)

    def _delete(self, shard: int) -> None:
        for key in self._deletable(shard):
            self.backend.remove(key)

    def _deletable(self, shard: int) -> list[str]:
        return [activations_array(self.spec, hook).file_key(shard) for hook in self.spec.hooks]

    def _read(self, key: str) -> dict[str, Any]:
        value = parse_checked_json(self.backend.read(key), self.backend.location(key))
        if value.get("fingerprint") != self.spec.fingerprint:
            raise FormatError(f"{self.backend.location(key)} belongs to another store; remove it.")
        return value


class RingQueue(ShardQueue):
    """The shards of a ring that are still to be written, in `Ring.writing_order`, handed out as its capacity allows.

    Whoever takes shards here is the janitor too: each `take` deletes first what nobody needs any more.
    """

    def __init__(self, ring: Ring, capacity: int, check: Callable[[], None] = lambda: None) -> None:
        """
        Args:
            check: called before each shard; may raise.
        """
        missing = set(ring.log.missing())
        shards = [shard for shard in ring.writing_order() if shard in missing]
        super().__init__(ring.log, Leases(ring.backend), shards)
        self._ring, self._capacity, self._check = ring, capacity, check
        self.most = 0
        """Most shards besides the retained ones that were under way or on disk at once."""

    def take(self) -> int | None:
        self._check()
        self._ring.sweep()
        if not self._free and self._elsewhere and time.monotonic() - self._looked_at >= POLL_S:
            self._look_again()
        while (shard := self._choose()) is not None:
            others, self._free = self._free, deque([shard])
            taken = super().take()
            self._free = others
            if taken is not None:
                return taken
        return None

    @property
    def waiting(self) -> bool:
        return self.open()

    def _choose(self) -> int | None:
        """Removes and returns the next shard, None if all that are left must wait for a consumer."""
        standing, first_retained = self._ring.first_standing(), self._ring.first_retained
        while self._free and self._free[0] < min(standing, first_retained):
            self._free.popleft()  # the consumers were done before it was needed
        if not self._free:
            return None
        if self._free[0] < first_retained:
            if self._free[0] >= standing + self._capacity:
                return self._free.pop() if self._free[-1] >= first_retained else None  # a held-out one meanwhile
            self.most = max(self.most, self._free[0] + 1 - standing)
        return self._free.popleft()


class Consumer:
    """One reader's place in a ring, by name: durable, so that it survives the reader."""

    def __init__(
        self,
        ring: Ring,
        name: str,
        *,
        capacity: int,
        poll_s: float = 0.2,
        patience_s: float = 60.0,
        failure: Callable[[], str | None] = lambda: None,
    ) -> None:
        """Registers the consumer if it is new: from then on nothing that it has not passed is deleted.

        Args:
            capacity: shards besides the retained ones that writers may have on disk.
            patience_s: how long a wait that cannot end lasts before it is an error; other ranks may be about to move
                the cursor.
            failure: says why no more shards will come, None while they may.
        Raises: ValueError for a name that is no file name.
        """
        if not _NAME.fullmatch(name):
            raise ValueError(f"The name of a consumer must be of letters, digits, '_' and '-', got {name!r}.")
        self.ring, self.name, self.capacity = ring, name, capacity
        self._poll_s, self._patience_s, self._failure = poll_s, patience_s, failure
        if self.cursor is None:
            self._write(0)

    @property
    def cursor(self) -> int | None:
        """First shard that is still needed; None before the first registration."""
        return self.ring.cursors().get(self.name)

    def advance(self, first_needed: int) -> None:
        """Gives up the shards before `first_needed`, durably. Call it when the checkpoint that allows it is durable."""
        if first_needed > (self.cursor or 0):
            self._write(first_needed)

    def finish(self) -> None:
        """Gives up everything."""
        self.advance(self.ring.spec.n_shards)

    def wait(self, shards: Collection[int], stopped: threading.Event, starving: threading.Event) -> None:
        """Returns when all the shards can be read, or when `stopped` is set.

        Args:
            starving: set while nothing is left to give out before these shards come.
        Raises: StorageError if they cannot come: they were deleted, the writers failed, or they wait for this consumer.
        """
        self._wait(shards, self.ring.readable, stopped, starving)

    def wait_known(self, shards: Collection[int], stopped: threading.Event, starving: threading.Event) -> None:
        """As `wait`, but for the norms of the shards, which outlive them."""
        self._wait(shards, self.ring.known, stopped, starving)

    def _wait(
        self,
        shards: Collection[int],
        ready: Callable[[int], bool],
        stopped: threading.Event,
        starving: threading.Event,
    ) -> None:
        missing = set(shards)
        stuck_since: float | None = None
        while not stopped.is_set():
            missing -= {shard for shard in missing if ready(shard)}
            if not missing:
                return
            if (reason := self._failure()) is not None:
                raise StorageError(f"Shard {min(missing)} of {self.ring.backend.location()} will not come: {reason}")
            cursor = self.cursor or 0
            held = [s for s in missing if cursor + self.capacity <= s < self.ring.first_retained]
            if not (held and starving.is_set()):
                stuck_since = None
            elif stuck_since is None:
                stuck_since = time.monotonic()
            elif time.monotonic() - stuck_since > self._patience_s:
                raise StorageError(
                    f"Shard {min(held)} must be read before the next checkpoint, but only {self.capacity} shards may "
                    f"be on disk and shard {cursor} is still needed. Raise the capacity, write checkpoints more "
                    "often, or shuffle over fewer contexts."
                )
            stopped.wait(self._poll_s)

    def _write(self, first_needed: int) -> None:
        backend = self.ring.backend
        value = {
            "format_version": FORMAT_VERSION,
            "fingerprint": self.ring.spec.fingerprint,
            "consumer": self.name,
            "first_needed": first_needed,
            "time": time.time(),
        }
        draft = f"{STAGING}/consumer-{uuid.uuid4().hex}"
        backend.write(draft, [checked_json(value)])
        if not backend.install(draft, consumer_key(self.name)):
            raise StorageError(f"{backend.location(draft)} vanished: nothing under staging/ may be removed meanwhile.")
