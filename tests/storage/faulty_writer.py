"""Builds the example store in a process of its own that kills itself with SIGKILL at the n-th file operation.

python faulty_writer.py STORE KILL_AT [SEED]        KILL_AT 0: live, and print the number of places to die at
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import example_store

from storage.backends import Buffer, LocalBackend

KILL_AT = int(sys.argv[2])
_places = itertools.count(1)
_passed = 0


def place_to_die() -> None:
    global _passed
    _passed = next(_places)
    if _passed == KILL_AT:
        os.kill(os.getpid(), signal.SIGKILL)


class FaultyBackend(LocalBackend):
    """Places to die before and after everything that changes the disk, and inside of each file."""

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


if __name__ == "__main__":
    path = Path(sys.argv[1])
    example_store.build(path, backend=FaultyBackend(path), seed=int(sys.argv[3]) if len(sys.argv) > 3 else 0)
    print(_passed)
