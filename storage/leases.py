"""Leases: several drivers that fill one store tell each other which shards they are at.

A lease is advice. Whoever ignores one, or takes it over too early, does work twice, which the commit protocol makes
harmless; so nothing here needs to be exact, and no clock to be right.

    leases/<shard>-<generation>.json      created exclusively; the greatest generation of a shard is its lease

To take, renew or take over a lease is to create the next generation: one of those who try succeeds. A lease has
expired when any of these holds:

- its holder was a process of this machine and is gone (so a killed driver that is started again does not wait);
- by its own times and this machine's clock it is over since `SKEW_S` at least;
- it was watched for its whole duration, by this process's own stopwatch, and was not renewed. This ends the wait where
  clocks differ by more than `SKEW_S`.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from storage.backends import Backend
from storage.commits import CommitLog
from storage.errors import StorageError
from storage.layout import LEASES, SEAL, STAGING
from storage.spec import canonical_json, parse_json_object

if TYPE_CHECKING:
    from types import TracebackType

SKEW_S = 10.0
"""Difference between clocks that is allowed for."""
DURATION_S = 120.0
"""How long a lease holds without being renewed; it is renewed three times as often."""
POLL_S = 2.0
"""How often shards that others hold are looked at again."""


@dataclass(frozen=True)
class Lease:
    """What a lease says."""

    holder: str
    """A name that no other holder has."""
    machine: str
    """Where process numbers mean the same; empty if that cannot be told."""
    process: int
    process_started: str
    taken_at: float
    """Seconds since 1970 by the holder's clock."""
    duration_s: float


class Leases:
    """The leases of one store, as one holder sees them. Threads may share it."""

    def __init__(
        self,
        backend: Backend,
        *,
        duration_s: float = DURATION_S,
        clock: Callable[[], float] = time.time,
        stopwatch: Callable[[], float] = time.monotonic,
    ) -> None:
        self.duration_s = duration_s
        self._backend = backend
        self._clock = clock
        self._stopwatch = stopwatch
        self._holder = uuid.uuid4().hex
        self._held: dict[int, int] = {}
        """Generation of each lease that is ours."""
        self._first_seen: dict[tuple[int, int], float] = {}
        self._lock = threading.RLock()

    @property
    def held(self) -> list[int]:
        """Shards whose leases are ours, as far as we know, ascending."""
        with self._lock:
            return sorted(self._held)

    def take(self, shard: int) -> bool:
        """Takes the shard's lease if it is free or expired. True if it is ours now."""
        with self._lock:
            if shard in self._held:
                return True
            generation = self._generation(shard)
            if generation is not None and not self._expired(shard, generation):
                return False
            return self._create(shard, 0 if generation is None else generation + 1)

    def renew(self) -> list[int]:
        """Extends every lease that is still ours; returns the shards of those that are not any more."""
        lost = []
        with self._lock:
            for shard, generation in list(self._held.items()):
                del self._held[shard]
                # A lease that is gone is not made anew: its store was sealed, or it was taken over.
                if self._generation(shard) != generation or not self._create(shard, generation + 1):
                    lost.append(shard)
        return lost

    def release(self, shard: int) -> None:
        """Gives a lease back; nothing happens if it is not ours."""
        with self._lock:
            generation = self._held.pop(shard, None)
            if generation is not None:
                self._remove_up_to(shard, generation)

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Renews our leases from a thread until the block ends, then releases them."""
        stopped = threading.Event()

        def keep() -> None:
            while not stopped.wait(self.duration_s / 3):
                with contextlib.suppress(StorageError, OSError):  # the next time may do; an expired lease harms nobody
                    self.renew()

        thread = threading.Thread(target=keep, name="leases", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stopped.set()
            thread.join()
            for shard in self.held:
                self.release(shard)

    def _generation(self, shard: int) -> int | None:
        return max(self._generations(shard), default=None)

    def _generations(self, shard: int) -> list[int]:
        prefix = f"{shard:06d}-"
        names = (name.removesuffix(".json") for name in self._backend.list(LEASES) if name.startswith(prefix))
        return [int(number) for name in names if (number := name.removeprefix(prefix)).isdigit()]

    def _create(self, shard: int, generation: int) -> bool:
        if self._backend.size(SEAL) is not None:
            return False
        lease = Lease(
            self._holder, _MACHINE, os.getpid(), _process_started(os.getpid()), self._clock(), self.duration_s
        )
        draft = f"{STAGING}/lease-{uuid.uuid4().hex}"
        self._backend.write(draft, [canonical_json(asdict(lease))])
        try:
            won = self._backend.publish(draft, lease_key(shard, generation))
        except FileNotFoundError:  # the store was sealed, which empties staging/
            return False
        finally:
            self._backend.remove(draft)
        if not won:
            return False
        if self._generation(shard) != generation:  # we took a number that others had used and left behind
            self._backend.remove(lease_key(shard, generation))
            return False
        self._held[shard] = generation
        self._remove_up_to(shard, generation - 1)
        return True

    def _remove_up_to(self, shard: int, generation: int) -> None:
        for old in self._generations(shard):
            if old <= generation:
                self._backend.remove(lease_key(shard, old))

    def _expired(self, shard: int, generation: int) -> bool:
        seen = self._first_seen.setdefault((shard, generation), self._stopwatch())
        watched_s = self._stopwatch() - seen
        key = lease_key(shard, generation)
        try:
            lease = Lease(**parse_json_object(self._backend.read(key), self._backend.location(key)))
        except FileNotFoundError:  # released meanwhile
            return True
        except (StorageError, TypeError):  # not a lease that we know: it binds us for as long as our own would
            return watched_s > self.duration_s
        if lease.machine == _MACHINE and _MACHINE and _process_started(lease.process) != lease.process_started:
            return True
        return watched_s > lease.duration_s or self._clock() > lease.taken_at + lease.duration_s + SKEW_S


class ShardQueue:
    """The shards that are still to be written, as one of several drivers takes them.

    with ShardQueue(log, Leases(backend)) as queue:
        while queue.open():
            shard = queue.take()      # None: all that is left is in others' hands for now
            ...
            queue.done(shard)
    """

    def __init__(self, log: CommitLog, leases: Leases, shards: Iterable[int] | None = None) -> None:
        """
        Args:
            shards: those to be done; by default all that have no commit.
        """
        self._log = log
        self._leases = leases
        self._free = deque(log.missing() if shards is None else shards)
        self._elsewhere: set[int] = set()
        """Shards that others held when we last looked."""
        self._ours: set[int] = set()
        self._looked_at = time.monotonic()
        self._exit = contextlib.ExitStack()

    def take(self) -> int | None:
        """A shard to write, whose lease is ours until `done`; None if there is none now, or none at all: see `open`."""
        if not self._free and self._elsewhere and time.monotonic() - self._looked_at >= POLL_S:
            self._look_again()
        while self._free:
            shard = self._free.popleft()
            if not self._leases.take(shard):
                self._elsewhere.add(shard)
            elif self._log.read(shard) is not None:  # somebody was faster
                self._leases.release(shard)
            else:
                self._ours.add(shard)
                return shard
        return None

    def done(self, shard: int) -> None:
        """Says that the shard is committed."""
        self._ours.discard(shard)
        self._leases.release(shard)

    def give_back(self, shard: int) -> None:
        """Says that whoever was at the shard is gone; it is handed out again."""
        if shard in self._ours:
            self._ours.discard(shard)
            self._free.appendleft(shard)

    def open(self) -> bool:
        """Whether some shard is not known to be committed: to be taken, in our hands, or in others'."""
        return bool(self._free or self._elsewhere or self._ours)

    @property
    def waiting(self) -> bool:
        """Whether there is nothing to take, but may be later."""
        return not self._free and bool(self._elsewhere)

    def _look_again(self) -> None:
        self._looked_at = time.monotonic()
        missing = set(self._log.missing())
        self._free.extend(sorted(self._elsewhere & missing))
        self._elsewhere.clear()

    def __enter__(self) -> ShardQueue:
        self._exit.enter_context(self._leases.kept())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exit.close()


def lease_key(shard: int, generation: int) -> str:
    """Key of a lease."""
    return f"{LEASES}/{shard:06d}-{generation:06d}.json"


def _machine() -> str:
    """Where process numbers mean the same: host, boot and namespace of process numbers (containers have their own)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()}/{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _process_started(process: int) -> str:
    """When the process started, in the kernel's ticks; empty if it has ended, or that cannot be told."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return ""
    state, *fields = stat.rpartition(")")[2].split()
    return "" if state in "ZX" else fields[18]  # a killed process that nobody has waited for is still listed


_MACHINE = _machine()
