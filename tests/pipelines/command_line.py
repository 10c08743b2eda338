"""Runs the real `sae` command in processes of its own, and reads what its runs leave behind."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import pyarrow.parquet as pq

Victims = Literal["driver", "group", "machine"]

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, str(ROOT / "sae_pipelines_entry.py")]


@dataclass(frozen=True)
class FinishedRun:
    """A run that ended well; shared by many tests, so never changed: take a `copy`."""

    config: Path
    out: Path
    output: str

    def copy(self, out: Path, *, without: tuple[str, ...] = ()) -> "FinishedRun":
        """The same run elsewhere, with the stages `without` undone."""
        shutil.copytree(self.out, out)
        for stage in without:
            (out / ".stages" / f"{stage}.json").unlink()
        results = {"train": "checkpoints", "label": "labels", "export": "dictionaries", "audit": "audit"}
        for stage in set(without) & set(results):
            shutil.rmtree(out / results[stage])
        if "label" in without:
            shutil.rmtree(out / "latents")
        for marker in (out / ".stages").glob("audit.*.json") if "audit" in without else ():
            marker.unlink()
        if "evaluate" in without:
            kept = {k: v for k, v in json.loads((out / "metrics.json").read_text()).items() if k.startswith("collect.")}
            (out / "metrics.json").write_text(json.dumps(kept))
        (out / "events.jsonl").unlink()
        return FinishedRun(self.config, out, self.output)


def sae(*arguments: object, timeout: float = 400) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=timeout, check=False
    )


def sae_here(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The same command inside this process, for what ends before Ray starts: seconds less of imports."""
    from typer.testing import CliRunner

    from pipelines.cli import app

    result = CliRunner().invoke(app, [*map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return subprocess.CompletedProcess([*arguments], result.exit_code, result.stdout, result.stderr)


def must(process: subprocess.CompletedProcess[str]) -> str:
    """Its output, if it ended well."""
    assert process.returncode == 0, f"{process.args}\n{process.stdout}\n{process.stderr}"
    return process.stdout


def sentence(process: subprocess.CompletedProcess[str], exit_code: int) -> str:
    """The message of a command that ended with `exit_code` for its user's sake: on stderr, and without a traceback."""
    assert process.returncode == exit_code, f"exit code {process.returncode}\n{process.stdout}\n{process.stderr}"
    assert process.stderr.startswith("sae: "), process.stderr
    assert "Traceback" not in process.stderr + process.stdout, process.stderr
    return re.sub(r"\s+", " ", process.stderr.removeprefix("sae: ")).strip()


# -- what a run left ---------------------------------------------------------------------------------------------------


def events(out: Path) -> list[dict[str, Any]]:
    """The whole lines of events.jsonl; empty before there are any."""
    path = out / "events.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def stages(out: Path, event: str) -> list[str]:
    """Stages of the events `stage started`, `stage finished` or `stage failed`, in order."""
    return [line["stage"] for line in events(out) if line["event"] == event]


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of every file: equal when nothing was written."""
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def shard_digests(store: Path) -> dict[str, list[str]]:
    """Digests of the files of every committed shard."""
    return {
        path.name: sorted(f"{file['key']} {file['sha256']}" for file in json.loads(path.read_text())["files"])
        for path in sorted((store / "commits").glob("*.json"))
    }


def outcome(out: Path) -> dict[str, Any]:
    """All that a run found: equal for two runs of one config, however often they were interrupted."""
    audits = {}
    for path in sorted((out / "audit").glob("*/audit.json")):
        record = json.loads(path.read_text())
        audits[path.parent.name] = {
            key: value for key, value in record.items() if key not in ("created", "seconds", "command")
        } | {
            # The ledger is the user's and outlives runs: a second opening has another place and time in it, and lists
            # the first. Which plan opened which texts of which dictionaries, and whether it counts as reuse, is equal.
            "opening": {
                key: record["opening"][key] for key in ("manifest_sha256", "confirm_sha256", "dictionaries", "reused")
            }
        }
    steps = [json.loads(line) for line in (out / "checkpoints/main/metrics.jsonl").read_text().splitlines()]
    return {
        "shards": shard_digests(out / "activations"),
        "steps": [{key: value for key, value in step.items() if key != "time"} for step in steps],
        "weights": (out / "dictionaries/main/sae_weights.safetensors").read_bytes(),
        "sparsity": (out / "dictionaries/main/sparsity.safetensors").read_bytes(),
        "metrics": json.loads((out / "metrics.json").read_text()),
        "features": pq.read_table(out / "dictionaries/main/features.parquet").to_pylist(),
        "examples": pq.read_table(out / "dictionaries/main/examples.parquet").to_pylist(),
        "audits": audits,
    }


def same_outcome(out: Path, other: Path) -> bool:
    """Whether two runs found the same; fails naming what differs."""
    ours, theirs = outcome(out), outcome(other)
    differing = [line for key in ours for line in differences(ours[key], theirs[key], key)]
    assert not differing, f"{out} and {other} differ in\n" + "\n".join(differing[:20])
    return True


def differences(ours: Any, theirs: Any, at: str) -> Iterator[str]:
    """Where two JSON values differ, a line for each place; NaN equals itself."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted({*ours, *theirs}, key=str):
            yield from differences(ours.get(key, "nothing"), theirs.get(key, "nothing"), f"{at}.{key}")
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            yield from differences(a, b, f"{at}[{i}]")
    elif repr(ours) != repr(theirs):
        yield f"{at}: {repr(ours)[:100]} and {repr(theirs)[:100]}"


# -- killing -----------------------------------------------------------------------------------------------------------


class Driver:
    """The command under way, in a process group of its own."""

    def __init__(self, *arguments: object, log: Path) -> None:
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [*COMMAND, *map(str, arguments)], stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._log = log

    def wait_until(self, condition: Callable[[], bool], timeout: float = 300) -> None:
        """Return as soon as `condition` holds; it must do so before the command ends."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.process.poll() is None, f"the command ended before the moment came:\n{self._log.read_text()}"
            assert time.monotonic() < deadline, f"the moment never came:\n{self._log.read_text()}"
            time.sleep(0.002)

    def descendants(self, name: str = "") -> list[psutil.Process]:
        """The processes below the driver whose title contains `name`."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if name in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def kill(self, whom: Victims) -> list[psutil.Process]:
        """SIGKILL, and see the workers go, which takes them some seconds when they are not killed themselves.

        Args:
            whom: the driver alone, its process group (a closed terminal), or every process (a lost machine).

        Returns: the two idle agents of Ray, which try for a minute to tell the dead session of its death.
        """
        agents = self.descendants("ray::DashboardAgent") + self.descendants("ray::RuntimeEnvAgent")
        others = [process for process in self.descendants() if process not in agents]
        if whom == "group":
            os.killpg(self.process.pid, signal.SIGKILL)
        else:
            self.process.kill()
        for process in [*others, *agents] if whom == "machine" else ():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        assert not psutil.wait_procs(others, timeout=20)[1]
        return agents

    def finish(self, timeout: float = 400) -> str:
        """Wait for the end, which must be a good one; returns what it printed."""
        code = self.process.wait(timeout)
        output = self._log.read_text()
        assert code == 0, output
        return output
