"""Write a comparison: comparison.json for programs, comparison.html for people, without network or other files."""

from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from pipelines.audit.report import script_json
from pipelines.comparison.entries import Entry, differences, read_entries
from pipelines.comparison.figures import colours, figures, pareto
from pipelines.evaluation.schema import METRICS, SCHEMA_VERSION, as_json
from pipelines.rundir import write_json, write_text

HEADLINES = (
    "l0",
    "fvu",
    "ce_loss_score",
    "kl_div_score",
    "ce_loss_score_mean",
    "dead_share",
    "max_decoder_cosine",
    "probe_latents_auroc_k1",
    "probe_latents_auroc_k16",
    "absorption_fraction",
    "output_score",
)
"""Columns of the first table, where any dictionary has them."""
ARROWS = {"higher": "↑", "lower": "↓", "none": ""}


def compare(paths: Iterable[str | Path], out: str | Path) -> dict[str, Any]:
    """Compare runs and dictionary folders; writes comparison.json and comparison.html into `out`, each whole or not.

    Returns: what comparison.json holds.
    Raises:
        UsageError: see `read_entries`.
    """
    entries = read_entries(paths)
    record = comparison_record(entries)
    write_text(Path(out) / "comparison.html", comparison_page(entries))
    write_json(Path(out) / "comparison.json", record)
    return record


def comparison_record(entries: Sequence[Entry]) -> dict[str, Any]:
    """The comparison as a JSON object."""
    return {
        "schema_version": SCHEMA_VERSION,
        "metrics_schema": as_json(),
        "differences": differences(entries),
        "pareto": {metric: pareto(entries, metric) for metric in ("fvu", "ce_loss_score")},
        "dictionaries": [
            {
                "name": entry.name,
                "path": entry.path,
                "dictionary": dict(entry.dictionary),
                "data": dict(entry.data),
                "figures": {name: dict(figure) for name, figure in entry.figures.items()},
            }
            for entry in entries
        ],
    }


def comparison_page(entries: Sequence[Entry]) -> str:
    """The comparison as one HTML page."""
    from plotly.offline import get_plotlyjs

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = number
    source = resources.files("pipelines.comparison").joinpath("comparison.html.j2").read_text(encoding="utf-8")
    present = [name for name in METRICS if any(entry.value(name) is not None for entry in entries)]
    drawn = figures(entries)
    return environment.from_string(source).render(
        entries=entries,
        colours=colours(entries),
        headlines=[name for name in HEADLINES if name in present],
        present=present,
        metrics=METRICS,
        arrows=ARROWS,
        best={name: best(entries, name) for name in present},
        differences=differences(entries),
        models=sorted({str(entry.data.get("model")) for entry in entries if entry.data.get("model")}),
        hooks=sorted({str(hook) for entry in entries for hook in entry.dictionary.get("hook_names") or ()}),
        drawn=drawn,
        figures=script_json(drawn),
        plotly=Markup(get_plotlyjs()),
    )


def best(entries: Sequence[Entry], metric: str) -> list[str]:
    """The dictionaries with the best value, and those whose interval overlaps its; none where there is no better.

    Overlapping intervals of one data set are no test of a difference; they say which differences are surely small.
    """
    direction = METRICS[metric].better
    known = [(value, entry) for entry in entries if (value := entry.value(metric)) is not None]
    if direction == "none" or len(known) < 2:
        return []
    sign = 1 if direction == "higher" else -1
    top = max(known, key=lambda pair: sign * pair[0])[1].figures[metric]

    def end(figure: Any, better: bool) -> float:
        key = "high" if (direction == "higher") == better else "low"
        found = figure.get(key)
        return float(figure["value"] if found is None else found)

    limit = end(top, better=False)
    return [entry.name for _, entry in known if sign * end(entry.figures[metric], better=True) >= sign * limit]


def number(value: float | None) -> str:
    """Four significant digits, thousands grouped; a dash for None."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
