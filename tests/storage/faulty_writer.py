"""Builds the example store in a process of its own that kills itself with SIGKILL at the n-th place to die.

python faulty_writer.py STORE KILL_AT [SEED]        KILL_AT 0: live, and print the number of places to die at
python faulty_writer.py --serve                     the same for each line "STORE KILL_AT SEED DELAY_S" of the input, in
                                                    a fork, which is killed from outside after the delay if it is not 0

Places are before and after everything that changes a local disk, also inside of each file, and before and after
every request to an object store.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import example_store

from storage.backends import Backend, Buffer, LocalBackend, backend_for
from storage.objects import ObjectBackend

kill_at = 0
_places = itertools.count(1)
_passed = 0


def place_to_die() -> None:
    global _passed
    _passed = next(_places)
    if _passed == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)


class FaultyBackend(LocalBackend):
    """Dies between any two changes of the disk."""

    def write(self, key: str, buffers: Iterable[Buffer]) -> None:
        def torn() -> Iterator[Buffer]:
            for number, buffer in enumerate(buffers):
                yield buffer
                if number == 0:
                    place_to_die()

        place_to_die()
        super().write(key, torn())
        place_to_die()

    def sync(self, prefix: str) -> None:
        super().sync(prefix)
        place_to_die()

    def publish(self, source: str, key: str) -> bool:
        place_to_die()
        won = super().publish(source, key)
        place_to_die()
        return won

    def install(self, source: str, key: str) -> bool:
        place_to_die()
        moved = super().install(source, key)
        place_to_die()
        return moved

    def remove(self, key: str) -> None:
        place_to_die()
        super().remove(key)
        place_to_die()

    def _rename_to_root(self, draft: LocalBackend) -> None:
        place_to_die()
        super()._rename_to_root(draft)
        place_to_die()


class FaultyObjectBackend(ObjectBackend):
    """Dies between any two requests."""

    def _call(self, key: str, request: Callable[[Any], Any], *, repeat: bool = True) -> Any:
        place_to_die()
        answer = super()._call(key, request, repeat=repeat)
        place_to_die()
        return answer


def faulty(url: str) -> Backend:
    return FaultyObjectBackend.from_url(url) if isinstance(backend_for(url), ObjectBackend) else FaultyBackend(url)


def build(url: str, kill: int, seed: int) -> None:
    global kill_at
    kill_at = kill
    example_store.build(url, backend=faulty(url), seed=seed)


def serve() -> None:
    """For each line of input a child of this process: importing everything anew would take most of the time."""
    for line in sys.stdin:
        url, kill, seed, delay_s = line.split()
        child = os.fork()
        if child == 0:
            build(url, int(kill), int(seed))
            os._exit(0)
        if float(delay_s):
            time.sleep(float(delay_s))
            os.kill(child, signal.SIGKILL)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        serve()
    else:
        build(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0)
        print(_passed)
