"""The report's figures as plain Plotly specifications (data and layout), computed from an audit's result alone.

Text from outside (labels) is HTML-escaped here, because Plotly renders a subset of HTML in hover boxes and axis labels;
quotes stay, since it shows their entities as they are.
"""

import html
import math
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from pipelines.audit.result import AuditResult, Candidate
from pipelines.audit.statistics import auroc

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e6e8eb"
DETECTS, ASSOCIATED, OTHER, NULL = "#0b7285", "#c77700", "#9aa5b1", "#eceff2"
COLOUR = {
    "not_confirmed": OTHER,
    "mentioned": OTHER,
    "associated": ASSOCIATED,
    "detects": DETECTS,
    "robust": DETECTS,
    "causal": DETECTS,
}
DRAWN = 6000  # latents drawn at most: those with the largest |z|, and every n-th of the others


def figures(result: AuditResult) -> dict[str, dict[str, Any]]:
    """All figures by the id of the element that holds them."""
    best = best_candidate(result)
    out = {"all-latents": _all_latents(result), "null": _null(result)}
    if best is not None:
        out |= {"forest": _forest(result), "roc": _roc(result, best), "strip": _strip(result, best)}
    return out


def best_candidate(result: AuditResult) -> Candidate | None:
    """The verdict's latent, or the candidate with the largest z on the discover half if nothing was confirmed."""
    if result.verdict.latent is not None:
        named = (result.verdict.dictionary, result.verdict.latent)
        return next(c for c in result.candidates if (c.dictionary, c.latent) == named)
    return max(result.candidates, key=lambda c: c.discover_z, default=None)


def short(text: str | None, limit: int = 48) -> str:
    """Cut to `limit` characters with an ellipsis; empty for None."""
    text = text or ""
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def roc_curve(
    scores: Float[np.ndarray, " n_texts"], labels: Bool[np.ndarray, " n_texts"]
) -> tuple[list[float], list[float]]:
    """False- and true-positive rates at every threshold, from (0, 0) to (1, 1); the area below is the AUROC."""
    thresholds = np.unique(scores)[::-1]
    at_least = scores[None, :] >= thresholds[:, None]
    fpr, tpr = at_least[:, ~labels].mean(axis=1), at_least[:, labels].mean(axis=1)
    return [0.0, *fpr.round(4).tolist()], [0.0, *tpr.round(4).tolist()]


def _all_latents(result: AuditResult) -> dict[str, Any]:
    """Every tested latent: how often it fires against its AUROC, over the band that shuffled labels reach."""
    found, counts = result.discover, result.counts["discover"]
    n_pos, n_neg = counts.positive, counts.hard_negative + counts.negative
    area, fires, z = np.array(found.auroc), np.array(found.fires), np.array(found.z)
    keep = np.zeros(area.size, dtype=bool)
    keep[np.argsort(-np.abs(z))[: DRAWN // 2]] = True
    keep[:: max(1, math.ceil(area.size / (DRAWN // 2)))] = True
    names_of = [str(d.get("name", "main")) for d in result.dictionaries]
    spots = [(names_of[v], latent) for v, latent in zip(found.dictionary, found.latent, strict=True)]
    place = {spot: i for i, spot in enumerate(spots)}
    candidates = [(place[c.dictionary, c.latent], c) for c in result.candidates]
    plain = keep.copy()
    plain[[i for i, _ in candidates]] = False
    # Null sd of an AUROC when a share 1 - f of the texts is tied at zero: the tie correction of its variance.
    share = np.linspace(0.0, 1.0, 101)
    sd = np.sqrt((n_pos + n_neg + 1) / (12 * n_pos * n_neg) * (1 - (1 - share) ** 3))
    band = found.z_familywise * sd
    data: list[dict[str, Any]] = [
        {
            "x": [*share.tolist(), *share[::-1].tolist()],
            "y": [*np.clip(0.5 + band, 0, 1).round(4).tolist(), *np.clip(0.5 - band, 0, 1)[::-1].round(4).tolist()],
            "fill": "toself",
            "fillcolor": NULL,
            "line": {"width": 0},
            "mode": "lines",
            "hoverinfo": "skip",
            "name": "reached by chance",
        },
        {
            "x": fires[plain].tolist(),
            "y": area[plain].tolist(),
            "text": [f"latent {found.latent[i]}" for i in np.flatnonzero(plain)],
            "mode": "markers",
            "marker": {"size": 4, "color": OTHER, "opacity": 0.45},
            "hovertemplate": "%{text}<br>AUROC %{y:.2f}<extra></extra>",
            "name": "latents",
        },
    ]
    names = {
        "not_confirmed": "candidate, not confirmed",
        "mentioned": "named so, not confirmed",
        "associated": "associated",
        "detects": "detects",
        "robust": "robust",
    }
    for claim, name in names.items():
        chosen = [(i, c) for i, c in candidates if c.claim == claim]
        if chosen:
            data.append(
                {
                    "x": [fires[i] for i, _ in chosen],
                    "y": [area[i] for i, _ in chosen],
                    "text": [f"latent {c.latent}  {html.escape(short(c.label), quote=False)}" for _, c in chosen],
                    "mode": "markers",
                    "marker": {
                        "size": 9,
                        "color": COLOUR[claim] if COLOUR[claim] != OTHER else "#ffffff",
                        "line": {"width": 1.5, "color": COLOUR[claim] if COLOUR[claim] != OTHER else INK},
                    },
                    "hovertemplate": "%{text}<br>AUROC %{y:.2f}<extra></extra>",
                    "name": name,
                }
            )
    layout = _layout("share of texts on which the latent fires", "AUROC, discover half", 400)
    layout["xaxis"] |= {"range": [-0.02, 1.02], "tickformat": ".0%"}
    layout["yaxis"] |= {"range": [0, 1.02]}
    layout["legend"] = {"orientation": "h", "y": 1.1, "x": 0}
    return {"data": data, "layout": layout}


def _forest(result: AuditResult) -> dict[str, Any]:
    """Confirm-half AUROC with its interval: the best latents, then the baselines, over the shuffled-label null."""
    best = best_candidate(result)
    top = sorted(result.candidates, key=lambda c: (c is best, c.claim != "not_confirmed", c.auroc), reverse=True)[:5]
    rows = [
        (
            f"latent {c.latent}" + (f"  <i>{html.escape(short(c.label, 30), quote=False)}</i>" if c.label else ""),
            c.auroc,
            c.low,
            c.high,
            COLOUR[c.claim],
        )
        for c in top
    ]
    rows += [(b.title, b.auroc, b.low, b.high, INK) for b in result.baselines]
    rows.reverse()
    data = [
        {
            "x": [value for _, value, _, _, _ in rows],
            "y": [name for name, _, _, _, _ in rows],
            "mode": "markers",
            "marker": {"size": 10, "color": [colour for *_, colour in rows]},
            "error_x": {
                "type": "data",
                "symmetric": False,
                "array": [high - value for _, value, _, high, _ in rows],
                "arrayminus": [value - low for _, value, low, _, _ in rows],
                "color": MUTED,
                "thickness": 1.5,
                "width": 4,
            },
            "customdata": [[low, high] for _, _, low, high, _ in rows],
            "hovertemplate": "%{y}<br>AUROC %{x:.2f} [%{customdata[0]:.2f}, %{customdata[1]:.2f}]<extra></extra>",
        }
    ]
    layout = _layout("AUROC, confirm half (95 % interval)", "", 60 + 34 * len(rows))
    layout["xaxis"] |= {"range": [0.2, 1.02]}
    layout["yaxis"] |= {"showgrid": False, "automargin": True}
    layout["showlegend"] = False
    layout["shapes"] = [
        {"type": "rect", "xref": "x", "yref": "paper", "x0": 0, "x1": result.shuffled_null.upper, "y0": 0, "y1": 1,
         "fillcolor": NULL, "line": {"width": 0}, "layer": "below"},
        {"type": "line", "xref": "x", "yref": "paper", "x0": 0.5, "x1": 0.5, "y0": 0, "y1": 1,
         "line": {"color": MUTED, "width": 1, "dash": "dot"}},
    ]  # fmt: skip
    return {"data": data, "layout": layout}


def _roc(result: AuditResult, best: Candidate) -> dict[str, Any]:
    """ROC on the confirm half: the best latent, the dense probe, words alone."""
    confirm = np.array([e.part == "confirm" for e in result.examples])
    labels = np.array([e.role == "positive" for e in result.examples])[confirm]
    curves = [(f"latent {best.latent}", np.array(best.scores)[confirm], COLOUR[best.claim], "solid", 3.0)]
    style = {"dense_logistic": (INK, "solid"), "bag_of_words": (MUTED, "dash")}
    curves += [
        (b.title, np.array([b.scores[i] for i in np.flatnonzero(confirm)], dtype=float), *style[b.name], 1.5)
        for b in result.baselines
        if b.name in style
    ]  # fmt: skip
    data: list[dict[str, Any]] = []
    for name, scores, colour, dash, width in curves:
        x, y = roc_curve(scores, labels)
        area = float(auroc(scores[:, None], labels)[0])
        data.append(
            {
                "x": x,
                "y": y,
                "mode": "lines",
                "name": f"{name} ({area:.2f})",
                "line": {"color": colour, "width": width, "dash": dash},
                "hovertemplate": "false positives %{x:.0%}, found %{y:.0%}<extra></extra>",
            }
        )
    data.append(
        {"x": [0, 1], "y": [0, 1], "mode": "lines", "hoverinfo": "skip", "showlegend": False,
         "line": {"color": GRID, "width": 1}}
    )  # fmt: skip
    layout = _layout("false-positive rate", "true-positive rate", 380)
    layout["xaxis"] |= {"range": [-0.01, 1.01], "tickformat": ".0%"}
    layout["yaxis"] |= {"range": [-0.01, 1.01], "tickformat": ".0%"}
    layout["legend"] = {
        "x": 0.98,
        "y": 0.04,
        "xanchor": "right",
        "yanchor": "bottom",
        "bgcolor": "rgba(255,255,255,0.8)",
    }
    return {"data": data, "layout": layout}


def _strip(result: AuditResult, best: Candidate) -> dict[str, Any]:
    """Activation of the best latent on every confirm text, by role, with the frozen threshold."""
    names = {"negative": "negatives", "hard_negative": "hard negatives", "positive": "positives"}
    rng = np.random.default_rng(0)
    data: list[dict[str, Any]] = []
    ticks: list[str] = []
    for role, name in names.items():
        rows = [i for i, e in enumerate(result.examples) if e.part == "confirm" and e.role == role]
        if not rows:
            continue
        level = len(ticks)
        ticks.append(name)
        data.append(
            {
                "x": [best.scores[i] for i in rows],
                "y": (level + rng.uniform(-0.28, 0.28, len(rows))).round(3).tolist(),
                "text": [
                    html.escape(short(result.examples[i].text or result.examples[i].digest, 90), quote=False)
                    for i in rows
                ],
                "mode": "markers",
                "marker": {"size": 7, "opacity": 0.65, "color": DETECTS if role == "positive" else MUTED},
                "hovertemplate": "%{text}<br>%{x:.2f}<extra></extra>",
            }
        )
    layout = _layout("largest activation over the text's tokens", "", 380)
    layout["yaxis"] |= {"tickvals": list(range(len(ticks))), "ticktext": ticks, "showgrid": False, "automargin": True}
    layout["showlegend"] = False
    layout["shapes"] = [
        {"type": "line", "xref": "x", "yref": "paper", "x0": best.threshold, "x1": best.threshold, "y0": 0, "y1": 1,
         "line": {"color": INK, "width": 1, "dash": "dot"}}
    ]  # fmt: skip
    layout["annotations"] = [
        {"x": best.threshold, "y": 1.0, "yref": "paper", "yanchor": "bottom", "text": "threshold", "showarrow": False,
         "font": {"size": 11, "color": MUTED}}
    ]  # fmt: skip
    return {"data": data, "layout": layout}


def _null(result: AuditResult) -> dict[str, Any]:
    """The same search on shuffled labels against what was found."""
    null, best = result.shuffled_null, best_candidate(result)
    edges = np.linspace(0, 1, len(null.histogram) + 1)
    layout = _layout("AUROC on the confirm half", "shuffled searches", 260)
    layout["xaxis"] |= {"range": [0.2, 1.02]}
    layout["showlegend"] = False
    layout["bargap"] = 0.05
    if best is not None:
        layout["shapes"] = [
            {"type": "line", "xref": "x", "yref": "paper", "x0": best.auroc, "x1": best.auroc, "y0": 0, "y1": 1,
             "line": {"color": COLOUR[best.claim], "width": 3}}
        ]  # fmt: skip
        layout["annotations"] = [
            {"x": best.auroc, "y": 1.0, "yref": "paper", "yanchor": "bottom", "text": f"latent {best.latent}",
             "showarrow": False, "font": {"size": 12, "color": COLOUR[best.claim]}}
        ]  # fmt: skip
    bars = {
        "type": "bar",
        "x": ((edges[1:] + edges[:-1]) / 2).round(4).tolist(),
        "y": null.histogram,
        "width": 1 / len(null.histogram),
        "marker": {"color": "#c5ccd3"},
        "hovertemplate": "AUROC %{x:.2f}: %{y}<extra></extra>",
    }
    return {"data": [bars], "layout": layout}


def _layout(x: str, y: str, height: int) -> dict[str, Any]:
    axis = {"gridcolor": GRID, "zeroline": False, "linecolor": GRID, "ticks": "", "title": {"standoff": 12}}
    return {
        "height": height,
        "margin": {"l": 56, "r": 16, "t": 28, "b": 48},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 12, "color": INK},
        "hoverlabel": {"bgcolor": "#ffffff", "font": {"color": INK}},
        "xaxis": axis | {"title": {"text": x, "standoff": 12}},
        "yaxis": axis | {"title": {"text": y, "standoff": 8}},
    }
