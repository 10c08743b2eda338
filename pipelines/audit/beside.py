"""What stands beside every latent: probes of the model's own activations, of what the dictionary keeps and of what it
loses, random features, latents that fire as often, words, length. All are fitted on discover and tune.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from pipelines.audit import baselines
from pipelines.audit.intervals import auroc_interval, paired_difference
from pipelines.audit.numbers import as_scores, figure
from pipelines.audit.result import Baseline, Candidate, Difference, Estimate, Matched
from pipelines.audit.statistics import associate, auroc
from pipelines.audit.views import Texts, View, joint_scores, spots_of

N_MATCHED = 200
"""Latents of like firing rate that a verdict's latent is compared with."""


class Column(NamedTuple):
    """A baseline's scores of all examples."""

    name: str
    title: str
    dictionary: str | None
    scores: Float[np.ndarray, " n_texts"]


def columns_of(views: Sequence[View], texts: Texts, *, min_texts: int, seed: int) -> Iterator[Column]:
    """Every baseline that the views have data for."""
    fit, positive = texts.fit, texts.positive
    several = len(views) > 1
    hooks: set[str] = set()
    for view in views:
        of = f" of {view.name}" if several else ""
        if view.dense is not None and view.hook not in hooks:
            hooks.add(view.hook)
            at = f" at {view.hook}" if len({v.hook for v in views}) > 1 else ""
            for name, title, probe in (
                ("dense_logistic", "Dense probe (logistic)", baselines.dense_logistic),
                ("dense_mean_difference", "Dense probe (mean difference)", baselines.mean_difference),
            ):
                yield Column(name, title + at, view.name, probe(view.dense[fit], positive[fit], view.dense))
        for name, title, x in (
            ("reconstruction", "Probe of the reconstruction", view.reconstruction),
            ("error", "Probe of what it loses", view.error),
        ):
            if x is not None and x.shape[1]:
                scores = baselines.dense_logistic(x[fit], positive[fit], x)
                yield Column(name, title + of, view.name, scores)
        if view.random is not None and view.random.shape[1]:
            best = _best_random(view, texts, min_texts=min_texts, seed=seed)
            if best is not None:
                yield Column("random_dictionary", "Best of as many random features" + of, view.name, best)
    words = [example.text for example in texts.examples]
    fit_words = [words[i] for i in fit]
    yield Column(
        "bag_of_words", "Words alone (bag of words)", None, baselines.bag_of_words(fit_words, positive[fit], words)
    )
    lengths = baselines.text_length(words)
    longer = auroc(lengths[fit][:, None], positive[fit])[0] >= 0.5
    yield Column("length", "Text length alone", None, lengths if longer else -lengths)


def judge(columns: Sequence[Column], texts: Texts) -> list[Baseline]:
    """Baselines on the confirm part and the out-of-distribution set."""
    c, hard, ood = texts.split.confirm, texts.against_hard, texts.ood
    scores = np.stack([column.scores for column in columns], axis=1).astype(np.float32)
    main = auroc_interval(scores[c], texts.positive[c], texts.groups[c])
    against_hard = auroc(scores[hard], texts.positive[hard]) if hard.size else None
    outside = auroc_interval(scores[ood], texts.positive[ood], texts.groups[ood]) if ood.size else None
    return [
        Baseline(
            name=column.name,
            title=column.title,
            dictionary=column.dictionary,
            auroc=figure(main.auroc[k]),
            low=figure(main.low[k]),
            high=figure(main.high[k]),
            hard_auroc=None if against_hard is None else figure(against_hard[k]),
            ood=None if outside is None else estimate(*(part[k] for part in outside)),
            scores=held_out(scores[:, k], texts),
        )
        for k, column in enumerate(columns)
    ]


def gap_to_dense(baselines_: Sequence[Baseline], best: Candidate | None, texts: Texts) -> Difference | None:
    """AUROC of the best dense probe less that of a latent, on the confirm texts."""
    dense = max((b for b in baselines_ if b.name.startswith("dense")), key=lambda b: b.auroc, default=None)
    if dense is None or best is None:
        return None
    c = texts.split.confirm
    probe = np.array([dense.scores[i] for i in c], dtype=np.float32)
    latent = np.array(best.scores, dtype=np.float32)[c]
    span = paired_difference(probe, latent, texts.positive[c], texts.groups[c])
    return Difference(value=figure(span.value), low=figure(span.low), high=figure(span.high))


def matched_latents(
    views: Sequence[View], texts: Texts, best: Candidate, candidates: Sequence[Candidate], alpha: float
) -> Matched | None:
    """The latents whose share of firing discover texts is closest to that of `best`, candidates left out.

    The choice sees no label. A latent that owes its AUROC to firing often has many equals here.
    """
    scores, d, c = joint_scores(views), texts.split.discover, texts.split.confirm
    fires = (scores[d] > 0).mean(axis=0)
    own = float((np.array(best.scores)[d] > 0).mean())
    starts = dict(zip([v.name for v in views], np.cumsum([0, *(v.scores.shape[1] for v in views)]), strict=False))
    distance = np.abs(fires - own)
    distance[[int(starts[x.dictionary]) + x.latent for x in candidates]] = np.inf
    distance[fires == 0] = np.inf
    columns = np.argsort(distance, kind="stable")[:N_MATCHED]
    columns = np.sort(columns[np.isfinite(distance[columns])])
    if not columns.size:
        return None
    reached = auroc(scores[np.ix_(c, columns)], texts.positive[c])
    return Matched(
        n=int(columns.size),
        mean=figure(reached.mean()),
        upper=figure(np.quantile(reached, 1 - alpha)),
        p=figure((1 + (reached >= best.auroc - 1e-9).sum()) / (1 + columns.size)),
        latents=[(views[spot.view].name, spot.latent) for spot in spots_of(views, columns)],
    )


def estimate(value: float, low: float, high: float) -> Estimate:
    """An estimate in six decimals."""
    return Estimate(auroc=figure(value), low=figure(low), high=figure(high))


def held_out(scores: Float[np.ndarray, " n_texts"], texts: Texts) -> list[float | None]:
    """Scores of the confirm and out-of-distribution texts; null elsewhere."""
    shown = np.zeros(scores.size, dtype=bool)
    shown[texts.split.confirm] = shown[texts.split.ood] = True
    return [value if show else None for value, show in zip(as_scores(scores), shown.tolist(), strict=True)]


def _best_random(view: View, texts: Texts, *, min_texts: int, seed: int) -> Float[np.ndarray, " n_texts"] | None:
    """The random feature that the same search would have chosen."""
    assert view.random is not None
    d = texts.split.discover
    found = associate(
        view.random[d], texts.positive[d], texts.groups[d], n_permutations=100, min_texts=min_texts, seed=seed
    )
    if not found.tested.any():
        return None
    return view.random[:, int(np.where(found.tested, found.z, -np.inf).argmax())]
