"""Progress for people: a bar per stage in a terminal, plain lines elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text


@runtime_checkable
class Bar(Protocol):
    """One piece of long work."""

    def advance(self, n: float) -> None:
        """`n` more units are done."""

    def note(self, text: str) -> None:
        """Show a short text beside the bar."""


@runtime_checkable
class Reporter(Protocol):
    """Where stages say what they do."""

    @contextmanager
    def stage(self, name: str, *, total: float, unit: str, done: float = 0) -> Iterator[Bar]:
        """A bar over `total` units, of which `done` were done by an earlier attempt."""
        ...

    def say(self, text: str) -> None:
        """One line."""


class _RateColumn(ProgressColumn):
    """Units a second since this attempt began."""

    def render(self, task: Task) -> Text:
        done = task.completed - float(task.fields["done_before"])
        rate = done / task.elapsed if task.elapsed and done > 0 else 0.0
        return Text(f"{rate:,.0f} {task.fields['unit']}/s" if rate else "", style="green")


class _RichBar:
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def advance(self, n: float) -> None:
        self._progress.advance(self._task, n)

    def note(self, text: str) -> None:
        self._progress.update(self._task, note=text)


class _LineBar:
    """Prints a line at the start, at the end, and at most every `every_s` seconds between."""

    def __init__(self, console: Console, name: str, total: float, unit: str, done: float, every_s: float) -> None:
        self._console, self._name, self._total, self._unit, self._every_s = console, name, total, unit, every_s
        self._start = self._done = done
        self._began = self._last = time.monotonic()
        self._note = ""

    def advance(self, n: float) -> None:
        self._done += n
        if time.monotonic() - self._last >= self._every_s:
            self.line()

    def note(self, text: str) -> None:
        self._note = text

    def line(self) -> None:
        self._last = time.monotonic()
        elapsed = max(self._last - self._began, 1e-9)
        rate = (self._done - self._start) / elapsed
        left = f", {(self._total - self._done) / rate:.0f} s left" if rate > 0 and self._done < self._total else ""
        _print_line(
            self._console,
            f"{self._name}: {self._done:,.0f} of {self._total:,.0f} {self._unit}, "
            f"{rate:,.0f} {self._unit}/s, {elapsed:.0f} s{left} {self._note}".rstrip(),
        )


def _print_line(console: Console, text: str) -> None:
    """Print the text as it is: a path in it is neither wrapped nor read as markup."""
    console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)


class ConsoleReporter:
    """Reports to a terminal (bars) or a file (lines)."""

    def __init__(self, console: Console | None = None, every_s: float = 10.0) -> None:
        self.console = console or Console()
        self._every_s = every_s

    @contextmanager
    def stage(self, name: str, *, total: float, unit: str, done: float = 0) -> Iterator[Bar]:
        """See `Reporter.stage`."""
        if not self.console.is_terminal:
            bar = _LineBar(self.console, name, total, unit, done, self._every_s)
            bar.line()
            yield bar
            bar.line()
            return
        with Progress(
            SpinnerColumn(finished_text="✓"),
            TextColumn("{task.description:<10}", markup=False),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:>3.0f}%"),
            _RateColumn(),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            TextColumn("{task.fields[note]}", markup=False),
            console=self.console,
        ) as progress:
            task = progress.add_task(name, total=total, completed=done, unit=unit, done_before=done, note="")  # type: ignore[arg-type]
            yield _RichBar(progress, task)

    def say(self, text: str) -> None:
        """See `Reporter.say`."""
        _print_line(self.console, text)


class SilentReporter:
    """Reports nothing: for tests and library use."""

    @contextmanager
    def stage(self, name: str, *, total: float, unit: str, done: float = 0) -> Iterator[Bar]:
        """See `Reporter.stage`."""
        yield _NoBar()

    def say(self, text: str) -> None:
        """See `Reporter.say`."""


class _NoBar:
    def advance(self, n: float) -> None:
        pass

    def note(self, text: str) -> None:
        pass
