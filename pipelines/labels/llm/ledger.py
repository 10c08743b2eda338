"""Every call that was ever made for a run: what it asked (by hash), what came back, what it cost.

    llm/calls-*.jsonl      one file per writer, only ever appended to
        {"sent": ID, "key": …, "role": …, "cost": […]}    before a request leaves, with the most that it may cost
        {"settled": ID, "key": …, "cost": […], …}         when it came to something; with "text" if that is an answer

A question whose answer is here is not asked again, by whatever process: the file is the cache. A request that was
under way when its process was killed has no second line; it may have been billed, and counts at its upper bound. The
line that a kill cut in two is skipped. Keys are hashes of model, settings, prompt and schema, so a changed prompt is a
new question.
"""

import hashlib
import json
import os
import threading
import uuid
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from pipelines.errors import RunError
from pipelines.labels.llm.endpoint import Attempt, Question
from pipelines.labels.llm.settings import EndpointConfig
from pipelines.rundir import now


class Cost(NamedTuple):
    """What calls cost, or may have."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    money: float = 0.0

    @property
    def tokens(self) -> int:
        """Of prompts and answers."""
        return self.prompt_tokens + self.completion_tokens

    def plus(self, other: "Cost", sign: int = 1) -> "Cost":
        """The sum; with `sign` -1 the difference."""
        return Cost(
            self.calls + sign * other.calls,
            self.prompt_tokens + sign * other.prompt_tokens,
            self.completion_tokens + sign * other.completion_tokens,
            self.money + sign * other.money,
        )


NOTHING = Cost()


def total(costs: Iterable[Cost]) -> Cost:
    """The sum of costs."""
    result = NOTHING
    for cost in costs:
        result = result.plus(cost)
    return result


def cost_of(settings: EndpointConfig, prompt_tokens: int, completion_tokens: int, *, calls: int = 1) -> Cost:
    """The price of tokens at an endpoint."""
    money = (prompt_tokens * settings.price_in + completion_tokens * settings.price_out) / 1e6
    return Cost(calls, prompt_tokens, completion_tokens, money)


def key_of(settings: EndpointConfig, question: Question) -> str:
    """Hash of all that decides an answer."""
    asked = [settings.identity, settings.response_format, question.messages, question.schema]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


class Entry(NamedTuple):
    """An answer that was paid for."""

    text: str
    refusal: bool
    finish: str
    cost: Cost
    estimated: bool
    model: str
    at: str
    """When it came, UTC, ISO 8601."""


class Account(NamedTuple):
    """Sums over a ledger."""

    spent: Cost
    """All that was or may have been billed."""
    n_answers: int
    n_lost: int
    """Requests without a reply that may have been billed: timed out, cut off, under way when a process was killed."""
    n_estimated: int
    """Calls whose tokens the endpoint did not count."""
    reasons: dict[str, int]
    """Requests that came to nothing, by reason."""


class Ledger:
    """The ledger of one run, as one process sees and extends it; may be used from several threads."""

    def __init__(self, folder: Path) -> None:
        """Reads what is there; writes nothing until the first call.

        Raises:
            RunError: a line that is no record, and is not the last of its file.
        """
        self._folder = folder
        self._path = folder / f"calls-{uuid.uuid4().hex[:12]}.jsonl"
        self._lock = threading.Lock()
        self._file: TextIO | None = None
        self._answers: dict[str, Entry] = {}
        self._open: dict[str, Cost] = {}
        self._settled: list[Cost] = []
        self._reasons: Counter[str] = Counter()
        self._n_lost = self._n_estimated = 0
        for path in sorted(folder.glob("calls-*.jsonl")):
            self._read(path)

    def find(self, key: str) -> Entry | None:
        """The answer to a question, if it was ever given."""
        with self._lock:
            return self._answers.get(key)

    def send(self, key: str, role: str, bound: Cost) -> str:
        """Note that a request is about to leave; returns its number."""
        number = uuid.uuid4().hex[:16]
        self._write({"sent": number, "key": key, "role": role, "cost": list(bound)})
        return number

    def settle(self, number: str, key: str, settings: EndpointConfig, attempt: Attempt) -> Cost:
        """Note what the request came to; durable on return. Returns what it cost."""
        cost = cost_of(settings, attempt.prompt_tokens, attempt.completion_tokens) if attempt.billed else NOTHING
        record: dict[str, Any] = {"settled": number, "key": key, "cost": list(cost), "estimated": attempt.estimated}
        if attempt.reason is None:
            record |= {"text": attempt.text, "refusal": attempt.refusal, "finish": attempt.finish}
            record |= {"model": settings.model, "at": now()}
        else:
            record |= {"reason": attempt.reason, "detail": attempt.detail}
        self._write(record, durable=True)
        return cost

    def account(self) -> Account:
        """Sums over all calls that this process knows of."""
        with self._lock:
            return Account(
                spent=total([*self._settled, *self._open.values()]),
                n_answers=len(self._answers),
                n_lost=self._n_lost + len(self._open),
                n_estimated=self._n_estimated + len(self._open),
                reasons=dict(self._reasons),
            )

    def reread(self) -> "Ledger":
        """The same ledger with what other processes have written since."""
        self.close()
        return Ledger(self._folder)

    def close(self) -> None:
        """Close the file; a later call opens another."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None
                self._path = self._folder / f"calls-{uuid.uuid4().hex[:12]}.jsonl"

    def _write(self, record: dict[str, Any], *, durable: bool = False) -> None:
        line = json.dumps(record) + "\n"
        with self._lock:
            if self._file is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("a", encoding="utf-8")
            self._file.write(line)
            self._file.flush()
            if durable:
                os.fsync(self._file.fileno())
            self._take(record)

    def _read(self, path: Path) -> None:
        lines = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            if not line:
                continue
            try:
                self._take(json.loads(line))
            except (ValueError, LookupError, TypeError) as error:
                if number == len(lines):
                    return  # cut off by a kill: a whole line ends with a line break
                raise RunError(
                    f"{path}, line {number} is damaged ({error}): remove the line; what it recorded is asked again"
                ) from error

    def _take(self, record: dict[str, Any]) -> None:
        cost = Cost(*record["cost"])
        if "sent" in record:
            self._open[record["sent"]] = cost
            return
        self._open.pop(record["settled"], None)
        self._settled.append(cost)
        if "text" in record:
            entry = Entry(
                str(record["text"]),
                bool(record["refusal"]),
                str(record["finish"]),
                cost,
                bool(record["estimated"]),
                str(record["model"]),
                str(record["at"]),
            )
            self._answers[record["key"]] = entry
            self._n_estimated += entry.estimated
        else:
            self._reasons[record["reason"]] += 1
            self._n_lost += cost.calls
            self._n_estimated += cost.calls
