"""Which columns of features.parquet the pages know by name, and what they find out about the others.

Every column is shown on a latent's page. Those named here have a place and a title of their own; a group of columns
`NAME_low`, `NAME_high` and a value is a test with an interval, whoever wrote it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

_VALUES = ("", "_balanced_accuracy", "_auroc", "_score", "_accuracy", "_precision", "_estimate", "_mean")
"""What the value of a test may be called after its name; the first that exists counts."""

_TITLES = {
    "detection": "Held-out detection",
    "detection_same_token": "Against the same token elsewhere",
    "detection_same_document": "Against the same document",
    "detection_random": "Against random tokens",
    "detection_neighbour": "Against tokens of the nearest latents",
    "fuzz": "Fuzzing: right against wrong tokens",
    "mismatch": "Mismatch: this label among other latents",
    "counterfactual": "Counterfactual edits",
    "output": "Output: promised tokens rise",
    "stability": "Stability over resampled documents",
}
_HELP = {
    "detection": "Balanced accuracy on documents that had no part in making the label. 0.5 is chance.",
    "detection_same_token": "Balanced accuracy where the same token stands without the latent firing. 0.5 is chance.",
    "detection_same_document": "Balanced accuracy against tokens of the same documents. 0.5 is chance.",
}

FIGURES: Sequence[tuple[str, str, str]] = (
    ("label_share_surviving", "share", "of live latents carry a label that survives every test"),
    ("label_share_labelled", "share", "of live latents are labelled"),
    ("label_null_share", "share", "would be, with rules dealt at random"),
    ("l0", "number", "active latents a token"),
    ("fvu", "number", "of the variance is unexplained"),
    ("ce_loss_score", "number", "of the loss recovered"),
)
"""Metrics of the dictionary shown above the table: name, format, words."""


def measures_of(columns: Sequence[str]) -> list[dict[str, str | None]]:
    """The tests that the columns hold: names of the columns of value, bounds and null, in the order of the table."""
    names = set(columns)
    found = []
    for low in columns:
        name = low.removesuffix("_low")
        if name == low or f"{name}_high" not in names:
            continue
        value = next((name + suffix for suffix in _VALUES if name + suffix in names), None)
        if value is not None:
            found.append(
                {
                    "title": _TITLES.get(name) or name.replace("_", " ").capitalize(),
                    "help": _HELP.get(name, ""),
                    "value": value,
                    "low": low,
                    "high": f"{name}_high",
                    "null": f"{name}_null" if f"{name}_null" in names else None,
                }
            )
    return found


def status_of(row: Mapping[str, Any]) -> str:
    """survives, labelled, unlabelled or silent; the first two are also true of a latent that is both."""
    if row.get("survives"):
        return "survives"
    if row.get("labelled") or (row.get("labelled") is None and row.get("label")):
        return "labelled"
    silent = row.get("label_kind") == "silent" or row.get("density") == 0
    return "silent" if silent else "unlabelled"


def figures_of(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The known metrics that are numbers."""
    return [
        {"value": metrics[name], "format": form, "words": words}
        for name, form, words in FIGURES
        if isinstance(metrics.get(name), int | float)
    ]
