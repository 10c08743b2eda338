"""From a judge's answers to the columns of labels.parquet, for the labels of one source.

A label *passes* if, against same-token and same-document negatives, it detects better than chance (the larger p-value,
Benjamini and Hochberg 1995 at 5 % over the latents of the source) and its balanced accuracy has a lower bound above
`min_detection`, and if it fits none of the random other latents as well as its own. A kind of negative of which a
latent has none (a token on which it always fires) is not asked for; with neither kind a label cannot pass.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.labels.rows import KINDS
from pipelines.labels.trials import Others, Trials
from pipelines.labels.verdicts import decisive_p, score_verdicts, surviving


class Verdicts(NamedTuple):
    """Answers in the name of one source's labels: 1, 0 (or a score; at least 0.5 is yes), NaN for none.

    `detect` and `fuzz` have an entry per question of these latents, in the order of the exams.
    """

    latents: NDArray[np.int64]
    """Ascending."""
    detect: NDArray[np.float32]
    fuzz: NDArray[np.float32]
    mismatch: dict[int, NDArray[np.float32]]
    """Of each latent an entry per window of others."""


def score_columns(
    trials: Trials, verdicts: Verdicts, density: NDArray[np.float64], *, min_detection: float
) -> dict[int, dict[str, Any]]:
    """Columns of labels.parquet for each latent.

    Args:
        density: of every latent of the dictionary: share of held-out tokens on which it fires.
    """
    latents = verdicts.latents
    detect = trials.detect.where(np.isin(trials.detect.latent, latents))
    fuzz = trials.fuzz.where(np.isin(trials.fuzz.latent, latents))
    scores = score_verdicts(detect, verdicts.detect, latents, density[latents])
    fuzzed = score_verdicts(fuzz, verdicts.fuzz, latents, density[latents])
    n_negative = np.bincount(np.searchsorted(latents, detect.latent[detect.kind > 0]), minlength=len(latents))
    n_fuzz = np.bincount(np.searchsorted(latents, fuzz.latent), minlength=len(latents))
    p = decisive_p(scores)
    ranks = [
        _ranks(trials.others[i], verdicts.mismatch[i], own)
        for i, own in zip(latents.tolist(), np.nan_to_num(scores.tpr.rate).tolist(), strict=True)
    ]
    passed = surviving(scores, p, np.array([r["mismatch_rank"] or 1 for r in ranks]), min_detection)
    found = {}
    for i, latent in enumerate(latents.tolist()):
        columns: dict[str, Any] = {"passed": bool(passed[i]), "p_value": _value(p[i])}
        for name, rate in (("tpr", scores.tpr), ("precision", scores.precision)):
            columns |= _with_bounds(name, rate.rate[i], rate.low[i], rate.high[i])
        for kind in KINDS:
            by = scores.by_kind[kind]
            columns |= _with_bounds(f"detection_{kind}", by.balanced_accuracy[i], by.low[i], by.high[i])
        by = fuzzed.by_kind["same_window"]
        columns |= _with_bounds("fuzz", by.balanced_accuracy[i], by.low[i], by.high[i])
        columns |= {
            "tpr_by_decile": [_value(share) for share in scores.tpr_by_decile[i]],
            "n_positive": int(scores.n_positive[i]),
            "n_negative": int(n_negative[i]),
            "n_failed": int(scores.n_failed[i]),
            "n_fuzz": int(n_fuzz[i]),
            "n_fuzz_failed": int(fuzzed.n_failed[i]),
        }
        found[latent] = columns | ranks[i]
    return found


def _ranks(others: Others, verdict: NDArray[np.float32], own: float) -> dict[str, int | None]:
    """Where the true latent stands among others, by the share of their windows in which the label holds.

    A tie counts against the label, and so does a window without an answer.
    """
    yes = np.isnan(verdict) | (verdict >= 0.5)
    found: dict[str, int | None] = {"n_mismatch_failed": int(np.isnan(verdict).sum())}
    for rank, count, chosen in (
        ("mismatch_rank", "n_mismatch", ~others.neighbour),
        ("neighbour_rank", "n_neighbour", others.neighbour),
    ):
        which, index = np.unique(others.which[chosen], return_inverse=True)
        shares = np.bincount(index, weights=yes[chosen], minlength=len(which)) / np.maximum(np.bincount(index), 1)
        found[count] = len(which)
        found[rank] = 1 + int((shares >= own).sum()) if len(which) else None
    return found


def _with_bounds(name: str, value: float, low: float, high: float) -> dict[str, float | None]:
    return {name: _value(value), f"{name}_low": _value(low), f"{name}_high": _value(high)}


def _value(x: float) -> float | None:
    return None if np.isnan(x) else float(x)
