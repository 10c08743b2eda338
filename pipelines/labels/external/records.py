"""An imported label, and the complaint about a file that holds something else."""

import datetime
import re
from pathlib import Path
from typing import Any, NamedTuple

from pipelines.errors import UsageError
from pipelines.labels.llm.questions import MAX_LABEL, clean_label

_SOURCE = re.compile(r"(neuronpedia|delphi|csv|human)(:[^\x00-\x1f:]{1,120})?")
MAX_PROBLEMS = 10


class ImportedLabel(NamedTuple):
    """Somebody's label of one latent."""

    latent: int
    source: str
    """neuronpedia, neuronpedia:METHOD, delphi, csv:NAME or human:NAME."""
    label: str
    author: str | None
    date: str | None
    """ISO 8601."""
    note: str | None
    method: str
    """How it was made, as far as the file says."""
    claimed: dict[str, float]
    """Scores that came along, by name; ours stand beside them."""
    file: str
    line: int
    sha256: str
    """Of the file."""


class Problems:
    """Complaints about a file, raised together."""

    def __init__(self, what: str) -> None:
        self._what, self._found = what, list[str]()

    def add(self, file: Path, line: int, text: str) -> None:
        """One complaint; `line` counts from 1."""
        self._found.append(f"{file}, line {line}: {text}")

    def stop(self) -> None:
        """Raises: UsageError if there were any."""
        if self._found:
            shown = "; ".join(self._found[:MAX_PROBLEMS])
            more = len(self._found) - MAX_PROBLEMS
            raise UsageError(
                f"{self._what} cannot be imported, and nothing of it was: {shown}"
                + (f"; and {more} more" if more > 0 else "")
            )


def latent_of(value: Any) -> int:
    """A latent's number. Raises: ValueError."""
    if type(value) not in (int, str) or not re.fullmatch(r"\d{1,9}", str(value).strip()):
        raise ValueError(f"a latent is a whole number from 0, got {str(value)[:40]!r}")
    return int(value)


def label_of(value: Any) -> str:
    """A label's text on one line. Raises: ValueError."""
    if not isinstance(value, str):
        raise ValueError(f"a label is text, not {type(value).__name__}")
    if len(value) > 4 * MAX_LABEL:
        raise ValueError(f"a label has at most {MAX_LABEL} characters, got {len(value)}")
    label = clean_label(value)
    if label is None:
        raise ValueError("the label is empty, or not valid text")
    if len(label) > MAX_LABEL or len(value.strip()) > MAX_LABEL:
        raise ValueError(f"a label has at most {MAX_LABEL} characters, got {len(value.strip())}")
    return label


def date_of(value: Any) -> str | None:
    """A date in ISO 8601, as it was given. Raises: ValueError."""
    if value is None or value == "":
        return None
    if not isinstance(value, str | datetime.date):
        raise ValueError(f"a date looks like 2026-05-31, not {type(value).__name__}")
    text = value.isoformat() if isinstance(value, datetime.date) else value.strip()
    try:
        datetime.datetime.fromisoformat(text)
    except ValueError as error:
        raise ValueError(f"a date looks like 2026-05-31, got {text[:40]!r}") from error
    return text


def text_of(value: Any) -> str | None:
    """Short free text such as an author's name, on one line. Raises: ValueError."""
    if value is None or isinstance(value, str):
        return clean_label(value or "")
    raise ValueError(f"author and note are text, not {type(value).__name__}")


def check_source(source: str) -> tuple[str, str | None]:
    """Kind and name of a source.

    Raises:
        UsageError: it is none of neuronpedia, delphi, csv:NAME, human:NAME.
    """
    if not _SOURCE.fullmatch(source):
        raise UsageError(f"--source is neuronpedia, delphi, csv:NAME or human:NAME, got {source!r}")
    kind, _, name = source.partition(":")
    if kind == "csv" and not name:
        raise UsageError("--source csv needs a name that tells it from other files: csv:NAME")
    return kind, name.strip() or None
