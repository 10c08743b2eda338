"""Labels that are not ours: a language model's, and those on the shelf, tested and put into labels.parquet.

predicate rows  ──────────────────────────────────────────────┐
explainer ──▶ llm:MODEL ──┐                                   ├──▶ labels.parquet ──▶ features.parquet: label,
shelf ──▶ neuronpedia … ──┴──▶ trials ──▶ judge or lexical ───┘                       label_source
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.errors import RunError
from pipelines.labels.external.records import ImportedLabel
from pipelines.labels.families import TokenTable
from pipelines.labels.judging import Verdicts, score_columns
from pipelines.labels.lexical import LexicalJudge
from pipelines.labels.llm.ledger import Cost, total
from pipelines.labels.llm.questions import PROMPT_VERSION, Passage
from pipelines.labels.llm.settings import LLMConfig
from pipelines.labels.llm.tasks import Reader, choose_latents, make_tasks, train_passages
from pipelines.labels.llm.worker import Outcome, Task
from pipelines.labels.rows import Row, row
from pipelines.labels.testset import Exam, SplitIndex
from pipelines.labels.trials import Sizes, Trials, draw_trials, heldout_firings, of_latent
from pipelines.progress import Reporter
from storage import LatentStore

LEXICAL_SIZES = Sizes(positives=100, negatives=100, fuzzed=50, others=20, neighbours=20, windows_per_other=10)
_AT_ONCE = 256
"""Latents whose texts are in memory together."""

Ask = Callable[[Iterable[Task]], Iterator[Outcome]]
"""Asks the endpoints; see `llm.worker.Worker.run`."""


@dataclass(frozen=True)
class Material:
    """What tests need of a labelled dictionary."""

    table: TokenTable
    latents: LatentStore
    neighbours: NDArray[np.int64]
    token_strings: Sequence[str]
    folder: Path
    """Holds features.parquet and examples.parquet."""
    seed: int
    min_detection: float
    window: int = 16


class OthersSummary(NamedTuple):
    """What came of the labels of one source; goes to metrics.json and events.jsonl."""

    source: str
    n_asked: int
    n_labelled: int
    """With a label, tested or not."""
    n_tested: int
    n_passed: int
    n_abstained: int
    n_failed: int
    n_waiting: int
    share_passed: float | None
    """Of those that were tested or failed; None over nothing."""
    failures: dict[str, int]
    """Calls that gave no answer, by role and reason."""
    cost: Cost
    """Of the answers behind these labels, whenever they were paid."""

    def for_json(self) -> dict[str, Any]:
        """All of it under names."""
        return self._asdict() | {"cost": self.cost._asdict()}


class Others:
    """Tests labels of one dictionary that are not its own rules. Held-out firings are read when first needed."""

    def __init__(self, material: Material, config: LLMConfig | None, ask: Ask | None, ui: Reporter) -> None:
        """Args: ask: how to reach the explainer and judge of `config`; None tests with words alone."""
        self._m, self._config, self._ask, self._ui = material, config, ask, ui
        self.trouble: RunError | None = None
        """Why the endpoints could not be asked to the end."""
        self._index = SplitIndex(material.table, window=material.window)
        self._firings = heldout_firings(material.latents, self._index)
        self._density = self._firings.n_firings / max(1, len(self._index.rows))
        self._reader = Reader(material.table, material.token_strings, material.window)
        self._lexical: LexicalJudge | None = None

    def explain(self) -> tuple[list[Row], OthersSummary]:
        """Labels of the explainer, judged.

        A latent without train contexts is not asked about.
        """
        assert self._config is not None
        assert self._config.explainer is not None
        features = pq.read_table(self._m.folder / "features.parquet", columns=["n_train_active", "promotes"])
        live = np.flatnonzero(features["n_train_active"].to_numpy() > 0)
        chosen = choose_latents(self._config, live, features.num_rows, self._m.seed)
        source = f"llm:{self._config.explainer.model}"
        passages = train_passages(
            self._m.folder / "examples.parquet", chosen, self._m.token_strings, self._config.n_contexts
        )
        promotes = {i: tuple(features["promotes"][i].as_py() or ()) for i in chosen}
        shown = {latent: None for latent in chosen if latent in passages}
        found = self._judge(source, shown, passages, promotes)
        method = {
            "explainer": self._config.explainer.identity,
            "prompt": PROMPT_VERSION,
            "n_contexts": self._config.n_contexts,
        }
        rows = []
        for latent in chosen:
            judged = found.get(latent, _Judged(Outcome(latent, None, "untested"), None))
            at = judged.outcome.labelled_at
            columns = {"author": self._config.explainer.model, "date": at, "method": _json(method)}
            columns["provenance"] = _json({"cost": judged.outcome.cost._asdict()})
            rows.append(_row(source, judged, columns))
        return rows, _summary(source, rows, found.values())

    def shelved(self, labels: Sequence[ImportedLabel]) -> tuple[list[Row], OthersSummary]:
        """Somebody else's labels, all of one source, judged."""
        source = labels[0].source
        texts = {label.latent: label.label for label in labels}
        found = self._judge(source, texts, {}, {}) if self._ask is not None else self._by_words(texts)
        rows = []
        for label in labels:
            rows.append(_row(source, found[label.latent], imported_columns(label)))
        return rows, _summary(source, rows, found.values())

    # -- judging -----------------------------------------------------------------------------------------------------

    def _judge(
        self,
        source: str,
        labels: Mapping[int, str | None],
        passages: Mapping[int, tuple[Passage, ...]],
        promotes: Mapping[int, tuple[str, ...]],
    ) -> "dict[int, _Judged]":
        """Labels through the endpoints; what they do not reach is waiting, and `trouble` says why."""
        assert self._config is not None
        assert self._ask is not None
        config = self._config
        sizes = Sizes(
            config.positives,
            config.negatives,
            config.fuzzed,
            config.others,
            config.neighbours,
            config.windows_per_other,
        )
        trials = self._trials(labels, sizes)
        outcomes: dict[int, Outcome] = {}
        with self._ui.stage(f"label by {source}", total=len(labels), unit="latents") as bar:
            tasks = (
                task
                for chunk in _chunks(sorted(labels))
                for task in make_tasks({i: labels[i] for i in chunk}, trials, self._reader, passages, promotes)
            )
            try:
                for outcome in self._ask(tasks) if self.trouble is None else ():
                    outcomes[outcome.latent] = outcome
                    bar.advance(1)
            except RunError as error:
                self.trouble = error
        for latent, label in labels.items():
            outcomes.setdefault(latent, Outcome(latent, label, "waiting"))
        answered = {i: outcome for i, outcome in outcomes.items() if outcome.status in ("labelled", "failed")}
        verdicts = {
            i: _Answers(_numbers(o.detect), _numbers(o.fuzz), _numbers(o.mismatch), failed=o.status == "failed")
            for i, o in answered.items()
        }
        columns = self._columns(trials, verdicts, f"llm:{config.judging.model}")
        return {i: _Judged(outcome, columns.get(i)) for i, outcome in outcomes.items()}

    def _by_words(self, texts: Mapping[int, str]) -> "dict[int, _Judged]":
        """Labels by their words alone."""
        self._lexical = self._lexical or LexicalJudge(
            self._m.table, self._m.token_strings, self._index.rows, self._m.window
        )
        trials = self._trials(texts, LEXICAL_SIZES)
        latents = np.array(sorted(texts), np.int64)
        labels = [texts[i] for i in latents.tolist()]
        detect = self._lexical.windows(labels, np.searchsorted(latents, trials.detect.latent), trials.detect.centre)
        fuzz = self._lexical.tokens(labels, np.searchsorted(latents, trials.fuzz.latent), trials.fuzz.row)
        verdicts = {}
        for at, latent in enumerate(latents.tolist()):
            centre = trials.others[latent].centre
            mismatch = self._lexical.windows(labels, np.full(len(centre), at), centre)
            asked, fuzzed = of_latent(trials.detect, latent), of_latent(trials.fuzz, latent)
            verdicts[latent] = _Answers(detect[asked], fuzz[fuzzed], mismatch, failed=False)
        columns = self._columns(trials, verdicts, "lexical")
        return {i: _Judged(Outcome(i, text, "labelled"), columns.get(i)) for i, text in texts.items()}

    def _trials(self, latents: Iterable[int], sizes: Sizes) -> Trials:
        chosen = np.array(sorted(latents), np.int64)
        return draw_trials(self._firings, chosen, self._index, self._m.neighbours, sizes, seed=self._m.seed)

    def _columns(self, trials: Trials, answers: "Mapping[int, _Answers]", judge: str) -> dict[int, dict[str, Any]]:
        """Score those latents of which there is something to detect."""
        latents = [i for i in sorted(answers) if (trials.detect.kind[of_latent(trials.detect, i)] == 0).any()]
        if not latents:
            return {}
        verdicts = Verdicts(
            np.array(latents, np.int64),
            np.concatenate([answers[i].fitting(answers[i].detect, trials.detect, i) for i in latents]),
            np.concatenate([answers[i].fitting(answers[i].fuzz, trials.fuzz, i) for i in latents]),
            {i: answers[i].or_none(answers[i].mismatch, len(trials.others[i].centre)) for i in latents},
        )
        scored = score_columns(trials, verdicts, self._density, min_detection=self._m.min_detection)
        return {i: columns | {"judge": judge} for i, columns in scored.items()}


class _Judged(NamedTuple):
    outcome: Outcome
    columns: dict[str, Any] | None
    """Of the tests; None where there was none."""


class _Answers(NamedTuple):
    """One latent's answers, NaN where there is none."""

    detect: NDArray[np.float32]
    fuzz: NDArray[np.float32]
    mismatch: NDArray[np.float32]
    failed: bool
    """There is no label, so that every question is without an answer."""

    def fitting(self, given: NDArray[np.float32], exam: Exam, latent: int) -> NDArray[np.float32]:
        """An entry per question of the latent."""
        span = of_latent(exam, latent)
        return self.or_none(given, span.stop - span.start)

    def or_none(self, given: NDArray[np.float32], n: int) -> NDArray[np.float32]:
        """The answers, or NaN for each question where the label failed."""
        return np.full(n, np.nan, np.float32) if self.failed else given


def _numbers(answers: Sequence[int | None]) -> NDArray[np.float32]:
    return np.array([np.nan if answer is None else answer for answer in answers], np.float32)


def _chunks(latents: Sequence[int]) -> Iterator[Sequence[int]]:
    return (latents[i : i + _AT_ONCE] for i in range(0, len(latents), _AT_ONCE))


def imported_columns(label: ImportedLabel) -> dict[str, Any]:
    """What labels.parquet says about where an imported label comes from."""
    provenance: dict[str, Any] = {"file": label.file, "line": label.line, "sha256": label.sha256}
    if label.claimed:
        provenance["claimed"] = label.claimed
    return {
        "author": label.author,
        "date": label.date,
        "note": label.note,
        "method": _json({"made by": label.method}) if label.method else None,
        "provenance": _json(provenance),
    }


def _row(source: str, judged: _Judged, columns: dict[str, Any]) -> Row:
    outcome, tested = judged
    status = outcome.status
    if status == "labelled":
        status = "untested" if tested is None else "tested"
    if outcome.failures:
        columns["failures"] = _json(dict(outcome.failures))
    return row(outcome.latent, source, outcome.label, status, **columns, **(tested or {}))


def _summary(source: str, rows: Sequence[Row], judged: Iterable[_Judged]) -> OthersSummary:
    outcomes = [outcome for outcome, _ in judged]
    count = Counter(row["status"] for row in rows)
    n_judged = count["tested"] + sum(row["status"] == "failed" and row["passed"] is not None for row in rows)
    n_passed = sum(bool(row["passed"]) for row in rows)
    failures: Counter[str] = Counter()
    for outcome in outcomes:
        failures.update(dict(outcome.failures))
    return OthersSummary(
        source=source,
        n_asked=len(rows),
        n_labelled=sum(row["label"] is not None for row in rows),
        n_tested=count["tested"],
        n_passed=n_passed,
        n_abstained=count["abstained"],
        n_failed=count["failed"],
        n_waiting=count["waiting"],
        share_passed=n_passed / n_judged if n_judged else None,
        failures=dict(sorted(failures.items())),
        cost=total(outcome.cost for outcome in outcomes),
    )


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)
