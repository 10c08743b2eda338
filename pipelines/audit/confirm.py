"""Candidates on texts that had no part in choosing them: Holm, intervals, frozen thresholds, rates and precision."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats

from pipelines.audit.concepts import Concept
from pipelines.audit.discover import Choice, Search, mentioned
from pipelines.audit.intervals import auroc_interval, bounds_in_order, difference_of
from pipelines.audit.numbers import as_scores, figure
from pipelines.audit.result import BaseRate, Candidate, Difference, Held
from pipelines.audit.statistics import holm, permutation_p
from pipelines.audit.views import Texts, View, joint_scores

BASE_RATES = (1e-2, 1e-3, 1e-4)


def youden_threshold(scores: Float[np.ndarray, " n_texts"], labels: Bool[np.ndarray, " n_texts"]) -> float:
    """The t >= 0 whose rule `score > t` has the largest TPR - FPR (Youden 1950); the smallest of several."""
    values = np.unique(np.append(scores, 0.0))
    above = scores[None, :] > values[:, None]
    gain = above[:, labels].mean(axis=1) - above[:, ~labels].mean(axis=1)
    return float(values[int(gain.argmax())])


def thresholds_of(choices: Sequence[Choice], views: Sequence[View], texts: Texts) -> Float[np.ndarray, " n_candidates"]:
    """A threshold for each candidate, from the tune part alone."""
    scores, tune = joint_scores(views), texts.split.tune
    return np.array([youden_threshold(scores[tune, c.column], texts.positive[tune]) for c in choices])


class Bounds(NamedTuple):
    """Candidates on some rows; bounds at the level of each in their order."""

    auroc: Float[np.ndarray, " n_candidates"]
    low: Float[np.ndarray, " n_candidates"]
    high: Float[np.ndarray, " n_candidates"]
    low_tested: Float[np.ndarray, " n_candidates"]


def confirm(
    choices: Sequence[Choice],
    thresholds: Float[np.ndarray, " n_candidates"],
    found: Search,
    views: Sequence[View],
    texts: Texts,
    concept: Concept,
    *,
    n_permutations: int,
    alpha: float,
    detects_above: float,
    seed: int,
) -> list[Candidate]:
    """Judge the candidates on the confirm part and the out-of-distribution set; claims are decided later."""
    if not choices:
        return []
    c, columns = texts.split.confirm, [choice.column for choice in choices]
    scores = joint_scores(views)[:, columns]
    p = permutation_p(scores[c], texts.positive[c], texts.groups[c], n_permutations=n_permutations, seed=seed)
    adjusted = holm(p)
    _, levels = bounds_in_order(scores[c], texts.positive[c], texts.groups[c], alpha=alpha, above=detects_above)
    main = _bounds(scores, texts, c, levels)
    hard, ood = (
        _bounds(scores, texts, rows, levels) if rows.size else None for rows in (texts.against_hard, texts.ood)
    )
    candidates = []
    for k, choice in enumerate(choices):
        view, latent = views[choice.spot.view], choice.spot.latent
        above = scores[:, k] > thresholds[k]
        tpr, fpr = rates(above, texts, c)
        corpus = None if view.corpus is None else view.corpus[:, latent]
        n_above = 0 if corpus is None else int((corpus > thresholds[k]).sum())
        rate = None if corpus is None or not corpus.size else n_above / corpus.size
        high = None if corpus is None or rate is None else upper_rate(n_above, corpus.size)
        drop = None
        if ood is not None:
            inside, outside = ((float(b.auroc[k]), float(b.low[k]), float(b.high[k])) for b in (main, ood))
            drop = difference_of(inside, outside)
        label = view.labels.get(latent)
        candidates.append(
            Candidate(
                dictionary=view.name,
                latent=latent,
                label=label,
                chosen_by=choice.chosen_by,
                discover_auroc=figure(found.found.auroc[choice.column]),
                discover_z=figure(found.found.z[choice.column]),
                discover_p_familywise=figure(found.found.p_familywise[choice.column]),
                discover_q=figure(found.q[choice.column]),
                auroc=figure(main.auroc[k]),
                low=figure(main.low[k]),
                high=figure(main.high[k]),
                level=figure(levels[k]),
                low_familywise=figure(main.low_tested[k]),
                hard_negatives=None if hard is None else _held(hard, k, *rates(above, texts, texts.against_hard)),
                ood=None if ood is None else _held(ood, k, *rates(above, texts, texts.ood)),
                ood_drop=None if drop is None else Difference(**{n: figure(v) for n, v in drop._asdict().items()}),
                p=figure(p[k]),
                p_holm=figure(adjusted[k]),
                threshold=as_scores(thresholds[[k]])[0],
                true_positive_rate=figure(tpr),
                false_positive_rate=figure(fpr),
                corpus_rate=None if rate is None else figure(rate),
                corpus_rate_high=None if high is None else figure(high),
                precision=None
                if rate is None or high is None
                else [
                    BaseRate(base_rate=base, precision=precision(base, tpr, rate), low=precision(base, tpr, high))
                    for base in BASE_RATES
                ],
                recurrence=[],
                mentions=bool(mentioned(label, concept)),
                claim="not_confirmed",
                scores=as_scores(scores[:, k]),
                corpus_scores=None if corpus is None else as_scores(np.sort(corpus[corpus > 0])[::-1]),
            )
        )
    return candidates


def rates(above: Bool[np.ndarray, " n_texts"], texts: Texts, rows: Int[np.ndarray, " n"]) -> tuple[float, float]:
    """Share of positives and of negatives among some rows that exceed the threshold."""
    positive = texts.positive[rows]
    return float(above[rows][positive].mean()), float(above[rows][~positive].mean())


def precision(base: float, tpr: float, fpr: float) -> float:
    """Share of true detections where a share `base` of the texts is positive."""
    hits, alarms = base * tpr, (1 - base) * fpr
    return figure(hits / (hits + alarms)) if hits + alarms > 0 else 0.0


def upper_rate(count: int, n: int, level: float = 0.95) -> float:
    """Upper end of the two-sided interval of a share (Clopper and Pearson 1934)."""
    return 1.0 if count >= n else float(stats.beta.ppf(0.5 + level / 2, count + 1, n - count))


def _bounds(
    scores: Float[np.ndarray, "n_texts n_candidates"],
    texts: Texts,
    rows: Int[np.ndarray, " n"],
    levels: Float[np.ndarray, " n_candidates"],
) -> Bounds:
    held, positive, groups = scores[rows], texts.positive[rows], texts.groups[rows]
    interval = auroc_interval(held, positive, groups)
    tested = np.empty(levels.size)
    for level in np.unique(levels):
        same = np.flatnonzero(levels == level)
        tested[same] = auroc_interval(held[:, same], positive, groups, level=1 - 2 * float(level)).low
    return Bounds(interval.auroc, interval.low, interval.high, tested)


def _held(bounds: Bounds, k: int, tpr: float, fpr: float) -> Held:
    return Held(
        auroc=figure(bounds.auroc[k]),
        low=figure(bounds.low[k]),
        high=figure(bounds.high[k]),
        low_tested=figure(bounds.low_tested[k]),
        true_positive_rate=figure(tpr),
        false_positive_rate=figure(fpr),
    )
