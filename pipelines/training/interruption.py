"""SIGTERM as a request: finish the step, save, then end. Knows no Ray.

    notice.install()                     # in the main thread, wherever training will run
    with notice.heeded():                # in the thread that trains: SIGTERM now only sets `notice.given`
        train_worker(job, interrupted=lambda: notice.given)

Outside `heeded` SIGTERM does what it did before `install`.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """Training ended before its last step because it was asked to; everything is saved."""


class Notice:
    """Whether this process was asked to end."""

    def __init__(self) -> None:
        self._given = threading.Event()
        self._heeded = False
        self._previous: Any = signal.SIG_DFL
        self._installed = False

    @property
    def given(self) -> bool:
        """Whether SIGTERM came while it was heeded."""
        return self._given.is_set()

    def install(self) -> None:
        """Catch SIGTERM from now on. Only the main thread can do this."""
        if not self._installed:
            self._previous = signal.signal(signal.SIGTERM, self._on_signal)
            self._installed = True

    def uninstall(self) -> None:
        """Undo `install`."""
        if self._installed:
            signal.signal(signal.SIGTERM, self._previous)
            self._installed = False

    @contextmanager
    def heeded(self) -> Iterator[Callable[[], bool]]:
        """While the block lasts, SIGTERM sets `given` and does nothing else. Yields a function that tells it."""
        self._given.clear()
        self._heeded = True
        try:
            yield self._given.is_set
        finally:
            self._heeded = False

    def deliver(self) -> None:
        """Let the SIGTERM that was given do what it would have done at once."""
        if self.given:
            os.kill(os.getpid(), signal.SIGTERM)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._heeded and not self._given.is_set():
            self._given.set()
        elif callable(self._previous):
            self._previous(number, frame)
        else:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


notice = Notice()
"""That of this process."""


def install_notice() -> None:
    """`notice.install` as a function that another process can be told to run."""
    notice.install()
