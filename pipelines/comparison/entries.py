"""What is compared: the evaluations of runs, and of dictionary folders that carry theirs."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.errors import UsageError
from pipelines.evaluation.schema import METRICS, SCHEMA_VERSION

EVALUATION = "evaluation.json"
DICTIONARY = "dictionary.json"
MEASURED_ON = ("model_sha256", "store_fingerprint", "sink_multiple")
"""Keys of an evaluation's `data` that must agree for figures to be comparable."""
SETTINGS = ("n_ce_tokens", "select", "probe_documents", "probe_column", "probe_exclude")
"""Settings that must agree as well."""


EVALUATE_IT = "give --model and --text to evaluate it now, or the run directory of `sae evaluate`"


@dataclass(frozen=True)
class Entry:
    """One evaluated dictionary."""

    name: str
    path: str
    dictionary: Mapping[str, Any]
    """Architecture, widths, hooks."""
    data: Mapping[str, Any]
    """What it was measured on; empty where that was not recorded."""
    figures: Mapping[str, Mapping[str, Any]]
    """value, low, high, n by flat name."""

    def value(self, metric: str) -> float | None:
        """A figure's value; None where there is none."""
        found = self.figures.get(metric, {}).get("value")
        return None if found is None else float(found)


def read_entries(paths: Iterable[str | Path]) -> list[Entry]:
    """The dictionaries of runs and dictionary folders, under names that differ.

    Raises:
        UsageError: listing every path that is neither or was never evaluated, and what to do.
    """
    found: list[Entry] = []
    problems = []
    for path in map(Path, paths):
        try:
            found += _of_path(path)
        except UsageError as error:
            problems.append(str(error))
    if problems:
        raise UsageError("\n".join(problems))
    if not found:
        raise UsageError("there is nothing to compare: give run directories or dictionary folders")
    return _with_own_names(found)


def differences(entries: Sequence[Entry]) -> list[str]:
    """In what the entries were measured differently; empty if their figures can be compared."""
    told = []
    for key in (*MEASURED_ON, *SETTINGS):
        values = {json.dumps(_measured(entry, key), sort_keys=True) for entry in entries}
        if len(values) > 1:
            told.append(key)
    return told


def _measured(entry: Entry, key: str) -> Any:
    return entry.data.get(key) if key in MEASURED_ON else (entry.data.get("settings") or {}).get(key)


def _of_path(path: Path) -> list[Entry]:
    record = path / EVALUATION
    if record.is_file():
        return _of_record(path, _json(record))
    if (path / "config.yaml").is_file():
        raise UsageError(f"{path} is a run that was not evaluated: run `sae evaluate {path}` first")
    if (path / DICTIONARY).is_file():
        return [_of_metrics(path, _json(path / DICTIONARY))]
    if not path.is_dir():
        raise UsageError(f"{path} is no folder: give a run directory or a dictionary folder")
    raise UsageError(f"{path} has no evaluation: {EVALUATE_IT}")


def _of_record(path: Path, record: Mapping[str, Any]) -> list[Entry]:
    version = record.get("schema_version")
    if version != SCHEMA_VERSION:
        raise UsageError(
            f"{path / EVALUATION} has schema version {version!r}, this version reads {SCHEMA_VERSION}: evaluate again"
        )
    saes, data = record.get("saes"), record.get("data")
    if not isinstance(saes, dict) or not isinstance(data, dict):
        raise UsageError(f"{path / EVALUATION} is damaged: evaluate again")
    run = path.resolve().name
    is_run = (path / "config.yaml").is_file()
    return [
        Entry(
            f"{run} / {name}" if is_run else run,
            str(path),
            sae.get("dictionary") or {},
            data,
            {key: figure for key, figure in (sae.get("figures") or {}).items() if key in METRICS},
        )
        for name, sae in saes.items()
    ]


def _of_metrics(path: Path, record: Mapping[str, Any]) -> Entry:
    """A dictionary that carries its figures without intervals."""
    metrics, config = record.get("metrics") or {}, record.get("config") or {}
    figures = {
        name: {"value": value, "low": None, "high": None, "n": None}
        for name, value in metrics.items()
        if name in METRICS and isinstance(value, int | float)
    }
    if not figures:
        raise UsageError(f"{path} carries no figures: {EVALUATE_IT}")
    provenance = record.get("provenance") or {}
    identity = {key: config.get(key) for key in ("architecture", "d_in", "d_sae")}
    identity["hook_names"] = record.get("hook_names") or [provenance.get("hook_name")]
    data = {
        "model": provenance.get("model_name"),
        "model_sha256": (provenance.get("model") or {}).get("weights_sha256"),
        "store_fingerprint": provenance.get("store_fingerprint"),
        "sink_multiple": provenance.get("sink_multiple"),
    }
    return Entry(path.resolve().name, str(path), identity, data, figures)


def _with_own_names(entries: Sequence[Entry]) -> list[Entry]:
    """Entries of one name get their path as well."""
    names = [entry.name for entry in entries]
    return [
        entry
        if names.count(entry.name) == 1
        else Entry(f"{entry.name} ({entry.path})", entry.path, entry.dictionary, entry.data, entry.figures)
        for entry in entries
    ]


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UsageError(f"{file} cannot be read ({error}): write it again") from error
    if not isinstance(value, dict):
        raise UsageError(f"{file} is damaged (no JSON object): write it again")
    return value
