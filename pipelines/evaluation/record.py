"""What an evaluation found: figures with intervals, details, and what was left out and why; evaluation.json."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipelines.evaluation.schema import METRICS, SCHEMA_VERSION, as_json


@dataclass(frozen=True)
class Figure:
    """One value, its 95 % interval where there is one, and how many things it is over."""

    value: float | None
    """None: not defined, such as a score where ablation does no harm."""
    low: float | None = None
    high: float | None = None
    n: int = 0

    @classmethod
    def of(cls, value: float, interval: tuple[float, float] | None, n: int) -> "Figure":
        """From numbers of which some may be NaN."""
        low, high = interval or (None, None)
        return cls(value if math.isfinite(value) else None, low, high, n)

    def scaled(self, factor: float) -> "Figure":
        """The same in other units."""
        value, low, high = (None if v is None else v * factor for v in (self.value, self.low, self.high))
        return Figure(value, low, high, self.n)


@dataclass
class Evaluation:
    """What was found of one dictionary."""

    dictionary: dict[str, Any]
    """What identifies it: architecture, widths, hooks."""
    figures: dict[str, Figure] = field(default_factory=dict)
    """By flat name; `schema.METRICS` says what each is."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Counts and histograms beside them, by flat name."""
    details: dict[str, Any] = field(default_factory=dict)
    """What stands behind means: topics, concepts, latents."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Parts that were not computed, and why."""

    def flat(self) -> dict[str, Any]:
        """As metrics.json holds it."""
        return {name: figure.value for name, figure in self.figures.items()} | self.facts

    def to_json(self) -> dict[str, Any]:
        """As evaluation.json holds it."""
        return {
            "dictionary": self.dictionary,
            "figures": {
                name: {"value": f.value, "low": f.low, "high": f.high, "n": f.n} for name, f in self.figures.items()
            },
            "facts": self.facts,
            "details": self.details,
            "left_out": self.left_out,
        }


def evaluation_record(data: Mapping[str, Any], found: Mapping[str, Evaluation]) -> dict[str, Any]:
    """The JSON object of a run's evaluation.

    Args:
        data: what the figures were measured on: figures of equal `data` can be compared.
    """
    used = {name for evaluation in found.values() for name in evaluation.figures}
    assert used <= METRICS.keys(), used - METRICS.keys()
    return {
        "schema_version": SCHEMA_VERSION,
        "level": 0.95,
        "data": dict(data),
        "metrics_schema": as_json(),
        "saes": {name: evaluation.to_json() for name, evaluation in found.items()},
    }
