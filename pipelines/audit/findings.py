"""What the texts say about the latents, as functions of arrays: used when an audit is made, and when it is verified.

`before_opening` needs no confirm label; `after_opening` judges what was chosen. Both read scores of examples alone;
what needs more (decoder directions, dense activations) is left out where a view lacks it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from pipelines.audit.baselines import probe_direction
from pipelines.audit.beside import Column, estimate, gap_to_dense, held_out, judge, matched_latents
from pipelines.audit.completeness import absorption, unseen_share
from pipelines.audit.concepts import Concept
from pipelines.audit.confirm import confirm, thresholds_of
from pipelines.audit.discover import Choice, Search, choose, discover_record, search
from pipelines.audit.examples import Example
from pipelines.audit.intervals import auroc_interval
from pipelines.audit.numbers import as_scores, figure
from pipelines.audit.power import Design, simulate_power
from pipelines.audit.recurrence import recurrence_of
from pipelines.audit.result import Candidate, Completeness, Counts, Cover, Null, PowerTable, SparseProbe
from pipelines.audit.sets import SIZES, CoverSet, Probe, greedy_cover, rates, sparse_probe
from pipelines.audit.settings import AuditSettings
from pipelines.audit.splits import PARTS
from pipelines.audit.statistics import searched_null
from pipelines.audit.verdict import claim_of, headline, limits_of, verdict_on, words_explain
from pipelines.audit.views import Texts, View, joint_scores, spots_of


class Chosen(NamedTuple):
    """What was fixed before the confirm part was opened."""

    found: Search
    choices: list[Choice]
    thresholds: Float[np.ndarray, " n_candidates"]
    probes: list[Probe]
    cover: CoverSet
    pool: Int[np.ndarray, " n_pool"]
    """Columns that `cover` counts its latents in."""
    power: PowerTable


def before_opening(concept: Concept, views: Sequence[View], texts: Texts, settings: AuditSettings) -> Chosen:
    """Search all latents on discover, tune on tune, and say what the confirm part will be able to show."""
    found = search(
        views,
        texts,
        n_permutations=settings.n_permutations,
        min_texts=settings.min_texts,
        seed=settings.seed + 1,
    )
    choices = choose(found, views, concept, max_candidates=settings.max_candidates, max_proposed=settings.max_proposed)
    scores = joint_scores(views)
    sizes = sorted({min(k, found.columns.size) for k in SIZES} - {0})
    pool = found.columns[: max(SIZES)]
    return Chosen(
        found,
        choices,
        thresholds_of(choices, views, texts),
        [sparse_probe(scores, found.columns[:k], texts.positive, texts.fit) for k in sizes],
        greedy_cover(scores[:, pool], texts.positive, texts.split.tune, texts.fit),
        pool,
        _power(found, choices, texts, settings),
    )


def after_opening(
    concept: Concept,
    views: Sequence[View],
    texts: Texts,
    settings: AuditSettings,
    chosen: Chosen,
    columns: Sequence[Column],
    *,
    reused: int,
    has_corpus: bool,
) -> dict[str, Any]:
    """Judge the chosen latents on the confirm part and outside: the fields of the result that are figures.

    Args:
        columns: the baselines' scores of the examples.
        reused: how often the confirm texts had been opened before.
    """
    c = texts.split.confirm
    shuffled = searched_null(
        joint_scores(views)[c],
        texts.positive[c],
        texts.groups[c],
        chosen.found.found.null_best,
        seed=settings.seed + 2,
    )
    upper = float(np.quantile(shuffled, 1 - settings.alpha))
    beside = judge(columns, texts)
    taken = confirm(
        chosen.choices,
        chosen.thresholds,
        chosen.found,
        views,
        texts,
        concept,
        n_permutations=settings.n_confirm_permutations,
        alpha=settings.alpha,
        detects_above=settings.detects_above,
        seed=settings.seed + 3,
    )
    confounded = words_explain(concept, beside, taken, settings.alpha)
    candidates = [_claimed(candidate, views, texts, upper, confounded, reused, settings) for candidate in taken]
    shown = headline(candidates) or max(candidates, key=lambda x: x.discover_z, default=None)
    completeness = _completeness(candidates, shown, views, texts)
    return {
        "counts": {name: _counts(texts.examples, rows) for name, rows in zip(PARTS, texts.split, strict=True)},
        "verdict": verdict_on(concept, candidates, confounded=confounded, reused=reused, power=chosen.power),
        "discover": discover_record(chosen.found, views, settings.alpha),
        "power": chosen.power,
        "candidates": candidates,
        "sparse_probes": [_sparse(probe, views, texts) for probe in chosen.probes],
        "cover": _cover(chosen, views, texts),
        "completeness": completeness,
        "shuffled_null": Null(
            n=shuffled.size,
            mean=figure(shuffled.mean()),
            upper=figure(upper),
            histogram=np.histogram(shuffled, bins=40, range=(0, 1))[0].tolist(),
        ),
        "matched": None if shown is None else matched_latents(views, texts, shown, candidates, settings.alpha),
        "baselines": beside,
        "gap": gap_to_dense(beside, shown, texts),
        "limits": limits_of(
            concept,
            candidates,
            beside,
            completeness,
            confounded=confounded,
            reused=reused,
            has_corpus=has_corpus,
        ),
    }


def _power(found: Search, choices: Sequence[Choice], texts: Texts, settings: AuditSettings) -> PowerTable:
    """Power of this design with the firing rates of the latents that were tested."""
    tested = found.found.tested
    power = simulate_power(
        Design(
            discover=texts.groups_of(texts.split.discover),
            confirm=texts.groups_of(texts.split.confirm),
            n_latents=max(1, int(tested.sum())),
            n_candidates=max(len(choices), settings.max_candidates),
            alpha=settings.alpha,
            detects_above=settings.detects_above,
        ),
        found.found.fires[tested],
        n_simulated=settings.n_simulated,
        seed=settings.seed + 5,
    )
    return PowerTable(
        auroc=list(power.auroc),
        associated=[figure(v) for v in power.associated],
        detects=[figure(v) for v in power.detects],
        n_simulated=power.n_simulated,
        smallest_associated=power.smallest("associated"),
        smallest_detects=power.smallest("detects"),
    )


def _claimed(
    candidate: Candidate,
    views: Sequence[View],
    texts: Texts,
    null_upper: float,
    confounded: bool,
    reused: int,
    settings: AuditSettings,
) -> Candidate:
    claim = claim_of(
        candidate,
        null_upper=null_upper,
        confounded=confounded,
        reused=reused,
        alpha=settings.alpha,
        detects_above=settings.detects_above,
    )
    confirmed = claim not in ("not_confirmed", "mentioned")
    return candidate.model_copy(
        update={"claim": claim, "recurrence": recurrence_of(candidate, views, texts) if confirmed else []}
    )


def _completeness(
    candidates: Sequence[Candidate], shown: Candidate | None, views: Sequence[View], texts: Texts
) -> Completeness:
    confirmed = [x for x in candidates if x.claim not in ("not_confirmed", "mentioned")]
    seen = np.array([np.array(x.scores) > x.threshold for x in confirmed]).reshape(-1, texts.positive.size).T
    absorbed = None
    view = next((v for v in views if shown and v.name == shown.dictionary), None)
    if confirmed and view is not None and view.dense is not None:
        direction, bias = probe_direction(view.dense[texts.fit], texts.positive[texts.fit])
        found = view.dense @ direction + bias > 0
        own = [x.latent for x in confirmed if x.dictionary == view.name]
        absorbed = absorption(view, texts, own, direction, found)
    return Completeness(unseen_share=unseen_share(seen, texts.positive, texts.split.confirm), absorption=absorbed)


def _sparse(probe: Probe, views: Sequence[View], texts: Texts) -> SparseProbe:
    scores = probe.scores.astype(np.float32)
    confirmed, outside = (
        auroc_interval(scores[rows][:, None], texts.positive[rows], texts.groups[rows]) if rows.size else None
        for rows in (texts.split.confirm, texts.ood)
    )
    assert confirmed is not None
    return SparseProbe(
        k=int(probe.columns.size),
        latents=[(views[spot.view].name, spot.latent) for spot in spots_of(views, probe.columns)],
        weights=[figure(w) for w in probe.weights],
        confirm=estimate(*(part[0] for part in confirmed)),
        ood=None if outside is None else estimate(*(part[0] for part in outside)),
        scores=held_out(scores, texts),
    )


def _cover(tuned: Chosen, views: Sequence[View], texts: Texts) -> Cover | None:
    if not tuned.cover.places:
        return None
    seen = tuned.cover.sees(joint_scores(views)[:, tuned.pool])
    on = {part: rates(seen[rows], texts.positive[rows]) for part, rows in texts.split._asdict().items() if rows.size}
    return Cover(
        latents=[(views[spot.view].name, spot.latent) for spot in spots_of(views, tuned.pool[tuned.cover.places])],
        thresholds=as_scores(np.array(tuned.cover.thresholds)),
        tune_recall=figure(on["tune"][0]),
        tune_false_positive_rate=figure(on["tune"][1]),
        recall=figure(on["confirm"][0]),
        false_positive_rate=figure(on["confirm"][1]),
        seen=seen.tolist(),
    )


def _counts(examples: Sequence[Example], rows: Int[np.ndarray, " n"]) -> Counts:
    roles = [examples[i].role for i in rows]
    return Counts(
        positive=roles.count("positive"),
        hard_negative=roles.count("hard_negative"),
        negative=roles.count("negative"),
        groups=len({examples[i].group for i in rows}),
    )
