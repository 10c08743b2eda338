"""The run directory: where every artefact of a run stands, and which stages are finished.

    runs/NAME/{config.yaml, activations/, checkpoints/SAE/, latents/SAE/, labels/SAE/, imports/SAE/, llm/,
    dictionaries/SAE/, audit/, metrics.json, events.jsonl, .stages/}

Files appear whole or not at all: written beside, flushed to disk, renamed.
"""

import datetime
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from pipelines.errors import RunError

PAGES = "pages"
"""The folder of the feature pages inside a dictionary folder."""


@dataclass(frozen=True)
class RunDir:
    """Paths inside a run directory; creating the object touches nothing."""

    path: Path

    @property
    def config_path(self) -> Path:
        """The resolved config."""
        return self.path / "config.yaml"

    @property
    def metrics_path(self) -> Path:
        """Flat metrics of the run."""
        return self.path / "metrics.json"

    @property
    def evaluation_path(self) -> Path:
        """The evaluation's figures with intervals, definitions and details."""
        return self.path / "evaluation.json"

    @property
    def store_path(self) -> Path:
        """The activation store, unless the config names a shared one."""
        return self.path / "activations"

    def checkpoints(self, sae: str) -> Path:
        """Exact-resume state of one SAE."""
        return self.path / "checkpoints" / sae

    def trained(self, sae: str) -> Path:
        """The trained dictionary before labels, metrics and the card are added."""
        return self.checkpoints(sae) / "dictionary"

    def latents(self, sae: str) -> Path:
        """Sparse latent activations."""
        return self.path / "latents" / sae

    def labels(self, sae: str) -> Path:
        """features.parquet and examples.parquet as the label stage writes them."""
        return self.path / "labels" / sae

    def imports(self, sae: str) -> Path:
        """Labels of other people; no stage writes here."""
        return self.path / "imports" / sae

    @property
    def llm(self) -> Path:
        """Every call to a language model that labels, with its answer and cost; kept over reruns."""
        return self.path / "llm"

    def dictionary(self, sae: str) -> Path:
        """What users load."""
        return self.path / "dictionaries" / sae

    def audit(self, name: str) -> Path:
        """One concept's audit."""
        return self.path / "audit" / name

    # -- stages ------------------------------------------------------------------------------------------------------

    def stage_key(self, stage: str) -> str | None:
        """Key of the inputs with which `stage` finished; None if it has not, or if a result of it was removed since."""
        marker = self.path / ".stages" / f"{stage}.json"
        if not marker.exists():
            return None
        record = read_json(marker)
        return str(record["key"]) if all((self.path / result).exists() for result in record["results"]) else None

    def stage_results(self, stage: str) -> list[Path]:
        """The files that `stage` left when it last finished; none if it never has."""
        marker = self.path / ".stages" / f"{stage}.json"
        return [self.path / result for result in read_json(marker)["results"]] if marker.exists() else []

    def mark_finished(self, stage: str, key: str, seconds: float, results: Iterable[Path] = ()) -> None:
        """Record that `stage` is finished for the inputs behind `key`, and the files without which it is not."""
        within = [
            str(path.relative_to(self.path) if path.is_relative_to(self.path) else path.resolve()) for path in results
        ]
        write_json(
            self.path / ".stages" / f"{stage}.json",
            {"key": key, "finished": now(), "seconds": round(seconds, 3), "results": within},
        )

    def forget(self, stage: str) -> None:
        """Make `stage` run again."""
        (self.path / ".stages" / f"{stage}.json").unlink(missing_ok=True)

    # -- records -----------------------------------------------------------------------------------------------------

    def metrics(self) -> dict[str, Any]:
        """Flat metrics recorded so far."""
        return read_json(self.metrics_path) if self.metrics_path.exists() else {}

    def update_metrics(self, prefix: str, values: dict[str, Any]) -> None:
        """Set the metrics `prefix.name`; those of other stages stay, older ones under the same names are replaced."""
        merged = self.metrics() | {f"{prefix}.{name}": value for name, value in values.items()}
        write_json(self.metrics_path, dict(sorted(merged.items())))

    def drop_metrics(self, prefix: str) -> None:
        """Remove the metrics whose names begin with `prefix`."""
        write_json(self.metrics_path, {name: v for name, v in self.metrics().items() if not name.startswith(prefix)})

    def event(self, event: str, **fields: Any) -> None:
        """Append one line to events.jsonl."""
        self.path.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"time": now(), "event": event, **fields}, ensure_ascii=False)
        with (self.path / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run directory; a second process on it gets a clear error. The lock goes with the process."""
        self.path.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise RunError(
                f"another process is working in {self.path}: wait for it, or choose another --out"
            ) from error
        try:
            yield
        finally:
            lock.release()


def now() -> str:
    """UTC time, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def key_of(*parts: Any) -> str:
    """Digest of JSON-able inputs."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object that this module wrote.

    Raises:
        RunError: the file is damaged.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{path} is damaged ({error}): delete it and run the same command again") from error
    if not isinstance(value, dict):
        raise RunError(f"{path} is damaged (no JSON object): delete it and run the same command again")
    return value


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file that appears whole or not at all, and survives a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    fsync_directory(path.parent)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` for UTF-8 text."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """`write_bytes` for JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def fsync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing_directory(path: Path) -> Iterator[Path]:
    """A folder to fill that takes the place of `path` when the block ends well, and vanishes when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir()
    try:
        yield partial
        old = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.old")
        if path.exists():
            os.rename(path, old)
        os.rename(partial, path)
        fsync_directory(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def sweep_partials(path: Path) -> None:
    """Remove what killed writers left in a directory: `.NAME.*.partial`, `.NAME.*.old`, `.NAME.*.tmp`."""
    for pattern in (".*.partial", ".*.old", ".*.tmp"):
        for leftover in path.glob(pattern):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
