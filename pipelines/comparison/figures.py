"""The comparison's figures as plain Plotly specifications, and which dictionaries lie on the Pareto fronts.

Names come from outside and are HTML-escaped here, because Plotly renders a subset of HTML in labels and hover boxes.
"""

import html
import math
from collections.abc import Sequence
from typing import Any

from pipelines.comparison.entries import Entry
from pipelines.evaluation.schema import KS, METRICS

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e6e8eb"
COLOURS = ("#0b7285", "#c77700", "#6741d9", "#2b8a3e", "#c2255c", "#1864ab", "#5c940d", "#862e9c")
MOST_LABELS = 12
"""Dictionaries beyond which points carry their names in the hover box only."""
BASELINES = {"neurons": "neurons", "pca": "principal components", "random": "random directions"}


def pareto(entries: Sequence[Entry], metric: str) -> list[str]:
    """The dictionaries that no other beats in both L0 (lower) and the metric, by rising L0.

    One that is equal in one and better in the other beats.
    """
    better = -1 if METRICS[metric].better == "lower" else 1
    points = [
        (x, better * y, entry.name)
        for entry in entries
        if (x := entry.value("l0")) is not None and (y := entry.value(metric)) is not None
    ]
    front = [
        (x, name) for x, y, name in points if not any(a <= x and b >= y and (a < x or b > y) for a, b, _ in points)
    ]
    return [name for _, name in sorted(front)]


def figures(entries: Sequence[Entry]) -> dict[str, dict[str, Any]]:
    """All figures by the id of the element that holds them; one that would be empty is left out."""
    out = {}
    for element, metric, title in (
        ("fvu", "fvu", "FVU (lower is better)"),
        ("ce", "ce_loss_score", "CE score (higher is better)"),
    ):
        if any(entry.value(metric) is not None and entry.value("l0") is not None for entry in entries):
            out[element] = _trade_off(entries, metric, title)
    if any(entry.value(f"probe_latents_auroc_k{KS[0]}") is not None for entry in entries):
        out["probes"] = _probes(entries)
    return out


def colours(entries: Sequence[Entry]) -> list[str]:
    """A colour for each entry: one a dictionary while there are enough, else one an architecture."""
    if len(entries) <= len(COLOURS):
        return list(COLOURS[: len(entries)])
    kinds = list(dict.fromkeys(str(entry.dictionary.get("architecture")) for entry in entries))
    return [COLOURS[kinds.index(str(entry.dictionary.get("architecture"))) % len(COLOURS)] for entry in entries]


def _trade_off(entries: Sequence[Entry], metric: str, title: str) -> dict[str, Any]:
    """L0 against a metric with both intervals, over the Pareto front."""
    front = pareto(entries, metric)
    by_name = {entry.name: entry for entry in entries}
    data: list[dict[str, Any]] = [
        {
            "x": [by_name[name].value("l0") for name in front],
            "y": [by_name[name].value(metric) for name in front],
            "mode": "lines",
            "line": {"color": "#ced4da", "width": 6},
            "hoverinfo": "skip",
            "name": "Pareto front",
        }
    ]
    shown = [(e, c) for e, c in zip(entries, colours(entries), strict=True) if e.value("l0") and e.value(metric)]
    for entry, colour in shown:
        name = html.escape(entry.name, quote=False)
        kind = html.escape(str(entry.dictionary.get("architecture")), quote=False)
        data.append(
            {
                "x": [entry.value("l0")],
                "y": [entry.value(metric)],
                "error_x": _bars(entry, "l0", colour),
                "error_y": _bars(entry, metric, colour),
                "mode": "markers+text" if len(entries) <= MOST_LABELS else "markers",
                "text": [name],
                "textposition": "top center",
                "cliponaxis": False,
                "marker": {"color": colour, "size": 11, "symbol": "circle" if entry.name in front else "circle-open"},
                "hovertemplate": f"<b>{name}</b><br>{kind}<br>L0 %{{x:.1f}}<br>%{{y:.4f}}<extra></extra>",
                "name": name,
            }
        )
    layout = _layout("L0: active latents per token", title)
    # Room for the names, which plotly does not count.
    left, right = (math.log10(f(e.value("l0") or 1 for e, _ in shown)) for f in (min, max))
    room = 0.1 + 0.12 * (right - left)
    layout["xaxis"] |= {"type": "log", "range": [left - room, right + 1.8 * room]}
    layout["xaxis"]["tickvals"] = [m * 10**e for e in range(-1, 6) for m in (1, 2, 5)]
    layout["margin"] |= {"t": 34}
    return {"data": data, "layout": layout}


def _bars(entry: Entry, metric: str, colour: str) -> dict[str, Any]:
    figure = entry.figures[metric]
    value, low, high = (figure.get(key) for key in ("value", "low", "high"))
    if value is None or low is None or high is None:
        return {"visible": False}
    return {
        "type": "data",
        "symmetric": False,
        "array": [high - value],
        "arrayminus": [value - low],
        "color": colour,
        "thickness": 1.4,
        "width": 4,
    }


def _probes(entries: Sequence[Entry]) -> dict[str, Any]:
    """AUROC of sparse probes by their number of latents, and of what needs no dictionary."""
    data = []
    for entry, colour in zip(entries, colours(entries), strict=True):
        values = [entry.value(f"probe_latents_auroc_k{k}") for k in KS]
        if any(value is not None for value in values):
            name = html.escape(entry.name, quote=False)
            data.append(
                {
                    "x": list(KS),
                    "y": values,
                    "mode": "lines+markers",
                    "name": name,
                    "line": {"color": colour, "width": 2.4},
                    "hovertemplate": f"<b>{name}</b><br>%{{x}} latents: %{{y:.3f}}<extra></extra>",
                }
            )
    first = next(entry for entry in entries if entry.value(f"probe_latents_auroc_k{KS[0]}") is not None)
    for (name, title), dash in zip(BASELINES.items(), ("dot", "dash", "dashdot"), strict=True):
        data.append(
            {
                "x": list(KS),
                "y": [first.value(f"probe_{name}_auroc_k{k}") for k in KS],
                "mode": "lines",
                "name": title,
                "line": {"color": MUTED, "width": 1.6, "dash": dash},
                "hovertemplate": f"{title}<br>%{{x}}: %{{y:.3f}}<extra></extra>",
            }
        )
    dense = first.value("probe_dense_auroc")
    if dense is not None:
        data.append(
            {
                "x": [KS[0], KS[-1]],
                "y": [dense, dense],
                "mode": "lines",
                "name": "dense probe",
                "line": {"color": INK, "width": 1.6},
                "hovertemplate": f"dense probe: {dense:.3f}<extra></extra>",
            }
        )
    layout = _layout("latents of the probe", "AUROC on held-out documents")
    layout["xaxis"] |= {"type": "log", "tickvals": list(KS), "ticktext": [str(k) for k in KS]}
    layout["showlegend"] = True
    layout["legend"] = {"orientation": "h", "y": -0.22}
    return {"data": data, "layout": layout}


def _layout(x: str, y: str) -> dict[str, Any]:
    axis = {"gridcolor": GRID, "zeroline": False, "linecolor": GRID, "ticks": "outside", "tickcolor": GRID}
    return {
        "height": 400,
        "margin": {"l": 64, "r": 24, "t": 16, "b": 52},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": INK},
        "showlegend": False,
        "hoverlabel": {"align": "left"},
        "xaxis": {**axis, "title": {"text": x}},
        "yaxis": {**axis, "title": {"text": y}},
    }
