"""The sections `label.llm.*` of the config: which endpoints, which latents, how much it may cost."""

from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from pipelines.section import Section

_OWN_FIELDS = frozenset({"model", "messages", "response_format", "temperature", "max_tokens", "stream", "n", "seed"})
"""Fields of a request that have a setting of their own, or must not be set."""


def _address(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("an address begins with http:// or https:// and names a host")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError(
            "an address holds no user, password, query or fragment; a key goes into the variable that `api_key_env` "
            "names"
        )
    return url.rstrip("/")


class EndpointConfig(Section):
    """A language model behind an OpenAI-compatible endpoint: vLLM, llama.cpp, Ollama, a hosted one."""

    base_url: str | None = None
    """Address up to and including the version, such as http://127.0.0.1:8000/v1. Without one, the worker's own server
    is asked: the one that `serve` starts, or that `servers` lists for it."""
    model: str = Field(min_length=1)
    """The model's name, as the endpoint knows it."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the API key. The key itself stands nowhere else."""
    response_format: Literal["auto", "json_schema", "json_object", "none"] = "auto"
    """How to ask for JSON: `auto` sends the schema and, where the endpoint rejects that, leaves it to the prompt.
    Answers are held against the schema either way."""
    temperature: float | None = Field(0.0, ge=0, le=2)
    """None sends none, for models that take none."""
    seed: int | None = Field(0, ge=0)
    """None sends none."""
    max_tokens: int = Field(400, gt=0)
    """Longest answer."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """Further fields of every request, such as chat_template_kwargs."""
    timeout_s: float = Field(60.0, gt=0)
    """Seconds for one whole request."""
    max_retries: int = Field(4, ge=0)
    """Repetitions of a request that timed out, was refused for now (429) or failed on the server's side (5xx)."""
    max_wait_s: float = Field(60.0, ge=0)
    """Longest wait before a repetition, also where the endpoint's Retry-After asks for more."""
    concurrency: int = Field(4, gt=0)
    """Requests at once."""
    price_in: float = Field(0.0, ge=0)
    """Money per million tokens of prompts."""
    price_out: float = Field(0.0, ge=0)
    """Money per million tokens of answers."""

    @field_validator("base_url")
    @classmethod
    def _plain_address(cls, url: str | None) -> str | None:
        return None if url is None else _address(url)

    @field_validator("api_key_env")
    @classmethod
    def _a_variable(cls, name: str | None) -> str | None:
        if name is not None and not (name.isidentifier() and name.upper() == name):
            raise ValueError("give the name of an environment variable, such as OPENAI_API_KEY, not a key")
        return name

    @field_validator("extra")
    @classmethod
    def _no_own_fields(cls, extra: dict[str, Any]) -> dict[str, Any]:
        taken = sorted(_OWN_FIELDS & set(extra))
        if taken:
            raise ValueError(f"{', '.join(taken)} cannot be set here: there are settings for what may vary")
        return extra

    @property
    def identity(self) -> dict[str, Any]:
        """What decides an answer, next to the prompt; an address does not, so that a server may move."""
        return {
            "model": self.model,
            "temperature": self.temperature,
            "seed": self.seed,
            "max_tokens": self.max_tokens,
            "extra": self.extra,
        }


class BudgetConfig(Section):
    """The most that a run may spend, over all attempts; None is no limit."""

    calls: int | None = Field(None, ge=0)
    """Requests that were or may have been billed."""
    tokens: int | None = Field(None, ge=0)
    """Tokens of prompts and answers."""
    money: float | None = Field(None, ge=0)
    """In the currency of the prices."""


class ServeConfig(Section):
    """A server that every worker starts for itself."""

    command: tuple[str, ...] = Field(min_length=1)
    """Program and arguments; {port} stands for a free port. For vLLM: [vllm, serve, MODEL, --port, "{port}"]."""
    startup_s: float = Field(900.0, gt=0)
    """Seconds until it must answer."""

    @field_validator("command")
    @classmethod
    def _has_port(cls, command: tuple[str, ...]) -> tuple[str, ...]:
        if not any("{port}" in part for part in command):
            raise ValueError("the command must say where its port goes: put {port} into an argument")
        return command


class LLMConfig(Section):
    """Labels by a language model, and their tests by a judge."""

    explainer: EndpointConfig | None = None
    """Writes labels. Without one, only the labels of others are judged."""
    judge: EndpointConfig | None = None
    """Tests labels, also those of others; by default the explainer."""
    latents: int | tuple[int, ...] | Literal["all"] = 100
    """So many live latents, drawn by seed; or these; or all live ones."""
    n_contexts: int = Field(12, gt=0)
    """Train contexts that the explainer sees of a latent."""
    positives: int = Field(20, gt=0)
    """Held-out windows with a firing that the judge sees of a latent, spread over the deciles of strength."""
    negatives: int = Field(10, gt=0)
    """Held-out windows without, of each kind."""
    fuzzed: int = Field(10, ge=0)
    """Windows with a firing that the judge sees once with the right tokens marked and once with wrong ones."""
    others: int = Field(20, ge=0)
    """Random other latents, on whose windows the label is tried as well: a label that fits those too says nothing."""
    neighbours: int = Field(5, ge=0)
    """The same for the latents with the most similar decoder rows."""
    windows_per_other: int = Field(2, gt=0)
    """Windows of each of these."""
    windows_per_call: int = Field(8, gt=0)
    """Windows in one question to the judge."""
    budget: BudgetConfig = BudgetConfig()
    give_up_after: int = Field(8, gt=0)
    """Requests in a row without an answer, repetitions counted as one, after which the endpoint counts as down."""
    n_workers: int = Field(0, ge=0)
    """Ray actors among which latents are shared out; 0 asks from the driver."""
    gpus_per_worker: float = Field(0, ge=0)
    """GPUs an actor, for the server that it starts."""
    servers: tuple[str, ...] = ()
    """Addresses of equal servers, shared out over the workers in turn."""
    serve: ServeConfig | None = None
    """A server that each worker starts; the driver, if there are none."""

    @field_validator("servers")
    @classmethod
    def _addresses(cls, servers: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_address(url) for url in servers)

    @field_validator("latents")
    @classmethod
    def _latents(cls, latents: int | tuple[int, ...] | str) -> int | tuple[int, ...] | str:
        if isinstance(latents, int) and latents < 1:
            raise ValueError("give at least one latent, or drop the section")
        if isinstance(latents, tuple) and (len(set(latents)) < len(latents) or min(latents, default=-1) < 0):
            raise ValueError("a list of latents has each once, none negative, and is not empty")
        return latents

    @model_validator(mode="after")
    def _has_addresses(self) -> "LLMConfig":
        if self.explainer is None and self.judge is None:
            raise ValueError("give an explainer, a judge, or both")
        lacking = [
            name for name, it in (("explainer", self.explainer), ("judge", self.judge)) if it and not it.base_url
        ]
        if self.serve is not None and self.servers:
            raise ValueError("give `serve`, to start servers, or `servers`, that are running")
        if lacking and self.serve is None and not self.servers:
            raise ValueError(f"{' and '.join(lacking)} needs a base_url, or `servers`, or `serve` to start one")
        return self

    @property
    def judging(self) -> EndpointConfig:
        """The endpoint that judges."""
        chosen = self.judge or self.explainer
        assert chosen is not None
        return chosen

    @property
    def endpoints(self) -> tuple[EndpointConfig, ...]:
        """Those in use."""
        return tuple(endpoint for endpoint in (self.explainer, self.judge) if endpoint is not None)
