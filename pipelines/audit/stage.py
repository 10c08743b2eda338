"""Audit one concept: manifest, discover, tune, confirm, baselines, verdict; writes audit.json and report.html.

1. Judge the design, split the examples by group and write manifest.json, before any statistic is computed.
2. Discover: AUROC of every latent of every dictionary on one part; those with the largest z go on, with what labels
   propose. Tune: their thresholds, and sets of them.
3. Open the confirm part, which the ledger records, and judge them there: Holm, intervals, and the whole search repeated
   on shuffled labels; then the out-of-distribution set.
4. Beside them: dense probes, probes of the reconstruction and of the error, random features, latents that fire as
   often, words, length; and what the confirmed latents miss.
5. The verdict, in one sentence, with what this design could not have seen.
"""

import dataclasses
import datetime
import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from pipelines.audit.baselines import probe_direction
from pipelines.audit.beside import columns_of, estimate, gap_to_dense, held_out, judge, matched_latents
from pipelines.audit.bundle import write_scores
from pipelines.audit.completeness import absorption, unseen_share
from pipelines.audit.concepts import Concept
from pipelines.audit.confirm import confirm, thresholds_of
from pipelines.audit.discover import Choice, Search, choose, discover_record, search
from pipelines.audit.examples import Example
from pipelines.audit.intervals import auroc_interval
from pipelines.audit.ledger import Ledger
from pipelines.audit.manifest import Manifest, plan_audit
from pipelines.audit.numbers import as_scores, figure
from pipelines.audit.power import Design, simulate_power
from pipelines.audit.preflight import prepare, require_possible
from pipelines.audit.recurrence import recurrence_of
from pipelines.audit.report import render_report
from pipelines.audit.result import (
    AuditResult,
    Candidate,
    Completeness,
    ConceptRecord,
    Counts,
    Cover,
    ExampleRecord,
    Null,
    PowerTable,
    SparseProbe,
)
from pipelines.audit.sets import SIZES, CoverSet, Probe, greedy_cover, rates, sparse_probe
from pipelines.audit.settings import AuditSettings
from pipelines.audit.splits import PARTS
from pipelines.audit.statistics import searched_null
from pipelines.audit.verdict import claim_of, headline, limits_of, verdict_on, words_explain
from pipelines.audit.views import Texts, View, check_views, joint_scores, spots_of
from pipelines.rundir import write_text


def audit_concept(
    concept: Concept,
    examples: Sequence[Example],
    views: Sequence[View],
    out_dir: str | Path,
    *,
    settings: AuditSettings | None = None,
    command: str = "",
    ledger: Ledger | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> AuditResult:
    """Audit one concept in one dictionary or several of one model; one verdict.

    Writes manifest.json, scores.safetensors, report.html and audit.json into `out_dir`, each atomically.

    Args:
        views: what each dictionary makes of the examples, a row each, in their order.
        command: how to reproduce the audit; printed in the report.
        ledger: where the opening of the confirm part is recorded; the user's own by default.
        say: told the manifest's hash before the confirm part is opened, and whether it was opened before.
    Raises:
        ValueError: arrays that do not fit the examples.
        UsageError: a design that can detect nothing.
        LedgerError: the ledger was edited or cannot be written.
    """
    started = time.perf_counter()
    settings = settings or AuditSettings()
    ledger = ledger or Ledger.default()
    check_views(views, len(examples))
    kept, examples, split, preflight = prepare(
        examples,
        seed=settings.seed,
        discover_fraction=settings.discover_fraction,
        tune_fraction=settings.tune_fraction,
        n_latents=sum(view.scores.shape[1] for view in views),
        n_candidates=settings.max_candidates,
        alpha=settings.alpha,
        by_vocabulary=concept.topic is not None,
    )
    require_possible(preflight)
    views, texts = [view.take(kept) for view in views], Texts.of(examples, split)
    out = Path(out_dir)
    manifest = _plan(concept, texts, views, settings)
    manifest.write(out / "manifest.json")

    found = search(
        views,
        texts,
        n_permutations=settings.n_permutations,
        min_texts=settings.min_texts,
        seed=settings.seed + 1,
    )
    choices = choose(found, views, concept, max_candidates=settings.max_candidates, max_proposed=settings.max_proposed)
    tuned = _tune(found, choices, views, texts)
    power = _power(found, choices, texts, settings)

    say(f"{concept.name}: manifest {manifest.sha256} is written; deposit it elsewhere for proof of what was planned")
    opening = ledger.open_confirm(manifest, name=out.name)
    if opening.stamp:
        say(f"{concept.name}: {opening.stamp}: these confirm texts were opened before with this dictionary")
    c = split.confirm
    shuffled = searched_null(
        joint_scores(views)[c], texts.positive[c], texts.groups[c], found.found.null_best, seed=settings.seed + 2
    )
    upper = float(np.quantile(shuffled, 1 - settings.alpha))
    columns = list(columns_of(views, texts, min_texts=settings.min_texts, seed=settings.seed + 4))
    beside = judge(columns, texts)
    taken = confirm(
        choices,
        tuned.thresholds,
        found,
        views,
        texts,
        concept,
        n_permutations=settings.n_confirm_permutations,
        alpha=settings.alpha,
        detects_above=settings.detects_above,
        seed=settings.seed + 3,
    )
    confounded = words_explain(concept, beside, taken, settings.alpha)
    candidates = [_claimed(candidate, views, texts, upper, confounded, opening.reused, settings) for candidate in taken]
    best = headline(candidates)
    shown = best or max(candidates, key=lambda x: x.discover_z, default=None)
    completeness = _completeness(candidates, shown, views, texts)
    part_of = split.part_of()

    result = AuditResult(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        concept=ConceptRecord(
            name=concept.name,
            title=concept.display,
            description=concept.description,
            kind=concept.kind,
            redacted=concept.redact,
        ),
        dictionaries=[dict(view.identity) for view in views],
        settings=dataclasses.asdict(settings),
        manifest_sha256=manifest.sha256,
        preflight=preflight,
        opening=opening,
        counts={name: _counts(examples, rows) for name, rows in zip(PARTS, split, strict=True)},
        verdict=verdict_on(concept, candidates, confounded=confounded, reused=opening.reused, power=power),
        discover=discover_record(found, views, settings.alpha),
        power=power,
        candidates=candidates,
        sparse_probes=[_sparse(probe, views, texts) for probe in tuned.probes],
        cover=_cover(tuned, views, texts),
        completeness=completeness,
        shuffled_null=Null(
            n=shuffled.size,
            mean=figure(shuffled.mean()),
            upper=figure(upper),
            histogram=np.histogram(shuffled, bins=40, range=(0, 1))[0].tolist(),
        ),
        matched=None if shown is None else matched_latents(views, texts, shown, candidates, settings.alpha),
        baselines=beside,
        gap=gap_to_dense(beside, shown, texts),
        examples=[
            ExampleRecord(
                digest=example.digest,
                role=example.role,
                group=example.group,
                part=part_of[i],
                n_characters=len(example.text),
                text=None if concept.redact else example.text,
            )
            for i, example in enumerate(examples)
        ],
        limits=limits_of(
            concept,
            candidates,
            beside,
            completeness,
            confounded=confounded,
            reused=opening.reused,
            has_corpus=any(view.corpus is not None for view in views),
        ),
        command=command,
        seconds=round(time.perf_counter() - started, 3),
    )
    write_scores(out / "scores.safetensors", views)
    write_text(out / "report.html", render_report(result))
    written = result.model_dump_json(indent=1) + "\n"
    write_text(out / "audit.json", written)  # after the others: its presence means a whole audit
    ledger.finish(opening, level=result.verdict.level, result_sha256=hashlib.sha256(written.encode()).hexdigest())
    return result


class _Tuned(NamedTuple):
    """What was chosen before the confirm part was opened."""

    thresholds: Float[np.ndarray, " n_candidates"]
    probes: list[Probe]
    cover: CoverSet
    pool: Int[np.ndarray, " n_pool"]
    """Columns that `cover` counts its latents in."""


def _plan(concept: Concept, texts: Texts, views: Sequence[View], settings: AuditSettings) -> Manifest:
    return plan_audit(
        texts.examples,
        texts.split,
        concept={"name": concept.name, "kind": concept.kind},
        dictionaries=[dict(view.identity) for view in views],
        settings=dataclasses.asdict(settings),
        planned_tests=[
            "discover: AUROC of every latent of every dictionary that fires on enough texts, one-sided, max-T and "
            "Benjamini-Hochberg over all of them together",
            "tune: one threshold for each candidate, largest TPR - FPR; sets of latents",
            f"confirm: the {settings.max_candidates} latents with the largest z and up to {settings.max_proposed} that "
            "labels propose, one-sided permutation p, Holm: associated",
            f"confirm: their lower bounds against {settings.detects_above}, in that order, fallback procedure: detects",
            "hard negatives and out-of-distribution set: the same bounds at the same levels: robust",
        ],
    )


def _tune(found: Search, choices: Sequence[Choice], views: Sequence[View], texts: Texts) -> _Tuned:
    scores = joint_scores(views)
    sizes = sorted({min(k, found.columns.size) for k in SIZES} - {0})
    pool = found.columns[: max(SIZES)]
    return _Tuned(
        thresholds_of(choices, views, texts),
        [sparse_probe(scores, found.columns[:k], texts.positive, texts.fit) for k in sizes],
        greedy_cover(scores[:, pool], texts.positive, texts.split.tune, texts.fit),
        pool,
    )


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


def _cover(tuned: _Tuned, views: Sequence[View], texts: Texts) -> Cover | None:
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
