"""Prompts of equal length for interventions, and a probe of the concept at a later layer."""

import hashlib
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from pipelines.audit.causal.outcomes import Probe
from pipelines.audit.result import AuditResult
from pipelines.encode import passages_of
from pipelines.errors import UsageError
from pipelines.models import LanguageModel

Tokens = Int[Tensor, "n_prompts seq"]
Source = Literal["ood", "unused", "confirm"]


class Prompts(NamedTuple):
    """Of one concept."""

    positive: Tokens
    """Unseen texts with the concept."""
    source: Source
    fit_positive: Tokens
    """Of the discover and tune parts, for the probe and the unit of doses."""
    fit_negative: Tokens


def cut_prompts(
    lm: LanguageModel, texts: Sequence[str], *, n: int, n_tokens: int, prepend_bos: bool
) -> Int[Tensor, "n_found seq"]:
    """The first tokens of the first `n` texts that are long enough."""
    limit = getattr(lm.model.config, "max_position_embeddings", None)
    if limit is not None and n_tokens > limit:
        raise UsageError(
            f"audit.causal.n_tokens is {n_tokens}, but {lm.model_id} reads at most {limit} tokens: lower it"
        )
    found = passages_of(lm, texts, max_tokens=n_tokens, prepend_bos=prepend_bos)
    ids = [passage.ids for passage in found if len(passage.ids) == n_tokens][:n]
    return torch.tensor(ids, dtype=torch.long, device=lm.device).reshape(-1, n_tokens)


def prompts_of(
    lm: LanguageModel,
    result: AuditResult,
    text_of: dict[str, str],
    unused: Sequence[str],
    *,
    n: int,
    n_fit: int,
    n_tokens: int,
    prepend_bos: bool,
) -> Prompts:
    """Prompts of one concept.

    Args:
        text_of: the examples' texts by their digest.
        unused: texts with the concept that the audit did not read.
    Raises:
        UsageError: too few texts of that length.
    """

    def of(part: Sequence[str], *, positive: bool, at_most: int) -> Tokens:
        texts = [
            text_of[e.digest]
            for e in result.examples
            if e.part in part and (e.role == "positive") == positive and e.digest in text_of
        ]
        return cut_prompts(lm, texts, n=at_most, n_tokens=n_tokens, prepend_bos=prepend_bos)

    fit = (
        of(("discover", "tune"), positive=True, at_most=n_fit),
        of(("discover", "tune"), positive=False, at_most=n_fit),
    )
    sources: tuple[tuple[Source, Tokens], ...] = (
        ("ood", of(("ood",), positive=True, at_most=n)),
        ("unused", cut_prompts(lm, unused, n=n, n_tokens=n_tokens, prepend_bos=prepend_bos)),
        ("confirm", of(("confirm",), positive=True, at_most=n)),
    )
    source, positive = next(
        (pair for pair in sources if len(pair[1]) >= n), max(sources, key=lambda pair: len(pair[1]))
    )
    least = min(len(positive), *(len(tokens) for tokens in fit))
    if least < 4:
        raise UsageError(
            f"concept {result.concept.name}: too few of its texts have {n_tokens} tokens, {least} where 4 are needed. "
            "Lower audit.causal.n_tokens, or give longer texts."
        )
    return Prompts(positive, source, *fit)


def later_hook(hook_name: str, n_later: int, n_layers: int) -> str:
    """The output of a layer further up. Raises: UsageError if there is none."""
    found = re.search(r"\.(\d+)(?=\.|:|$)", hook_name)
    if found is None or int(found.group(1)) + 1 >= n_layers:
        raise UsageError(
            f"no layer comes after {hook_name}, so no probe can read there: set audit.causal.outcome to tokens"
        )
    layer = min(int(found.group(1)) + n_later, n_layers - 1)
    return f"{hook_name[: found.start()]}.{layer}"


def fit_probe(lm: LanguageModel, hook_name: str, positive: Tokens, negative: Tokens) -> Probe:
    """The difference of the class means, scaled so that its scores have unit variance within a class."""

    def pooled(tokens: Tokens) -> Tensor:
        position = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return lm.capture(tokens, position, [hook_name])[hook_name].float()[:, 1:].mean(dim=1)

    a, b = pooled(positive), pooled(negative)
    weight = a.mean(0) - b.mean(0)
    scores = torch.cat([(a - a.mean(0)) @ weight, (b - b.mean(0)) @ weight])
    weight = weight / scores.std().clamp_min(1e-12)
    return Probe(hook_name, weight, -float((a.mean(0) + b.mean(0)) @ weight) / 2)


def digest_of(tokens: Tokens) -> list[str]:
    """Of each prompt: a plan names them without their text."""
    return [hashlib.sha256(np.asarray(row, dtype=np.int64).tobytes()).hexdigest()[:16] for row in tokens.tolist()]


def encoder_length(model: Any) -> int:
    """Layers of a model."""
    return int(model.config.num_hidden_layers)
