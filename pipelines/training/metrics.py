"""Figures of a training run as JSON lines: one a step, read again by progress bars and by a resumed run."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.rundir import now, write_text

METRICS_FILE = "metrics.jsonl"


class MetricsFile:
    """Appends lines; those past the step that a resume starts from are dropped."""

    def __init__(self, path: Path, step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line)
                except ValueError:
                    continue  # the line that a killed process was writing
        write_text(path, "".join(f"{line}\n" for line in kept))
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, figures: Mapping[str, Any]) -> None:
        """Append one line."""
        self._file.write(json.dumps({**figures, "time": now()}) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def last_line(path: Path) -> dict[str, Any]:
    """The newest whole line of a JSON-lines file; empty when there is none."""
    if not path.exists():
        return {}
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = file.read().split(b"\n")[:-1]
    for line in reversed(lines):
        try:
            return dict(json.loads(line))
        except ValueError:
            continue
    return {}
