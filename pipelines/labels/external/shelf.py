"""Where imported labels stay: imports/SAE/SOURCE.jsonl in the run directory, outside of what any stage writes.

A label of a (latent, source) is never changed by importing again, unless that is asked for.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from pipelines.errors import RunError, UsageError
from pipelines.labels.external.delphi import read_delphi
from pipelines.labels.external.neuronpedia import read_neuronpedia
from pipelines.labels.external.records import MAX_PROBLEMS, ImportedLabel, check_source, date_of
from pipelines.labels.external.tables import read_table
from pipelines.rundir import now, write_text


class Shelved(NamedTuple):
    """What an import did."""

    n_new: int
    n_known: int
    """Labels that were there already, word for word."""
    n_replaced: int
    sources: tuple[str, ...]


def read_labels_of(
    path: Path, source: str, *, author: str | None = None, date: str | None = None, layer: str | None = None
) -> tuple[list[ImportedLabel], int]:
    """Labels of a file or folder, and how many entries say themselves that they are none.

    Args:
        source: neuronpedia, delphi, csv:NAME or human:NAME.
        author, date: of labels whose file names none.
        layer: the viewer's or hookpoint's name, where the files hold several.

    Raises:
        UsageError: see the readers.
    """
    kind, name = check_source(source)
    if not path.exists():
        raise UsageError(f"--import: {path} does not exist")
    if kind in ("neuronpedia", "delphi") and (author or date):
        raise UsageError(f"--author and --date belong to csv and human labels, not to {kind}, which records its own")
    try:
        date = date_of(date)
    except ValueError as error:
        raise UsageError(f"--date: {error}") from error
    if kind == "neuronpedia":
        return read_neuronpedia(path, layer), 0
    if kind == "delphi":
        return read_delphi(path, layer)
    return read_table(path, source, author or (name if kind == "human" else None), date), 0


def merged(
    there: Mapping[tuple[str, int], str | None],
    labels: Sequence[ImportedLabel],
    d_sae: int,
    *,
    replace: bool = False,
) -> tuple[list[ImportedLabel], Shelved]:
    """The labels that are to be written, and what that does. Those that are there stay.

    Args:
        there: texts by source and latent.
        replace: take the new text where it differs.

    Raises:
        UsageError: a latent that the dictionary does not have, or a text that differs.
    """
    beyond = [label for label in labels if label.latent >= d_sae]
    if beyond:
        first = beyond[0]
        raise UsageError(
            f"{first.file}, line {first.line}: latent {first.latent} does not exist, the dictionary has {d_sae} "
            f"(0 to {d_sae - 1}); {len(beyond)} labels are beyond it, and nothing was imported. Right file?"
        )
    known = [label for label in labels if there.get((label.source, label.latent)) == label.label]
    new = [label for label in labels if there.get((label.source, label.latent)) != label.label]
    differing = [label for label in new if (label.source, label.latent) in there]
    if differing and not replace:
        shown = "; ".join(
            f"{label.file}, line {label.line}: latent {label.latent} is {there[label.source, label.latent]!r}, not "
            f"{label.label!r}"
            for label in differing[:MAX_PROBLEMS]
        )
        raise UsageError(
            f"{len(differing)} labels of {differing[0].source} are there with another text, and nothing was imported: "
            f"{shown}. Use another name for the source, or --replace"
        )
    sources = tuple(sorted({label.source for label in labels}))
    return new, Shelved(len(new) - len(differing), len(known), len(differing), sources)


class Shelf:
    """The imported labels of one dictionary."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def all(self) -> list[ImportedLabel]:
        """Every label, by source and latent.

        Raises:
            RunError: a file is damaged.
        """
        labels = [label for path in sorted(self._folder.glob("*.jsonl")) for label in _read(path)]
        return sorted(labels, key=lambda label: (label.source, label.latent))

    def put(self, labels: Sequence[ImportedLabel], d_sae: int, *, replace: bool = False) -> Shelved:
        """Add labels, as `merged` says.

        Raises:
            UsageError: see `merged`; nothing is added then.
        """
        there = {(label.source, label.latent): label for label in self.all()}
        new, done = merged({key: label.label for key, label in there.items()}, labels, d_sae, replace=replace)
        there |= {(label.source, label.latent): label for label in new}
        for source in done.sources:
            self._write(source, [label for (whose, _), label in sorted(there.items()) if whose == source])
        return done

    def _write(self, source: str, labels: Sequence[ImportedLabel]) -> None:
        lines = [json.dumps({**label._asdict(), "shelved": now()}, ensure_ascii=False) for label in labels]
        write_text(self._folder / f"{slug(source)}.jsonl", "\n".join(lines) + "\n")


def slug(source: str) -> str:
    """A file name for a source: readable, and different for different sources."""
    plain = re.sub(r"[^A-Za-z0-9]+", "-", source).strip("-")[:60]
    return f"{plain}-{hashlib.sha256(source.encode()).hexdigest()[:8]}"


def _read(path: Path) -> list[ImportedLabel]:
    labels = []
    for number, line in enumerate(path.read_text(encoding="utf-8").rstrip("\n").split("\n"), 1):
        try:
            record = json.loads(line)
            labels.append(ImportedLabel(*(record[name] for name in ImportedLabel._fields)))
        except (ValueError, LookupError, TypeError) as error:
            raise RunError(
                f"{path}, line {number} is damaged ({error}): import the file again after removing it"
            ) from error
    return labels
