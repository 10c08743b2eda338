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

from pipelines.audit.beside import columns_of
from pipelines.audit.bundle import write_scores
from pipelines.audit.concepts import Concept
from pipelines.audit.discover import words_of
from pipelines.audit.examples import Example
from pipelines.audit.findings import after_opening, before_opening
from pipelines.audit.ledger import Ledger
from pipelines.audit.manifest import Manifest, plan_audit
from pipelines.audit.preflight import prepare, require_possible
from pipelines.audit.report import render_report
from pipelines.audit.result import (
    AuditResult,
    ConceptRecord,
    ExampleRecord,
)
from pipelines.audit.settings import AuditSettings
from pipelines.audit.views import Texts, View, check_views
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

    chosen = before_opening(concept, views, texts, settings)

    say(f"{concept.name}: manifest {manifest.sha256} is written; deposit it elsewhere for proof of what was planned")
    opening = ledger.open_confirm(manifest, name=out.name)
    if opening.stamp:
        say(f"{concept.name}: {opening.stamp}: these confirm texts were opened before with this dictionary")
    figures = after_opening(
        concept,
        views,
        texts,
        settings,
        chosen,
        list(columns_of(views, texts, min_texts=settings.min_texts, seed=settings.seed + 4)),
        reused=opening.reused,
        has_corpus=any(view.corpus is not None for view in views),
    )
    spots = [choice.spot for choice in chosen.choices]
    scores_sha256 = write_scores(out / "scores.safetensors", views, spots)
    part_of = split.part_of()

    result = AuditResult(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        concept=ConceptRecord(
            name=concept.name,
            title=concept.display,
            description=concept.description,
            kind=concept.kind,
            redacted=concept.redact,
            of_topic=concept.topic is not None,
            words=sorted(words_of(concept)),
        ),
        dictionaries=[dict(view.identity) for view in views],
        settings=dataclasses.asdict(settings),
        manifest_sha256=manifest.sha256,
        scores_sha256=scores_sha256,
        preflight=preflight,
        opening=opening,
        examples=[
            ExampleRecord(
                digest=example.digest,
                role=example.role,
                group=example.group,
                part=part_of[i],
                n_characters=len(example.text),
                chat=example.messages is not None,
                text=None if concept.redact else example.text,
            )
            for i, example in enumerate(examples)
        ],
        command=command,
        seconds=round(time.perf_counter() - started, 3),
        **figures,
    )
    write_text(out / "report.html", render_report(result))
    written = result.model_dump_json(indent=1) + "\n"
    write_text(out / "audit.json", written)  # after the others: its presence means a whole audit
    ledger.finish(opening, level=result.verdict.level, result_sha256=hashlib.sha256(written.encode()).hexdigest())
    return result


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
