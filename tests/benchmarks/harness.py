"""What every benchmark shares: interleaved pairs, peers in an environment of their own, and the report.

    ratio = interleaved(ours, theirs)                 # speed of ours relative to theirs, A B B A …
    report = Report("store", "…", threads=2)
    report.add(Figure.of("write_vs_raw", ratio, at_least=0.7))
    report.finish()                                   # table, dated note, and one JSON object as the last line

Only the standard library is imported here, so that a peer's script can use `serve` in the peers' environment.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parents[2]
NOTES = ROOT / "docs" / "benchmarks"
PEERS = Path(os.environ.get("BENCH_PEERS", ROOT / ".venv-peers"))

Run = Callable[[], float]
"""Does one piece of work and returns the seconds that count: start-up and preparation left out."""


def timed(work: Callable[[], object]) -> Run:
    """A run whose whole duration counts."""

    def run() -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    return run


@dataclass(frozen=True)
class Ratio:
    """Relative speed over interleaved pairs."""

    pairs: tuple[float, ...]
    ours_s: tuple[float, ...]
    theirs_s: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.pairs)

    @property
    def low(self) -> float:
        return min(self.pairs)

    @property
    def high(self) -> float:
        return max(self.pairs)


def interleaved(ours: Run, theirs: Run, *, pairs: int = 5, warm_up: int = 1) -> Ratio:
    """Speed of `ours` relative to `theirs` at equal work: above 1, ours is faster.

    The order is A B B A A B …, so that a machine that slows down or speeds up steadily favours neither; the two halves
    of one pair follow each other at once, and the ratio is taken inside the pair.

    Args:
        pairs: at least 5.
        warm_up: runs of each that are not counted.
    Raises: ValueError for fewer than 5 pairs.
    """
    if pairs < 5:
        raise ValueError(f"A ratio needs at least 5 pairs, got {pairs}.")
    for _ in range(warm_up):
        ours()
        theirs()
    a, b = [], []
    for pair in range(pairs):
        for first in (pair % 2 == 0, pair % 2 != 0):
            (a if first else b).append(ours() if first else theirs())
    return Ratio(tuple(y / x for x, y in zip(a, b, strict=True)), tuple(a), tuple(b))


# -- peers -------------------------------------------------------------------------------------------------------------


class PeerAbsent(Exception):
    """A peer cannot be measured here; the message says why."""


class Peer:
    """A script in the peers' environment that stays alive and answers requests, so that its start-up never counts.

    The script calls `serve`. Requests and answers are JSON objects, one a line.
    """

    def __init__(self, script: Path, *arguments: str, env: Mapping[str, str] | None = None) -> None:
        """Starts the script. Raises: PeerAbsent if the environment is not there or the script fails to start."""
        python = PEERS / "bin" / "python"
        if not python.exists():
            raise PeerAbsent("the peers' environment is not installed: make peers")
        self._process = subprocess.Popen(
            [str(python), str(script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if os.environ.get("BENCH_VERBOSE") else subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **(env or {})},
        )
        try:
            self._read()
        except PeerAbsent:
            self.__exit__()
            raise

    def call(self, request: str, **values: Any) -> Any:
        """The answer to one request. Raises: PeerAbsent with the peer's own message if it fails."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"request": request, **values}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise PeerAbsent(f"the peer ended (exit code {self._process.wait()}); BENCH_VERBOSE=1 shows its output")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerAbsent(answer["error"])
        return answer["value"]

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        self._process.kill()
        self._process.wait()


def serve(prepare: Callable[[], Mapping[str, Callable[..., Any]]]) -> None:
    """Body of a peer's script: answers requests by name until its input ends.

    Whatever the peer prints goes to stderr, so that it cannot be taken for an answer.
    """
    answers, sys.stdout = sys.stdout, sys.stderr
    try:
        handlers = prepare()
        _answer(answers, value=sorted(handlers))
        for line in sys.stdin:
            values = json.loads(line)
            _answer(answers, value=handlers[values.pop("request")](**values))
    except Exception as error:
        _answer(answers, error=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        raise


def _answer(stream: TextIO, **value: Any) -> None:
    stream.write(json.dumps(value) + "\n")
    stream.flush()


# -- report ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """One named result; `value` None means that it could not be measured, `note` then says why."""

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    at_least: float | None = None
    at_most: float | None = None
    note: str = ""

    @classmethod
    def of(
        cls, name: str, ratio: Ratio, *, at_least: float | None = None, at_most: float | None = None, note: str = ""
    ) -> Figure:
        """The figure of a ratio, with its range."""
        return cls(name, ratio.median, ratio.low, ratio.high, at_least, at_most, note)

    @classmethod
    def absent(cls, name: str, why: object) -> Figure:
        """A figure that could not be measured."""
        return cls(name, None, note=f"absent: {why}")

    @property
    def target(self) -> str:
        if self.at_least is not None:
            return f"≥ {self.at_least:g}"
        return f"≤ {self.at_most:g}" if self.at_most is not None else ""

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None if there is none or no value."""
        if self.value is None or not self.target:
            return None
        return (self.at_least is None or self.value >= self.at_least) and (
            self.at_most is None or self.value <= self.at_most
        )

    def cells(self) -> tuple[str, str, str, str, str]:
        """Name, value, range, target and note as text."""
        value = "absent" if self.value is None else f"{self.value:.3g}"
        spread = "" if self.low is None or self.high is None else f"{self.low:.3g}–{self.high:.3g}"
        verdict = {True: " met", False: " MISSED", None: ""}[self.met]
        return self.name, value, spread, self.target + verdict, self.note


@dataclass
class Report:
    """Collects figures and facts, then prints and writes them."""

    name: str
    title: str
    threads: int
    facts: dict[str, str] = field(default_factory=dict)
    sections: list[tuple[str, str]] = field(default_factory=list)
    """Heading and Markdown of further parts of the note."""
    figures: list[Figure] = field(default_factory=list)

    def add(self, figure: Figure) -> None:
        """Keeps a figure and says it at once."""
        self.figures.append(figure)
        print("  ".join(cell for cell in figure.cells() if cell), flush=True)

    def finish(self, folder: Path = NOTES) -> None:
        """Prints the table, writes `<date>-<name>.md`, and prints the figures as one line of JSON."""
        print("\n" + self._table(plain=True))
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{time.strftime('%Y-%m-%d')}-{self.name}.md"
        path.write_text(self._note(), encoding="utf-8")
        where = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
        print(f"\nnote: {where}")
        print(json.dumps(self.values()))

    def values(self) -> dict[str, Any]:
        """The figures by name, each with its range where it has one."""
        found: dict[str, Any] = {}
        for figure in self.figures:
            found[figure.name] = None if figure.value is None else round(figure.value, 4)
            if figure.low is not None and figure.high is not None:
                found[f"{figure.name}_range"] = [round(figure.low, 4), round(figure.high, 4)]
        return found

    def _table(self, *, plain: bool) -> str:
        rows = [("figure", "value", "range", "target", "note"), *(figure.cells() for figure in self.figures)]
        if plain:
            widths = [max(len(row[i]) for row in rows) for i in range(5)]
            return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        return "\n".join([lines[0], "|---" * 5 + "|", *lines[1:]])

    def _note(self) -> str:
        facts = machine_facts(self.threads) | self.facts
        parts = [
            f"# {self.title}, {time.strftime('%Y-%m-%d')}",
            f"Made by `make bench-{self.name}`. Every ratio is the median of interleaved pairs (A B B A …) with its "
            "range; thread counts are equal on both sides and start-up is left out.",
            self._table(plain=False),
            "\n".join(f"- {name}: {value}" for name, value in facts.items()),
            *(f"## {heading}\n\n{body}" for heading, body in self.sections),
        ]
        return "\n\n".join(parts) + "\n"


def measure_parts(
    description: str,
    report: Report,
    sizes: tuple[Any, Any],
    measures: Mapping[str, Callable[[Report, Any, Path], object]],
    absent: type[Exception] = PeerAbsent,
) -> None:
    """The command line of a benchmark of several parts: measure those asked for, print, and write the note.

    Args:
        description: its first line is what `--help` says.
        sizes: what `--quick` measures with, and what is measured with otherwise.
        measures: by name, called with the report, the size and a scratch folder that all parts share.
        absent: an error that says that a part cannot be measured here; the report says why.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes: shows only that everything works")
    parser.add_argument("--only", nargs="+", choices=list(measures), default=list(measures), help="some of the parts")
    parser.add_argument("--note", type=Path, default=NOTES, help="folder for the note, instead of docs/benchmarks")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix=f"bench-{report.name}-", dir=os.environ.get("BENCH_SCRATCH")) as scratch:
        for part in asked.only:
            began = time.perf_counter()
            try:
                measures[part](report, sizes[0] if asked.quick else sizes[1], Path(scratch))
            except absent as why:
                report.add(Figure.absent(part, why))
            print(f"[{part}: {time.perf_counter() - began:.0f} s]", flush=True)
    report.finish(asked.note)


def machine_facts(threads: int) -> dict[str, str]:
    """What a reader needs in order to compare: processor, cores, load, versions, commit."""
    versions = []
    for package in ("torch", "numpy", "zarr", "transformers", "ray"):
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    facts = {
        "processor": f"{_processor()}, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f} at the end",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "versions": ", ".join(versions),
        "threads": str(threads),
    }
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if commit.returncode == 0:
        facts["commit"] = commit.stdout.strip()
    return facts


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
