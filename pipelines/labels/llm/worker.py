"""Label and judge a block of latents against one explainer and one judge. A plain class that knows no Ray.

    Task (texts only) ──▶ explain ──▶ detect, fuzz, mismatch ──▶ Outcome (a label, an answer per window)

A label that is given (somebody else's) skips the first step. Whatever fails is counted under its reason and leaves
`None` in place of its answers, which the scores take as wrong. Several latents are under way at once; of one latent the
calls follow each other, so that at the end of a budget most latents are either finished or not begun.
"""

import os
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from pipelines.labels.llm import questions
from pipelines.labels.llm.budget import Budget, BudgetSpent
from pipelines.labels.llm.client import Client
from pipelines.labels.llm.endpoint import Endpoint, Question, keys_of
from pipelines.labels.llm.ledger import NOTHING, Cost, Entry, Ledger, total
from pipelines.labels.llm.questions import Passage, Unusable
from pipelines.labels.llm.server import Server
from pipelines.labels.llm.settings import EndpointConfig, LLMConfig

Answers = tuple[int | None, ...]


class Task(NamedTuple):
    """All that is asked about one latent."""

    latent: int
    label: str | None
    """Somebody else's label to judge; None asks the explainer."""
    passages: tuple[Passage, ...]
    """Train contexts for the explainer."""
    promotes: tuple[str, ...]
    detect: tuple[Passage, ...]
    """Held-out windows, without marks."""
    fuzz: tuple[Passage, ...]
    """Held-out windows with one token marked."""
    mismatch: tuple[Passage, ...]
    """Windows of other latents."""


class Outcome(NamedTuple):
    """What came of a task."""

    latent: int
    label: str | None
    status: str
    """labelled, abstained (the explainer found nothing in common), failed (it gave no label) or waiting (the budget
    does not suffice, or the endpoint went down)."""
    detect: Answers = ()
    """1, 0 or, where the judge gave no answer, None for each window of the task; empty where there is no label."""
    fuzz: Answers = ()
    mismatch: Answers = ()
    failures: tuple[tuple[str, int], ...] = ()
    """Calls that gave no answer, by "role: reason"."""
    cost: Cost = NOTHING
    """Of all answers behind this outcome, whenever they were paid."""
    labelled_at: str | None = None
    """When the explainer gave the label, UTC, ISO 8601."""
    n_known: int = 0
    """Answers that the ledger had already."""


class Worker:
    """One explainer and one judge, with the ledger. Context manager."""

    def __init__(self, config: LLMConfig, folder: Path, number: int = 0) -> None:
        """Starts a server, if the config says so, and reads the ledger.

        Args:
            folder: of the ledger.
            number: among the workers of this config.

        Raises:
            RunError: the server does not start, a key is missing, or the ledger is damaged.
        """
        self.config = config
        self._exit = ExitStack()
        keys = keys_of(config.endpoints, os.environ)
        server = config.servers[number % len(config.servers)] if config.servers else None
        self.ledger = Ledger(folder)
        if config.serve is not None:
            server = self._exit.enter_context(Server(config.serve)).base_url
        self._clients = [
            (settings, self._client(settings, keys.get(settings.api_key_env or ""), server))
            for settings in config.endpoints
        ]

    def _client(self, settings: EndpointConfig, key: str | None, server: str | None) -> Client:
        return Client(Endpoint(settings, key, server), self.ledger, give_up_after=self.config.give_up_after)

    def client(self, settings: EndpointConfig) -> Client:
        """The client of an endpoint of the config; explainer and judge share one where their settings are equal."""
        return next(client for known, client in self._clients if known == settings)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the server and close the ledger."""
        self.ledger.close()
        self._exit.close()

    def run(self, tasks: Iterable[Task], budget: Budget) -> Iterator[Outcome]:
        """Outcomes, as they are finished; those that the budget does not reach are `waiting`.

        Raises:
            EndpointDown, RunError: an endpoint takes no questions; outcomes until then were yielded.
        """
        n_threads = max(settings.concurrency for settings in self.config.endpoints)
        left, pending = iter(tasks), set[Future[Outcome]]()
        with ThreadPoolExecutor(n_threads) as pool:
            try:
                while True:
                    while len(pending) < 2 * n_threads and (task := next(left, None)) is not None:
                        pending.add(pool.submit(self.do, task, budget))
                    if not pending:
                        return
                    done, pending = wait(pending, return_when=FIRST_COMPLETED)
                    failed = [error for future in done if (error := future.exception()) is not None]
                    yield from (future.result() for future in done if future.exception() is None)
                    if failed:
                        raise failed[0]
            finally:
                for future in pending:
                    future.cancel()

    def do(self, task: Task, budget: Budget) -> Outcome:
        """One latent from label to answers."""
        inquiry = _Inquiry(self, task.latent, budget)
        label, status = task.label, "labelled"
        detect: Answers = ()
        fuzz: Answers = ()
        mismatch: Answers = ()
        try:
            if label is None:
                label, status = inquiry.explain(task)
            if label is not None:
                detect = inquiry.judge("detect", label, task.detect)
                fuzz = inquiry.judge("fuzz", label, task.fuzz)
                mismatch = inquiry.judge("mismatch", label, task.mismatch)
        except BudgetSpent:
            status, detect, fuzz, mismatch = "waiting", (), (), ()
        return inquiry.outcome(label, status, detect, fuzz, mismatch)


class _Inquiry:
    """The calls about one latent, with their cost and failures."""

    def __init__(self, worker: Worker, latent: int, budget: Budget) -> None:
        self._worker, self._latent, self._budget = worker, latent, budget
        self._failures: Counter[str] = Counter()
        self._costs: list[Cost] = []
        self._n_known = 0
        self._labelled_at: str | None = None

    def explain(self, task: Task) -> tuple[str | None, str]:
        settings = self._worker.config.explainer
        assert settings is not None
        question = questions.explain(task.passages, task.promotes)
        answer = self._ask(settings, question)
        if answer is None:
            return None, "failed"
        try:
            label = questions.read_label(answer.text, refusal=answer.refusal, finish=answer.finish)
        except Unusable as unusable:
            self._failures[f"explain: {unusable.reason}"] += 1
            return None, "failed"
        self._labelled_at = answer.at
        return label, "abstained" if label is None else "labelled"

    def judge(self, role: str, label: str, passages: Sequence[Passage]) -> Answers:
        """An answer per passage. Passages are shuffled by the latent's own seed and asked some at a time."""
        answers: list[int | None] = [None] * len(passages)
        for group in shared_out(passages, self._worker.config.windows_per_call, f"{role} {self._latent}"):
            shown = [passages[i] for i in group]
            question = questions.fuzz(label, shown) if role == "fuzz" else questions.detect(label, shown, role)
            answer = self._ask(self._worker.config.judging, question)
            if answer is None:
                continue
            try:
                given = questions.read_answers(answer.text, len(group), refusal=answer.refusal, finish=answer.finish)
            except Unusable as unusable:
                self._failures[f"{role}: {unusable.reason}"] += 1
                continue
            for i, value in zip(group, given, strict=True):
                answers[i] = value
        return tuple(answers)

    def outcome(self, label: str | None, status: str, detect: Answers, fuzz: Answers, mismatch: Answers) -> Outcome:
        return Outcome(
            self._latent,
            label,
            status,
            detect,
            fuzz,
            mismatch,
            tuple(sorted(self._failures.items())),
            total(self._costs),
            self._labelled_at,
            self._n_known,
        )

    def _ask(self, settings: EndpointConfig, question: Question) -> Entry | None:
        answer = self._worker.client(settings).ask(question, self._budget)
        if answer.entry is None:
            self._failures[f"{question.role}: {answer.reason}"] += 1
            return None
        self._costs.append(answer.entry.cost)
        self._n_known += not answer.paid_now
        return answer.entry


def shared_out(passages: Sequence[Passage], n_per_call: int, seed: str) -> list[list[int]]:
    """Indices of the passages of each call: shuffled, as evenly sized as possible, no text twice in a call.

    A window that comes once with the right and once with a wrong token marked would give itself away if both stood
    side by side.
    """
    order = list(range(len(passages)))
    random.Random(seed).shuffle(order)
    n_groups = -(-len(order) // n_per_call)
    groups: list[list[int]] = [[] for _ in range(n_groups)]
    texts: list[set[tuple[str, ...]]] = [set() for _ in range(n_groups)]
    for i in order:
        free = [g for g in range(len(groups)) if len(groups[g]) < n_per_call and passages[i].tokens not in texts[g]]
        if not free:
            groups.append([])
            texts.append(set())
            free = [len(groups) - 1]
        group = min(free, key=lambda g: len(groups[g]))
        groups[group].append(i)
        texts[group].add(passages[i].tokens)
    return groups
