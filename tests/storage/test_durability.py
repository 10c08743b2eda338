"""The order of fsyncs, from a trace of a writer's system calls.

A kill loses nothing that was written, a power cut loses what was not synced; so the trace is replayed on a model of a
disk that keeps only what is certain: the bytes of files that were fsynced after their last write, and the names in
directories that were fsynced after they appeared. At each decision what it rests on must be certain. To show that the
model can fail, each fsync is left out of the trace in turn: none may be missed without a complaint.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CALLS = "openat,mkdir,write,pwrite64,fsync,fdatasync,link,linkat,rename,renameat,renameat2,unlink,unlinkat,rmdir"
LINE = re.compile(r"^(?P<process>\d+)\s+(?P<call>\w+)\((?P<arguments>.*)\)\s+= (?P<result>-?\d+)")
HALF = re.compile(r"^(?P<process>\d+)\s+(?P<begun>.*) <unfinished \.\.\.>$")
OTHER_HALF = re.compile(r"^(?P<process>\d+)\s+<\.\.\. \w+ resumed>(?P<rest>.*)$")
QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')
DESCRIPTOR = re.compile(r"(?:\d+|AT_FDCWD)<([^>]*)>")


@dataclass(frozen=True)
class Event:
    """A system call that succeeded."""

    call: str
    paths: tuple[str, ...]


def read_trace(trace: Path, below: str) -> list[Event]:
    """Calls that concern paths below the folder, in the order in which they ended."""
    events, begun = [], {}
    for line in trace.read_text(errors="replace").splitlines():
        if half := HALF.match(line):
            begun[half["process"]] = half["begun"]
            continue
        if other := OTHER_HALF.match(line):
            line = f"{other['process']} {begun.pop(other['process'])}{other['rest']}"
        found = LINE.match(line)
        if not found or int(found["result"]) < 0:
            continue
        call, arguments = found["call"], found["arguments"]
        if call in ("write", "pwrite64", "fsync", "fdatasync"):
            paths = DESCRIPTOR.findall(arguments)[:1]
        else:
            folders, names = DESCRIPTOR.findall(arguments), QUOTED.findall(arguments)
            folders += [""] * (len(names) - len(folders))
            paths = [os.path.join(folder, name) for folder, name in zip(folders, names, strict=False)]
        if call == "openat" and "O_CREAT" not in arguments:
            continue
        if any(path.startswith(below) for path in paths):
            events.append(Event(call.removesuffix("2").removesuffix("at"), tuple(paths)))
    return events


class Disk:
    """What would be left of a store after a power cut."""

    def __init__(self, root: str, commits: dict[str, list[tuple[str, str]]]) -> None:
        """
        Args:
            commits: per name under commits/ the paths that its files had while staged, and have when installed.
        """
        self.root = root
        self.commits = commits
        self.complaints: list[str] = []
        self._files: dict[str, object] = {}
        """A token for the content of each file by path; hard links share it."""
        self._directories: set[str] = set()
        self._synced: set[object] = set()
        self._certain_names: set[str] = {os.path.dirname(root)}

    def certain(self, path: str) -> bool:
        """Whether the file or directory would be there, whole."""
        if path in self._files and self._files[path] not in self._synced:
            return False
        while path.startswith(os.path.dirname(self.root)):
            if path not in self._certain_names:
                return False
            path = os.path.dirname(path)
        return True

    def require(self, what: str, *paths: str) -> None:
        self.complaints += [f"{what}: {path} could be lost" for path in paths if not self.certain(path)]

    def replay(self, event: Event) -> None:
        path = event.paths[0]
        match event.call:
            case "open":
                self._files[path] = object()
            case "write" | "pwrite64":
                self._synced.discard(self._files.get(path))
            case "fsync" | "fdatasync":
                if path in self._files:
                    self._synced.add(self._files[path])
                else:
                    self._certain_names |= {name for name in self._names() if os.path.dirname(name) == path}
            case "mkdir":
                self._directories.add(path)
            case "link":
                self._before_link(*event.paths)
                self._files[event.paths[1]] = self._files[path]
                self._certain_names.discard(event.paths[1])
            case "rename":
                self._before_rename(*event.paths)
                self._move(*event.paths)
            case "unlink" | "rmdir":
                self._before_removal(path)
                self._files.pop(path, None)
                self._directories.discard(path)
                self._certain_names.discard(path)

    def _names(self) -> set[str]:
        return self._files.keys() | self._directories

    def _move(self, source: str, target: str) -> None:
        def moved(name: str) -> str:
            return target + name[len(source) :] if name == source or name.startswith(f"{source}/") else name

        self._files = {moved(name): content for name, content in self._files.items()}
        self._directories = {moved(name) for name in self._directories}
        self._certain_names = {moved(name) for name in self._certain_names} - {target}

    def _before_link(self, source: str, target: str) -> None:
        name = os.path.relpath(target, self.root)
        self.require(f"before {name} is created", source)
        if name.startswith("commits/"):
            self.require(f"before {name} is created", *(staged for staged, _ in self.commits[name]))
        if name == "seal.json":
            for commit, files in self.commits.items():
                self.require("before the seal", f"{self.root}/{commit}", *(final for _, final in files))

    def _before_rename(self, source: str, target: str) -> None:
        if target == self.root:
            # Its own name is not certain, nor need it be.
            self._certain_names.add(source)
            self.require("before the store appears", *(name for name in self._names() if name.startswith(source)))
        for commit, files in self.commits.items():
            if (source, target) in files:
                self.require(f"before {os.path.basename(target)} is installed", f"{self.root}/{commit}")

    def _before_removal(self, path: str) -> None:
        attempt = os.path.dirname(path)
        for files in self.commits.values():
            if attempt == os.path.dirname(files[0][0]):
                self.require(f"before {os.path.relpath(path, self.root)} is removed", *(final for _, final in files))

    def end(self) -> None:
        """After the writer said that it is done."""
        self.require("at the end", self.root, f"{self.root}/seal.json")


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Event], Path]:
    """The trace of a writer that builds the example store, and where that is."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed")
    folder = tmp_path_factory.mktemp("traced")
    store, trace = folder / "runs" / "s", folder / "trace"
    tracer = [strace, "-f", "-y", "-s", "4096", "-e", f"trace={CALLS}", "-e", "signal=none", "-o", str(trace)]
    writer = [sys.executable, str(HERE / "faulty_writer.py"), str(store), "0"]
    environment = os.environ | {"PYTHONPATH": str(HERE.parent.parent), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([*tracer, *writer], env=environment, capture_output=True, text=True, timeout=120)
    if run.returncode and "ptrace" in run.stderr:
        pytest.skip(f"this process may not trace others: {run.stderr.strip()}")
    assert run.returncode == 0, run.stderr
    return read_trace(trace, str(folder / "runs")), store


def complaints(events: list[Event], store: Path) -> list[str]:
    commits = {}
    for file in store.glob("commits/*.json"):
        commit = json.loads(file.read_text())
        staged = f"{store}/staging/{commit['attempt']}"
        commits[f"commits/{file.name}"] = [
            (f"{staged}/{record['staged']}", f"{store}/{record['key']}") for record in commit["files"]
        ]
    disk = Disk(str(store), commits)
    for event in events:
        disk.replay(event)
    disk.end()
    return disk.complaints


def test_everything_a_decision_rests_on_is_synced_before_it(traced: tuple[list[Event], Path]) -> None:
    events, store = traced
    decisions = [os.path.relpath(event.paths[-1], store) for event in events if event.call in ("link", "rename")]
    assert decisions[0] == "."
    assert decisions[-1] == "seal.json"
    assert sum(name.startswith("commits/") for name in decisions) == 3
    assert sum(event.call == "fsync" for event in events) > 50
    assert complaints(events, store) == []


def test_no_sync_can_be_left_out(traced: tuple[list[Event], Path]) -> None:
    events, store = traced
    unneeded = []
    for number, event in enumerate(events):
        if event.call == "fsync" and not complaints(events[:number] + events[number + 1 :], store):
            unneeded.append(os.path.relpath(event.paths[0], store.parent))
    assert unneeded == []
