"""A question with everything around it: the ledger first, then the budget, then the endpoint, again if need be.

An answer is whatever the model said, good or bad; asked again it would say the same and be paid twice. Only requests
that came to nothing are repeated, after waiting longer each time, and at least as long as the endpoint asks for.
"""

import random
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from pipelines.errors import RunError
from pipelines.labels.llm.budget import Budget
from pipelines.labels.llm.endpoint import REPEATED, Attempt, Endpoint, Question
from pipelines.labels.llm.ledger import NOTHING, Cost, Entry, Ledger, cost_of, key_of

_FIRST_WAIT_S = 0.5


class EndpointDown(RunError):
    """One request after another came to nothing. What was answered is kept."""


class Answer(NamedTuple):
    """What a question came to."""

    entry: Entry | None
    """None: nothing came back."""
    reason: str | None
    """Why not."""
    paid_now: bool
    """False for what the ledger knew."""


class Client:
    """Asks one endpoint; may be used from several threads."""

    def __init__(
        self,
        endpoint: Endpoint,
        ledger: Ledger,
        *,
        give_up_after: int = 8,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Args: give_up_after: questions in a row that came to nothing after which the endpoint counts as down."""
        self._endpoint, self._ledger, self._sleep = endpoint, ledger, sleep
        self._give_up_after, self._failed, self._lock = give_up_after, 0, threading.Lock()
        self._down: str | None = None
        self._jitter = random.Random(0)

    @property
    def model(self) -> str:
        """The model's name."""
        return self._endpoint.settings.model

    def ask(self, question: Question, budget: Budget) -> Answer:
        """The answer, from the ledger or the endpoint.

        Raises:
            BudgetSpent: the budget does not suffice for another call.
            EndpointDown: see `give_up_after`.
            RunError: the endpoint takes no questions at all.
        """
        settings = self._endpoint.settings
        key = key_of(settings, question)
        found = self._ledger.find(key)
        if found is not None:
            return Answer(found, None, False)
        bound = cost_of(settings, *self._endpoint.bound(question))
        for repetition in range(settings.max_retries + 1):
            if self._down is not None:
                raise EndpointDown(self._down)
            attempt = self._attempt(key, question, bound, budget)
            if attempt.reason is None:
                with self._lock:
                    self._failed = 0
                return Answer(self._ledger.find(key), None, True)
            if attempt.reason not in REPEATED:
                break
            if repetition < settings.max_retries:
                self._sleep(self._wait_s(repetition, attempt.wait_s))
        self._count_failure(attempt)
        return Answer(None, attempt.reason, True)

    def _attempt(self, key: str, question: Question, bound: Cost, budget: Budget) -> Attempt:
        budget.reserve(bound)
        cost = NOTHING
        try:
            number = self._ledger.send(key, question.role, bound)
            try:
                attempt = self._endpoint.attempt(question)
            except RunError as error:
                self._ledger.settle(number, key, self._endpoint.settings, Attempt("no_endpoint", detail=str(error)))
                raise
            cost = self._ledger.settle(number, key, self._endpoint.settings, attempt)
            return attempt
        finally:
            budget.settle(bound, cost)

    def _count_failure(self, attempt: Attempt) -> None:
        with self._lock:
            self._failed += 1
            if self._failed >= self._give_up_after:
                self._down = (
                    f"{self._failed} questions in a row to {self.model} came to nothing (the last: {attempt.reason}, "
                    f"{attempt.detail}). What was answered is kept; mend the endpoint and rerun to continue"
                )
                raise EndpointDown(self._down)

    def _wait_s(self, repetition: int, asked: float | None) -> float:
        with self._lock:
            backoff: float = _FIRST_WAIT_S * 2**repetition * self._jitter.uniform(0.5, 1.0)
        return min(self._endpoint.settings.max_wait_s, max(backoff, asked or 0.0))
