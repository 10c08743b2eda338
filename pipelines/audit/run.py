"""audit, as a stage of a run: every concept of the config against all dictionaries of the run together.

The texts of all concepts are encoded in one pass of the model; documents of the corpus are pooled from the store.
"""

import re
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from pipelines.audit.concepts import Concept, ConceptError, examples_of, load_concept, topic_examples
from pipelines.audit.examples import Example, words
from pipelines.audit.passages import passages_of_examples
from pipelines.audit.result import AuditResult
from pipelines.audit.settings import AuditSettings
from pipelines.audit.stage import audit_concept
from pipelines.audit.views import View
from pipelines.check import warn_of_misfit
from pipelines.collect import open_store
from pipelines.config import RunConfig
from pipelines.configfiles import concept_path
from pipelines.dictionaries import load_trained
from pipelines.documents import Documents, documents_of
from pipelines.encode import Pooled, RandomFeatures, Reader, encode_passages, pool_documents
from pipelines.errors import UsageError
from pipelines.features import read_labels
from pipelines.latents import dictionary_digest
from pipelines.models import LanguageModel, resolve_model
from pipelines.progress import Reporter
from pipelines.rundir import RunDir, key_of
from pipelines.sources import sha256_of
from sae import Dictionary
from storage import ActivationStore

MIN_CORPUS = 30
"""Documents from which a firing rate is told."""


def audit(config: RunConfig, run: RunDir, ui: Reporter) -> dict[str, dict[str, Any]]:
    """Audit all concepts; returns one verdict line per audit. Finished concepts are skipped on a rerun.

    Raises:
        UsageError: a concept file that cannot be used; all files are read before any work.
    """
    concepts = load_concepts(config)
    if not concepts:
        return {}
    labels = {name: read_labels(run.labels(name)) for name in config.saes}
    digests = {name: dictionary_digest(run.trained(name)) for name in config.saes}
    keys = {
        concept.name: key_of(
            digests,
            sha256_of(path),
            config.audit.model_dump(mode="json", exclude={"causal"}),
            config.seed,
            {name: sorted(found.items()) for name, found in labels.items()},
        )
        for path, concept in concepts
    }
    lines = {c.name: line for _, c in concepts if (line := _finished(run, c.name, keys[c.name])) is not None}
    todo = [concept for _, concept in concepts if concept.name not in lines]
    if todo:
        auditor = _Auditor(config, run, ui, labels, digests)
        began = time.monotonic()
        prepared = auditor.prepare(todo)
        with ui.stage("audit", total=len(todo), unit="concepts") as bar:
            for one in prepared:
                bar.note(one.concept.display)
                result, out = auditor.audit(one)
                lines[one.concept.name] = _line(result, out)
                run.mark_finished(
                    f"audit.{one.concept.name}",
                    keys[one.concept.name],
                    time.monotonic() - began,
                    [out / "audit.json", out / "report.html"],
                )
                began = time.monotonic()
                bar.advance(1)
    if config.audit.causal.enabled:
        from pipelines.audit.causal.stage import causal

        causal(config, run, ui, [concept for _, concept in concepts])
        lines = {c.name: line for _, c in concepts if (line := _finished(run, c.name, keys[c.name])) is not None}
    return {concept.name: lines[concept.name] for _, concept in concepts}


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


@dataclass(frozen=True)
class _Prepared:
    """A concept with its examples and what every dictionary makes of them."""

    concept: Concept
    examples: list[Example]
    views: list[View]


@dataclass(frozen=True)
class _Source:
    """A dictionary of the run, and the corpus as it sees it."""

    name: str
    dictionary: Dictionary
    reader: Reader
    corpus: Pooled
    """A row for each of the auditor's documents."""


class _Auditor:
    """Audits concepts against all dictionaries of a run."""

    def __init__(
        self,
        config: RunConfig,
        run: RunDir,
        ui: Reporter,
        labels: dict[str, dict[int, str]],
        digests: dict[str, str],
    ) -> None:
        self._config, self._run, self._ui, self._labels, self._digests = config, run, ui, labels, digests
        self._store: ActivationStore = open_store(config, run)
        self._lm = LanguageModel(resolve_model(config.model), config.model)
        self._documents: Documents = documents_of(self._store)
        self._rows: list[int] = []
        self._sources = [self._source(name) for name in config.saes]

    def _source(self, name: str) -> _Source:
        dictionary = load_trained(self._run, name)
        warn_of_misfit(self._config, self._run, name, dictionary, self._lm, self._ui)
        hook, multiple = dictionary.required_hook_name, self._config.sinks.multiple
        reader = Reader(
            dictionary,
            float(self._store.statistics(hook).sink_threshold(multiple)),
            RandomFeatures.like(dictionary, self._store, seed=self._config.seed),
        )
        start, stop = self._store.split_range("heldout")
        with self._ui.stage(f"audit: corpus, {name}", total=stop - start, unit="contexts") as bar:
            rows, pooled = pool_documents(
                self._store,
                reader,
                split="heldout",
                sink_multiple=multiple,
                selection=self._config.selection("audit"),
                bar=bar,
            )
        if not len(rows):
            raise UsageError("audit.select leaves no document of the held-out corpus: correct it, or collect more")
        if self._rows and rows.tolist() != self._rows:  # another hook, other sinks
            both = np.intersect1d(rows, self._rows)
            pooled = pooled.rows(np.searchsorted(rows, both))
            self._narrow(both.tolist())
        else:
            self._rows = rows.tolist()
        return _Source(name, dictionary, reader, pooled)

    def _narrow(self, rows: list[int]) -> None:
        """Keep these documents in every source so far."""
        index = np.searchsorted(self._rows, rows)
        self._sources = [
            _Source(s.name, s.dictionary, s.reader, s.corpus.rows(index)) for s in getattr(self, "_sources", [])
        ]
        self._rows = rows

    def prepare(self, concepts: Sequence[Concept]) -> list[_Prepared]:
        """Examples and views of all concepts; written texts go through the model in one pass."""
        written = {c.name: self._written(c) for c in concepts if c.topic is None}
        spans: dict[str, np.ndarray] = {}
        together: list[Example] = []
        for name, examples in written.items():
            spans[name] = np.arange(len(together), len(together) + len(examples))
            together += examples
        passages = passages_of_examples(
            self._lm,
            together,
            max_tokens=self._config.audit.max_tokens,
            prepend_bos=self._config.collect.prepend_bos,
        )
        with self._ui.stage("audit: texts", total=len(passages), unit="texts") as bar:
            readers = [source.reader for source in self._sources]
            pooled = encode_passages(self._lm, readers, passages, bar=bar)
        prepared = []
        for concept in concepts:
            if concept.topic is None:
                index, examples = spans[concept.name], written[concept.name]
                n_cut = sum(passages[i].cut for i in index)
                used = {e.group.removeprefix("document-") for e in examples if e.group.startswith("document-")}
                views = self._views([pool.rows(index) for pool in pooled], self._outside(used), n_cut)
            else:
                examples, views = self._topic(concept)
            prepared.append(_Prepared(concept, examples, views))
        return prepared

    def audit(self, one: _Prepared) -> tuple[AuditResult, Path]:
        """Audit one prepared concept."""
        settings = AuditSettings(
            seed=self._config.seed,
            n_permutations=self._config.audit.n_permutations,
            alpha=self._config.audit.alpha,
            max_candidates=self._config.audit.max_candidates,
        )
        out = self._run.audit(one.concept.name)
        try:
            result = audit_concept(
                one.concept,
                one.examples,
                one.views,
                out,
                settings=settings,
                command=f"sae audit {self._run.path}",
                say=self._ui.say,
            )
        except ValueError as error:
            raise UsageError(f"concept {one.concept.name}: {error}") from error
        return result, out

    def _written(self, concept: Concept) -> list[Example]:
        """The examples of a concept file, and pieces of corpus documents as easy negatives."""
        examples = examples_of(concept)
        lengths = [len(words(e.text)) for e in examples if not e.ood]
        texts = {str(row): self._documents.text[row] for row in self._rows}
        if any(e.messages is not None for e in examples):
            return examples  # plain text among chats would be told by its form
        return examples + corpus_negatives(texts, lengths, self._config.audit.corpus_negatives, seed=self._config.seed)

    def _topic(self, concept: Concept) -> tuple[list[Example], list[View]]:
        assert concept.topic is not None
        topics = [self._documents.topic[row] for row in self._rows]
        try:
            examples = topic_examples(
                concept,
                doc_ids=[str(row) for row in self._rows],
                topics=topics,
                texts=[self._documents.text[row] for row in self._rows],
                seed=self._config.seed,
            )
        except ConceptError as error:
            raise UsageError(str(error)) from error
        place = {str(row): i for i, row in enumerate(self._rows)}
        index = np.array([place[example.group] for example in examples])
        unlike = {str(row) for row, t in zip(self._rows, topics, strict=True) if t == concept.topic.positive}
        outside = self._outside({e.group for e in examples} | unlike)
        return examples, self._views([s.corpus.rows(index) for s in self._sources], outside, 0)

    def _outside(self, used: set[str]) -> np.ndarray | None:
        """Places of the documents that are no examples; None if they are too few to tell a rate."""
        left = np.array([i for i, row in enumerate(self._rows) if str(row) not in used], dtype=np.int64)
        return left if left.size >= MIN_CORPUS else None

    def _views(self, pooled: Sequence[Pooled], outside: np.ndarray | None, n_cut: int) -> list[View]:
        return [
            View(
                identity={
                    "name": source.name,
                    "hook": source.dictionary.hook_name,
                    "model": self._lm.model_id,
                    "d_sae": source.dictionary.d_sae,
                    "weights_sha256": self._digests[source.name],
                    "texts_cut": n_cut,
                },
                scores=pool.max_latents,
                dense=pool.mean_activations,
                mean_latents=pool.mean_latents,
                reconstruction=pool.mean_reconstruction,
                error=pool.mean_error,
                random=pool.max_random,
                corpus=None if outside is None else source.corpus.max_latents[outside],
                directions=source.dictionary.W_dec.float().cpu().numpy(),
                labels=self._labels[source.name],
            )
            for source, pool in zip(self._sources, pooled, strict=True)
        ]


def corpus_negatives(texts: dict[str, str], lengths: Sequence[int], n: int, *, seed: int) -> list[Example]:
    """Beginnings of documents, as long as the examples are, as easy negatives; each document is its own group.

    Args:
        texts: documents by name.
        lengths: words of each example; each piece takes one of them and ends with the sentence that reaches it.
    """
    rng = np.random.default_rng(seed)
    names = sorted(name for name, text in texts.items() if text.strip())
    chosen = [names[i] for i in rng.permutation(len(names))[:n]]
    if not chosen:
        return []
    wanted = rng.choice(np.array(lengths), len(chosen))
    return [
        Example(text=beginning(texts[name], int(length)), role="negative", group=f"document-{name}")
        for name, length in zip(chosen, wanted, strict=True)
    ]


def beginning(text: str, n_words: int) -> str:
    """The first sentences of a text, up to the one that brings it nearest to `n_words` words; at least one."""
    sentences = re.split(r"(?<=[.!?])\s+", " ".join(text.split()))
    kept: list[str] = []
    count = 0
    for sentence in sentences:
        more = len(words(sentence))
        if kept and abs(count + more - n_words) > abs(count - n_words):
            break
        kept.append(sentence)
        count += more
    return " ".join(kept)


def _finished(run: RunDir, name: str, key: str) -> dict[str, Any] | None:
    """The line of an audit that is there already; None if it has to be made (also if an older version wrote it)."""
    out = run.audit(name)
    if run.stage_key(f"audit.{name}") == key:
        with suppress(ValidationError, FileNotFoundError):
            return _line(AuditResult.model_validate_json((out / "audit.json").read_text()), out)
    return None


def _line(result: AuditResult, out: Path) -> dict[str, Any]:
    return {"level": result.verdict.level, "text": result.verdict.sentence, "report": str(out / "report.html")}
