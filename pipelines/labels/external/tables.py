"""Labels in a table (CSV, TSV) or written by hand (YAML).

CSV has a header with `latent` (or feature, index) and `label` (or description, explanation), and may have `author`,
`date` and `note`. YAML is

    author: Ada Lovelace
    date: 2026-05-31
    labels:
      17: months of the year
      21: {label: closing quotes, note: also at the end of a list}
"""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pipelines.errors import UsageError
from pipelines.labels.external.neuronpedia import sha256_of
from pipelines.labels.external.records import ImportedLabel, Problems, date_of, label_of, latent_of, text_of
from pipelines.yamlfiles import load_yaml

_LATENT = ("latent", "feature", "feature_index", "index", "latent_index")
_LABEL = ("label", "description", "explanation")
_MAX_BYTES = 256 * 2**20


def read_table(path: Path, source: str, author: str | None, date: str | None) -> list[ImportedLabel]:
    """Labels of a CSV, TSV, YAML file.

    Args:
        author, date: for labels whose row or file gives none.

    Raises:
        UsageError: what is wrong, by file and line; a human's label without a name or date is.
    """
    if not path.is_file():
        raise UsageError(f"{path} is not a file: give a .csv, .tsv, .yaml or .yml")
    if path.stat().st_size > _MAX_BYTES:
        raise UsageError(f"{path} has more than {_MAX_BYTES:,} bytes: labels do not; is it the right file?")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UsageError(f"{path}, line {line}: the file is not UTF-8 ({error.reason}); save it as UTF-8") from error
    problems = Problems("the table")
    if path.suffix in (".yaml", ".yml"):
        rows = _yaml_rows(path, text, problems)
    elif path.suffix in (".csv", ".tsv"):
        rows = _csv_rows(path, text, problems)
    else:
        raise UsageError(f"{path}: labels are read from .csv, .tsv, .yaml and .yml")
    digest, labels, seen = sha256_of(path), list[ImportedLabel](), dict[int, int]()
    for line, row in rows:
        try:
            latent, label = latent_of(row["latent"]), label_of(row["label"])
            who, when = text_of(row.get("author")) or author, date_of(row.get("date")) or date
            if latent in seen:
                raise ValueError(f"latent {latent} stands in line {seen[latent]} already")
            if source.startswith("human") and (not who or not when):
                raise ValueError(
                    "a human's label has a name and a date: give author and date in the file, or --source human:NAME "
                    "and --date"
                )
        except ValueError as error:
            problems.add(path, line, str(error))
            continue
        seen[latent] = line
        named = f"human:{who}" if source == "human" else source
        note = text_of(row.get("note"))
        labels.append(
            ImportedLabel(latent, named, label, who, when, note, "", {}, file=path.name, line=line, sha256=digest)
        )
    problems.stop()
    if not labels:
        raise UsageError(f"{path} holds no labels")
    return labels


def _csv_rows(path: Path, text: str, problems: Problems) -> list[tuple[int, dict[str, Any]]]:
    reader = csv.reader(io.StringIO(text), delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
    rows: list[tuple[int, dict[str, Any]]] = []
    try:
        header = [name.strip().casefold() for name in next(reader, [])]
        columns = {"latent": _column(header, _LATENT), "label": _column(header, _LABEL)}
        missing = [name for name, column in columns.items() if column is None]
        if missing:
            problems.add(path, 1, f"the header has no column {' and no '.join(missing)}; it has {header}")
            return []
        columns |= {name: _column(header, (name,)) for name in ("author", "date", "note")}
        start = reader.line_num + 1
        for cells in reader:
            line, start = start, reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(header):
                problems.add(path, line, f"the header has {len(header)} columns, this row {len(cells)}; quote commas")
                continue
            rows.append((line, {name: cells[at] for name, at in columns.items() if at is not None}))
    except csv.Error as error:
        problems.add(path, reader.line_num, f"it is not CSV ({error})")
    return rows


def _column(header: list[str], names: tuple[str, ...]) -> int | None:
    return next((header.index(name) for name in names if name in header), None)


def _yaml_rows(path: Path, text: str, problems: Problems) -> list[tuple[int, dict[str, Any]]]:
    try:
        content = load_yaml(text)
        lines = _lines_of_labels(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problems.add(path, mark.line + 1 if mark else 1, f"it is not YAML ({getattr(error, 'problem', None) or error})")
        return []
    if not isinstance(content, dict) or not isinstance(content.get("labels"), dict):
        problems.add(path, 1, "give `author`, `date` and `labels`, a mapping from latents to labels")
        return []
    unknown = sorted(str(key) for key in set(content) - {"author", "date", "labels"})
    if unknown:
        problems.add(path, 1, f"unknown keys {', '.join(unknown)}; there are author, date and labels")
    common = {"author": content.get("author"), "date": content.get("date")}
    rows = []
    for latent, entry in content["labels"].items():
        line = lines.get(str(latent), 1)
        row = dict(entry) if isinstance(entry, Mapping) else {"label": entry}
        extra = sorted(str(key) for key in set(row) - {"label", "author", "date", "note"})
        if extra or "label" not in row:
            wrong = f"unknown keys {', '.join(extra)}" if extra else "there is no label"
            problems.add(path, line, f"{wrong}; an entry has label, and maybe author, date, note")
            continue
        rows.append((line, common | row | {"latent": latent}))
    return rows


def _lines_of_labels(text: str) -> dict[str, int]:
    """Line of each key below `labels`."""
    root = yaml.compose(text, yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode):
        return {}
    for key, value in root.value:
        if key.value == "labels" and isinstance(value, yaml.MappingNode):
            names = (name for name, _ in value.value if isinstance(name, yaml.ScalarNode))
            return {str(name.value): name.start_mark.line + 1 for name in names}
    return {}
