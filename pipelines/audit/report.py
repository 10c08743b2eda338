"""One audit as one HTML file: no network, no external file, everything from outside escaped."""

import json
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from pipelines.audit.figures import best_candidate, figures, short
from pipelines.audit.result import AuditResult, Candidate, ExampleRecord

SHOWN = 5  # examples per list
BADGE = {
    "causal": "Causal",
    "robust": "Robust",
    "detects": "Detects",
    "associated": "Associated",
    "nothing_found": "Nothing found",
}
CLAIM = {
    "causal": "causal",
    "robust": "robust",
    "detects": "detects",
    "associated": "associated",
    "mentioned": "mentioned",
    "not_confirmed": "not confirmed",
}


def render_report(result: AuditResult) -> str:
    """The page for one audit, from its result alone (so an audit.json can be rendered again)."""
    from plotly.offline import get_plotlyjs

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"share": share, "p": p_value, "short": short}
    source = resources.files("pipelines.audit").joinpath("report.html.j2").read_text(encoding="utf-8")
    best = best_candidate(result)
    return environment.from_string(source).render(
        r=result,
        v=result.verdict,
        best=best,
        best_examples=_examples(result, best) if best else [],
        dense=max((b for b in result.baselines if b.name.startswith("dense")), key=lambda b: b.auroc, default=None),
        words=next(b for b in result.baselines if b.name == "bag_of_words"),
        badge=BADGE[result.verdict.level],
        claim=CLAIM,
        figures=script_json(figures(result)),
        plotly=Markup(get_plotlyjs()),
    )


def script_json(value: Any) -> Markup:
    """JSON that cannot end the script element it stands in: <, > and & are written as \\u escapes."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def share(value: float | None) -> str:
    """A share as a percentage: 0.875 -> '88 %'; below one per cent with two digits."""
    if value is None:
        return "–"
    return f"{value:.0%}".replace("%", " %") if value >= 0.0995 or value == 0 else f"{value * 100:.2g} %"


def p_value(value: float) -> str:
    """A p-value in three digits, or as a bound."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _examples(result: AuditResult, best: Candidate) -> list[dict[str, Any]]:
    """Confirm texts that tell most about the best latent: found, missed, wrongly flagged."""
    scored = [(best.scores[i], e) for i, e in enumerate(result.examples) if e.part == "confirm"]
    top = max((s for s, _ in scored), default=0.0) or 1.0
    found = sorted((x for x in scored if x[1].role == "positive" and x[0] > best.threshold), key=lambda x: -x[0])
    missed = sorted((x for x in scored if x[1].role == "positive" and x[0] <= best.threshold), key=lambda x: x[0])
    flagged = sorted((x for x in scored if x[1].role != "positive" and x[0] > best.threshold), key=lambda x: -x[0])

    def rows(some: list[tuple[float, ExampleRecord]]) -> list[dict[str, Any]]:
        return [{"score": s, "width": round(100 * s / top), "example": e} for s, e in some[:SHOWN]]

    return [
        {"title": "Positives that it sees", "n": len(found), "rows": rows(found)},
        {"title": "Positives that it misses", "n": len(missed), "rows": rows(missed)},
        {"title": "Negatives that it flags", "n": len(flagged), "rows": rows(flagged)},
    ]
