"""A concept as JSON lines, one example a line, turned into the keys of a concept file."""

import json
from typing import Any

_LISTS = {
    "positive": "positives",
    "true": "positives",
    "1": "positives",
    "hard_negative": "hard_negatives",
    "negative": "negatives",
    "false": "negatives",
    "0": "negatives",
}


def from_json_lines(text: str, name: str) -> dict[str, Any]:
    """The keys of a concept file: a first line `{"concept": {…}}` gives its own, `name` is the default of the name.

    Raises:
        ValueError: a line is no object, or has a label that is none.
    """
    raw: dict[str, Any] = {"name": name}
    lists: dict[str, list[Any]] = {}
    ood: dict[str, list[Any]] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        record = json.loads(line)
        if not isinstance(record, dict):
            raise ValueError(f"line {number} must be an object, not {type(record).__name__}")
        if set(record) == {"concept"} and not lists and not ood:
            raw |= record["concept"]
            continue
        label = str(record.pop("label", None)).casefold()
        if label not in _LISTS:
            raise ValueError(f"line {number} has the label {label!r}; use positive, hard_negative or negative")
        if record.pop("ood", False):
            key = "positives" if _LISTS[label] == "positives" else "negatives"
            ood.setdefault(key, []).append(record)
        else:
            lists.setdefault(_LISTS[label], []).append(record)
    return raw | lists | ({"ood": ood} if ood else {})
