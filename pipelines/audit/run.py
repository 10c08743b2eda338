"""audit, as a stage of a run: every concept of the config against every dictionary of the run."""

import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from pipelines.audit.concepts import Concept, ConceptError, examples_of, load_concept, topic_examples
from pipelines.audit.examples import Example
from pipelines.audit.result import AuditResult
from pipelines.audit.stage import AuditSettings, audit_concept
from pipelines.check import warn_of_misfit
from pipelines.collect import open_store
from pipelines.config import RunConfig
from pipelines.configfiles import concept_path
from pipelines.dictionaries import load_trained
from pipelines.documents import Documents, documents_of
from pipelines.encode import Pooled, encode_texts, pool_documents
from pipelines.errors import UsageError
from pipelines.features import read_labels
from pipelines.latents import dictionary_digest
from pipelines.models import LanguageModel, resolve_model
from pipelines.progress import Reporter
from pipelines.rundir import RunDir, key_of
from pipelines.sources import sha256_of
from sae import Dictionary
from storage import ActivationStore


def audit(config: RunConfig, run: RunDir, ui: Reporter) -> dict[str, dict[str, Any]]:
    """Audit all concepts; returns one verdict line per audit. Finished concepts are skipped on a rerun.

    Raises:
        UsageError: a concept file that cannot be used; all files are read before any work.
    """
    concepts = load_concepts(config)
    if not concepts:
        return {}
    store = open_store(config, run)
    lm = LanguageModel(resolve_model(config.model), config.model)
    documents = documents_of(store)
    verdicts = {}
    for name in config.saes:
        dictionary = load_trained(run, name)
        warn_of_misfit(config, run, name, dictionary, lm, ui)
        auditor = _Auditor(config, run, name, dictionary, store, lm, documents, ui)
        with ui.stage("audit", total=len(concepts), unit="concepts") as bar:
            for path, concept in concepts:
                bar.note(concept.display)
                audit_name = concept.name if len(config.saes) == 1 else f"{name}-{concept.name}"
                verdicts[audit_name] = auditor.audit(concept, path, audit_name)
                bar.advance(1)
    return verdicts


def load_concepts(config: RunConfig) -> list[tuple[Path, Concept]]:
    """The concepts of the config, read and validated.

    Raises:
        UsageError: listing what is wrong with each file.
    """
    loaded, problems = [], []
    for name in config.audit.concepts:
        try:
            path = concept_path(name)
            loaded.append((path, load_concept(path)))
        except (ConceptError, UsageError) as error:
            problems.append(str(error))
    names = [concept.name for _, concept in loaded]
    problems += [
        f"two concepts are named {name!r}: rename one" for name in sorted({n for n in names if names.count(n) > 1})
    ]
    if problems:
        raise UsageError("\n".join(problems))
    return loaded


class _Auditor:
    """Audits concepts against one dictionary; the corpus's pools are computed once, when first needed."""

    def __init__(
        self,
        config: RunConfig,
        run: RunDir,
        name: str,
        dictionary: Dictionary,
        store: ActivationStore,
        lm: LanguageModel,
        documents: Documents,
        ui: Reporter,
    ) -> None:
        self._config, self._run, self._name, self._dictionary = config, run, name, dictionary
        self._store, self._lm, self._documents, self._ui = store, lm, documents, ui
        self._digest = dictionary_digest(run.trained(name))
        self._labels: Mapping[int, str] = read_labels(run.labels(name))
        self._corpus: tuple[list[int], Pooled] | None = None

    def audit(self, concept: Concept, path: Path, audit_name: str) -> dict[str, Any]:
        settings = AuditSettings(
            seed=self._config.seed,
            n_permutations=self._config.audit.n_permutations,
            alpha=self._config.audit.alpha,
            max_candidates=self._config.audit.max_candidates,
        )
        key = key_of(
            self._digest,
            sha256_of(path),
            self._config.audit.model_dump(mode="json"),
            self._config.seed,
            sorted(self._labels.items()),
        )
        out = self._run.audit(audit_name)
        marker = f"audit.{audit_name}"
        if self._run.stage_key(marker) == key:
            with suppress(ValidationError):  # written by an older version: made again
                return _line(AuditResult.model_validate_json((out / "audit.json").read_text()), out)
        began = time.monotonic()
        rows, corpus = self._pooled_corpus()
        examples, pooled, n_cut = self._examples(concept, rows, corpus)
        dictionary = {
            "name": self._name,
            "hook": self._dictionary.hook_name,
            "model": self._lm.model_id,
            "d_sae": self._dictionary.d_sae,
            "weights_sha256": self._digest,
            "texts_cut": n_cut,
        }
        try:
            result = audit_concept(
                concept,
                examples,
                pooled.max_latents,
                out,
                dictionary=dictionary,
                dense=pooled.mean_activations,
                corpus=corpus.max_latents if concept.topic is None else None,
                labels=self._labels,
                settings=settings,
                command=f"sae audit {self._run.path}",
                say=self._ui.say,
            )
        except ValueError as error:
            raise UsageError(f"concept {concept.name}: {error}") from error
        self._run.mark_finished(marker, key, time.monotonic() - began, [out / "audit.json", out / "report.html"])
        return _line(result, out)

    def _examples(self, concept: Concept, rows: list[int], corpus: Pooled) -> tuple[list[Example], Pooled, int]:
        if concept.topic is None:
            examples = examples_of(concept)
            pooled = encode_texts(
                self._lm,
                self._dictionary,
                [example.text for example in examples],
                max_tokens=self._config.audit.max_tokens,
                prepend_bos=self._config.collect.prepend_bos,
                sink_norm=float(
                    self._store.statistics(self._dictionary.required_hook_name).sink_threshold(
                        self._config.sinks.multiple
                    )
                ),
            )
            return examples, pooled, pooled.n_cut
        try:
            examples = topic_examples(
                concept,
                doc_ids=[str(row) for row in rows],
                topics=[self._documents.topic[row] for row in rows],
                texts=[self._documents.text[row] for row in rows],
                seed=self._config.seed,
            )
        except ConceptError as error:
            raise UsageError(str(error)) from error
        index = {row: i for i, row in enumerate(rows)}
        chosen = np.array([index[int(example.group)] for example in examples])
        return (
            examples,
            Pooled(corpus.max_latents[chosen], corpus.mean_activations[chosen], corpus.n_tokens[chosen], 0),
            0,
        )

    def _pooled_corpus(self) -> tuple[list[int], Pooled]:
        if self._corpus is None:
            documents, pooled = pool_documents(
                self._store,
                self._dictionary,
                split="heldout",
                sink_multiple=self._config.sinks.multiple,
                selection=self._config.selection("audit"),
            )
            if not len(documents):
                raise UsageError("audit.select leaves no document of the held-out corpus: correct it, or collect more")
            self._corpus = documents.tolist(), pooled
        return self._corpus


def _line(result: AuditResult, out: Path) -> dict[str, Any]:
    return {"level": result.verdict.level, "text": result.verdict.sentence, "report": str(out / "report.html")}
