"""Label and judge a block of latents against one explainer and one judge. A plain class that knows no Ray.

    Task (texts only) ──▶ explain ──▶ detect, fuzz, mismatch ──▶ Outcome (a label, an answer per window)

A label that is given (somebody else's) skips the first step. Whatever fails is counted under its reason and leaves
`None` in place of its answers, which the scores take as wrong. Several latents are under way at once; of one latent the
calls follow each other, so that at the end of a budget most latents are either finished or not begun.
"""

import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence
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
from pipelines.labels.llm.settings import BudgetConfig, EndpointConfig, LLMConfig

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
    n_known: int = 0
    """Answers that the ledger had already."""


class Worker:
    """One explainer and one judge, with the ledger and a share of the budget. Context manager."""

    def __init__(
        self,
        config: LLMConfig,
        folder: Path,
        budget: BudgetConfig,
        *,
        address: str | None = None,
        count_spent: bool = True,
    ) -> None:
        """Args:
        folder: of the ledger.
        budget: limits for this worker.
        address: in place of the base_url of the config's endpoints.
        count_spent: the ledger's earlier calls count towards `budget`.
        """
        self.config = config
        self._exit = ExitStack()
        if config.serve is not None:
            address = self._exit.enter_context(Server(config.serve)).base_url
        self.ledger = Ledger(folder)
        spent = self.ledger.account().spent if count_spent else NOTHING
        self._budget = Budget(budget, spent)
        keys = keys_of(config.endpoints, os.environ)
        self._clients = [
            (settings, self._client(settings, keys.get(settings.api_key_env or ""), address))
            for settings in config.endpoints
        ]

    def _client(self, settings: EndpointConfig, key: str | None, address: str | None) -> Client:
        endpoint = Endpoint(settings, key, address)
        return Client(endpoint, self.ledger, self._budget, give_up_after=self.config.give_up_after)

    def client(self, settings: EndpointConfig) -> Client:
        """The client of an endpoint of the config; explainer and judge share one where their settings are equal."""
        return next(client for known, client in self._clients if known == settings)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.ledger.close()
        self._exit.close()

    def run(self, tasks: Sequence[Task]) -> Iterator[Outcome]:
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
                        pending.add(pool.submit(self.do, task))
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

    def do(self, task: Task) -> Outcome:
        """One latent from label to answers."""
        inquiry = _Inquiry(self, task.latent)
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

    def __init__(self, worker: Worker, latent: int) -> None:
        self._worker, self._latent = worker, latent
        self._failures: Counter[str] = Counter()
        self._costs: list[Cost] = []
        self._n_known = 0

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
            self._n_known,
        )

    def _ask(self, settings: EndpointConfig, question: Question) -> Entry | None:
        answer = self._worker.client(settings).ask(question)
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
