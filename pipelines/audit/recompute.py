"""The figures of an audit again, from the scores of its examples alone."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipelines.audit.beside import Column
from pipelines.audit.bundle import Scores
from pipelines.audit.causal.records import with_causal
from pipelines.audit.concepts import Concept, Topic
from pipelines.audit.examples import Example
from pipelines.audit.findings import after_opening, before_opening
from pipelines.audit.numbers import figure
from pipelines.audit.preflight import prepare
from pipelines.audit.recurrence import SAME
from pipelines.audit.result import AuditResult
from pipelines.audit.settings import AuditSettings
from pipelines.audit.splits import split_by_group
from pipelines.audit.statistics import auroc
from pipelines.audit.verdict import limits_of
from pipelines.audit.views import Texts, View


def recompute(result: AuditResult, stored: Mapping[str, Scores]) -> dict[str, Any]:
    """The figures again, as JSON, by their key in audit.json."""
    settings, examples = AuditSettings(**result.settings), examples_in(result)
    concept = _concept(result)
    views = _views(result, stored)
    split = split_by_group(
        examples,
        seed=settings.seed,
        discover_fraction=settings.discover_fraction,
        tune_fraction=settings.tune_fraction,
    )
    texts = Texts.of(examples, split)
    columns = [
        Column(b.name, b.title, b.dictionary, np.array([0.0 if s is None else s for s in b.scores], dtype=np.float32))
        for b in result.baselines
    ]
    chosen = before_opening(concept, views, texts, settings)
    has_corpus = any(view.corpus is not None for view in views)
    found = after_opening(
        concept, views, texts, settings, chosen, columns, reused=result.opening.reused, has_corpus=has_corpus
    )
    # What needs directions or dense activations stays as recorded, as far as it agrees with the scores.
    known = {(c.dictionary, c.latent): c for c in result.candidates}
    found["candidates"] = [
        c.model_copy(update={"recurrence": _recurrence(known.get((c.dictionary, c.latent)), views, texts)})
        for c in found["candidates"]
    ]
    found["completeness"] = found["completeness"].model_copy(update={"absorption": result.completeness.absorption})
    found["limits"] = limits_of(
        concept,
        found["candidates"],
        found["baselines"],
        found["completeness"],
        confounded=found["verdict"].confounded,
        reused=result.opening.reused,
        has_corpus=has_corpus,
    )
    found["preflight"] = _preflight(result, examples, settings, sum(v.scores.shape[1] for v in views))
    if result.causal is not None:  # as recorded: it needs the model
        found = with_causal(found, result.causal)
    return {key: _plain(value) for key, value in found.items()}


def _recurrence(recorded: Any, views: Sequence[View], texts: Texts) -> list[Any]:
    c, by_name = texts.split.confirm, {view.name: view for view in views}
    return [
        r.model_copy(
            update={
                "auroc": figure(auroc(by_name[r.dictionary].scores[c][:, [r.latent]], texts.positive[c])[0]),
                "recurs": r.mutual and r.cosine >= SAME,
            }
        )
        for r in (recorded.recurrence if recorded else [])
    ]


def _preflight(result: AuditResult, examples: Sequence[Example], settings: AuditSettings, width: int) -> Any:
    """Of texts that are there; what was left out before cannot be counted again."""
    recorded = result.preflight
    again = prepare(
        examples,
        seed=settings.seed,
        discover_fraction=settings.discover_fraction,
        tune_fraction=settings.tune_fraction,
        n_latents=width,
        n_candidates=settings.max_candidates,
        alpha=settings.alpha,
        by_vocabulary=result.concept.of_topic,
    ).preflight if not result.concept.redacted else recorded  # fmt: skip
    kept = ("n_joined", "n_repeated", "n_contradictory", "n_ood_seen", "notes")
    return again.model_copy(update={key: getattr(recorded, key) for key in kept})


def examples_in(result: AuditResult) -> list[Example]:
    """The examples of a result; a digest stands for a text that is redacted."""
    return [
        Example(text=e.text if e.text is not None else e.digest, role=e.role, group=e.group, ood=e.part == "ood")
        for e in result.examples
    ]


def _concept(result: AuditResult) -> Concept:
    """As much of the concept as figures and sentences depend on."""
    r = result.concept
    return Concept.model_construct(
        name=r.name,
        title=r.title,
        description=r.description,
        kind=r.kind,
        topic=Topic(positive=r.title) if r.of_topic else None,
        wordlist=tuple(r.words),
        redact=r.redacted,
    )


def _views(result: AuditResult, stored: Mapping[str, Scores]) -> list[View]:
    views = []
    for identity in result.dictionaries:
        view = View(identity=identity, scores=np.empty((0, 0), np.float32))
        scores = stored[view.name]
        corpus = None
        if scores.corpus is not None:
            corpus = np.zeros((scores.corpus.shape[0], scores.examples.shape[1]), dtype=np.float32)
            corpus[:, scores.corpus_latents] = scores.corpus
        labels = {c.latent: c.label for c in result.candidates if c.dictionary == view.name and c.label is not None}
        views.append(View(identity=identity, scores=scores.examples, corpus=corpus, labels=labels))
    return views


def _plain(value: Any) -> Any:
    """As it stands in JSON."""
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else value
