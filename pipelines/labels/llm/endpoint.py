"""The protocol of /chat/completions: one question out, one answer, refusal or reason for its absence back.

Strict schema: where the endpoint supports it, the JSON schema goes along (`response_format`); the answer is held
against the same schema here in any case. An endpoint that rejects the schema is asked without from then on.
"""

import json
import re
import threading
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

from pipelines.errors import RunError, UsageError
from pipelines.labels.llm.settings import EndpointConfig
from pipelines.labels.llm.transport import Reply, TransportError, request

REPEATED = frozenset({"timeout", "unreachable", "rate_limited", "server_error", "no_completion"})
"""Reasons for which the same request is worth repeating."""
_TEXT_OF_A_REJECTION = 300
_BYTES_PER_TOKEN = 2.5
"""Fewer than any tokenizer needs for plain text, so that estimates are upper bounds there."""
_OVERHEAD_TOKENS = 64


class Question(NamedTuple):
    """What is asked."""

    role: str
    """explain, detect, fuzz or mismatch, for the account."""
    messages: tuple[tuple[str, str], ...]
    """Pairs of role and text."""
    schema: Mapping[str, Any]
    """JSON schema of the answer."""


class Attempt(NamedTuple):
    """What one request came to."""

    reason: str | None
    """None: there is a completion. Else why there is none: timeout, unreachable, rate_limited, server_error,
    no_completion (a reply that is none) or rejected."""
    text: str = ""
    refusal: bool = False
    """The model, or a filter before it, would not answer."""
    finish: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    estimated: bool = False
    """The endpoint did not count tokens, or the request may have been billed without our seeing a reply."""
    billed: bool = False
    """It was, or may have been."""
    wait_s: float | None = None
    """As the endpoint asked."""
    detail: str = ""


class Endpoint:
    """One endpoint; may be used from several threads."""

    def __init__(self, settings: EndpointConfig, api_key: str | None, server: str | None = None) -> None:
        """Args: server: where to ask if the settings have no address of their own."""
        address = settings.base_url or server
        if address is None:
            raise ValueError("an endpoint needs an address: give base_url")
        self.settings, self._url, self._key = settings, f"{address.rstrip('/')}/chat/completions", api_key
        self._slots = threading.BoundedSemaphore(settings.concurrency)
        self._format = "json_schema" if settings.response_format == "auto" else settings.response_format
        self._may_drop = settings.response_format == "auto"

    def bound(self, question: Question) -> tuple[int, int]:
        """The most tokens of prompt and answer that this question should take."""
        sent = sum(len(text.encode("utf-8", "replace")) for _, text in question.messages) + len(
            json.dumps(question.schema)
        )
        return int(sent / _BYTES_PER_TOKEN) + _OVERHEAD_TOKENS, self.settings.max_tokens

    def attempt(self, question: Question) -> Attempt:
        """Ask once.

        Raises:
            RunError: the endpoint will not take any question: wrong key, wrong model, wrong address.
        """
        with self._slots:
            used = self._format
            found = self._once(question, used)
            if found.reason == "rejected" and self._may_drop and used != "none":
                again = self._once(question, "none")
                if again.reason is None:
                    self._format = "none"
                    return again
            return found

    def _once(self, question: Question, response_format: str) -> Attempt:
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        settings = self.settings
        body: dict[str, Any] = {
            "model": settings.model,
            "messages": [{"role": role, "content": text} for role, text in question.messages],
            "max_tokens": settings.max_tokens,
            "stream": False,
            **settings.extra,
        }
        body |= {name: value for name in ("temperature", "seed") if (value := getattr(settings, name)) is not None}
        if response_format == "json_schema":
            schema = {"name": question.role, "strict": True, "schema": dict(question.schema)}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif response_format == "json_object":
            body["response_format"] = {"type": "json_object"}
        try:
            reply = request("POST", self._url, headers, body, timeout_s=settings.timeout_s)
        except TransportError as error:
            return self._lost(question, error.reason, str(error), sent=error.sent)
        return self._read(question, reply)

    def _lost(self, question: Question, reason: str, detail: str, *, sent: bool) -> Attempt:
        """No reply. What was sent may have been worked on, and is counted at its upper bound."""
        prompt, completion = self.bound(question) if sent else (0, 0)
        return Attempt(
            reason,
            prompt_tokens=prompt,
            completion_tokens=completion,
            estimated=sent,
            billed=sent,
            detail=self._without_key(detail),
        )

    def _read(self, question: Question, reply: Reply) -> Attempt:
        if reply.status == 200:
            return self._completion(question, reply)
        detail = f"HTTP {reply.status}: {self._without_key(_text(reply.body))}"
        if reply.status in (401, 403, 404) or 300 <= reply.status < 400:
            raise RunError(
                f"the endpoint {self._url} does not take questions to {self.settings.model} ({detail}); check "
                "base_url, model and the variable that api_key_env names"
            )
        if reply.status == 429 or reply.status in (408, 409, 425):
            return Attempt("rate_limited", wait_s=_retry_after(reply.headers), detail=detail)
        if reply.status >= 500:
            return Attempt("server_error", wait_s=_retry_after(reply.headers), detail=detail)
        return Attempt("rejected", detail=detail)

    def _completion(self, question: Question, reply: Reply) -> Attempt:
        try:
            body = json.loads(reply.body)
            choice = body["choices"][0]
            message = choice["message"]
            text, refusal = message.get("content") or "", message.get("refusal")
            if not isinstance(text, str):
                raise TypeError
            finish = str(choice.get("finish_reason") or "")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return self._lost(question, "no_completion", f"HTTP 200: {_text(reply.body)}", sent=True)
        text = self._without_key(text)
        counted = _usage(body.get("usage"))
        guess = self.bound(question)[0], int(len(text.encode("utf-8", "replace")) / _BYTES_PER_TOKEN) + 1
        prompt, completion = counted or guess
        return Attempt(
            None,
            text=text,
            refusal=bool(refusal) or finish == "content_filter",
            finish=finish,
            prompt_tokens=prompt,
            completion_tokens=completion,
            estimated=counted is None,
            billed=True,
        )

    def _without_key(self, text: str) -> str:
        """Servers quote the key that they do not like."""
        return text.replace(self._key, "***") if self._key else text


def _text(body: bytes) -> str:
    return re.sub(r"\s+", " ", body[: 4 * _TEXT_OF_A_REJECTION].decode("utf-8", "replace"))[:_TEXT_OF_A_REJECTION]


def _usage(usage: Any) -> tuple[int, int] | None:
    """Tokens of prompt and answer, where the endpoint counted them."""
    if not isinstance(usage, dict):
        return None
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if type(prompt) is not int or type(completion) is not int or min(prompt, completion) < 0:
        return None
    return prompt, completion


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds; the header holds them or a date (RFC 9110, section 10.2.3)."""
    value = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", value):
        return float(value)
    try:
        date = parsedate_to_datetime(value)
    except (ValueError, TypeError):
        return None
    date = date if date.tzinfo else date.replace(tzinfo=UTC)
    return max(0.0, (date - datetime.now(UTC)).total_seconds())


def keys_of(endpoints: Sequence[EndpointConfig], environment: Mapping[str, str]) -> dict[str, str]:
    """The API keys of the endpoints, by variable.

    Raises:
        UsageError: a variable is not set.
    """
    names = dict.fromkeys(e.api_key_env for e in endpoints if e.api_key_env)
    missing = [name for name in names if not environment.get(name)]
    if missing:
        raise UsageError(f"label.llm: the variable {', '.join(missing)} is not set: export it, with the API key in it")
    return {name: environment[name] for name in names}
