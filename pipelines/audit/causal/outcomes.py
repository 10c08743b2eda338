"""What an intervention is judged by, without a judge model: next-token log-odds, a probe further up, or a function.

`side_effects` reads the price of an intervention on ordinary text: how far the predictions move, and how much worse
they get.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipelines.errors import UsageError


class Outcome(Protocol):
    """Reads one number per prompt (or several, along further dimensions) from a forward pass."""

    @property
    def hook_name(self) -> str | None:
        """Where it reads; the pass ends there. None: the logits."""

    @property
    def last_only(self) -> bool:
        """Whether logits of the last position suffice, [batch, 1, vocab]."""

    def read(self, seen: Float[Tensor, "batch seq width"]) -> Float[Tensor, "batch *_"]:
        """`batch` is a whole number of copies of the prompts, in their order."""


@dataclass(frozen=True)
class TokenOdds:
    """log p / (1 - p) of the event that the next token is one of some tokens."""

    token_ids: tuple[int, ...]
    hook_name: None = None
    last_only: bool = True

    def read(self, seen: Float[Tensor, "batch seq vocab"]) -> Float[Tensor, " batch"]:
        """From the logits of the last position."""
        logits = seen[:, -1].float()
        chosen = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        chosen[list(self.token_ids)] = True
        inside = logits.masked_fill(~chosen, -torch.inf).logsumexp(-1)
        return inside - logits.masked_fill(chosen, -torch.inf).logsumexp(-1)


@dataclass(frozen=True, eq=False)
class Probe:
    """A linear probe of the concept at a later hook: mean over positions after the first of x · weight + bias."""

    hook_name: str
    weight: Float[Tensor, " width"]
    bias: float = 0.0
    last_only: bool = False

    def read(self, seen: Float[Tensor, "batch seq width"]) -> Float[Tensor, " batch"]:
        """The first position, an attention sink, is left out."""
        return (seen[:, 1:].float() @ self.weight.to(seen.device).float()).mean(dim=1) + self.bias


@dataclass(frozen=True)
class Judge:
    """A user's function of the logits of the last position, [batch, vocab] → [batch]."""

    function: Callable[[Tensor], Any]
    hook_name: None = None
    last_only: bool = True

    def read(self, seen: Float[Tensor, "batch seq vocab"]) -> Float[Tensor, " batch"]:
        """Raises: UsageError if the function raises, or gives another shape or NaN."""
        try:
            found = torch.as_tensor(self.function(seen[:, -1].float()))
        except Exception as error:
            raise UsageError(f"The outcome function raised {type(error).__name__}: {error}. Correct it.") from error
        if tuple(found.shape) != (len(seen),) or not bool(torch.isfinite(found.float()).all()):
            raise UsageError(
                f"The outcome function must give {len(seen)} finite numbers, one per prompt, got shape "
                f"{tuple(found.shape)}{', some not finite' if tuple(found.shape) == (len(seen),) else ''}. Correct it."
            )
        return found.float()


@dataclass(frozen=True, eq=False)
class SideEffects:
    """KL(clean ‖ changed) and cross-entropy, in nats a token, of prompts whose clean logits are known: [batch, 2]."""

    tokens: Int[Tensor, "n_prompts seq"]
    clean: Float[Tensor, "n_prompts seq vocab"]
    """Logits without an intervention."""
    hook_name: None = None
    last_only: bool = False

    def read(self, seen: Float[Tensor, "batch seq vocab"]) -> Float[Tensor, "batch 2"]:
        """One prompt at a time: a vocabulary is large."""
        return torch.stack([self._one(i % len(self.tokens), logits) for i, logits in enumerate(seen)])

    def _one(self, prompt: int, logits: Float[Tensor, "seq vocab"]) -> Float[Tensor, " 2"]:
        changed = logits.float().log_softmax(-1)
        before = self.clean[prompt].float().log_softmax(-1)
        kl = (before.exp() * (before - changed)).sum(-1)[1:].mean()
        ce = -changed[:-1].gather(-1, self.tokens[prompt, 1:, None]).mean()
        return torch.stack([kl, ce])


def single_tokens(tokenizer: Any, words: Sequence[str]) -> tuple[int, ...]:
    """The token ids of outcome words. Raises: UsageError for a word that is several tokens or none."""
    ids = []
    for word in words:
        found = tokenizer.encode(word, add_special_tokens=False)
        if len(found) != 1:
            raise UsageError(
                f"The outcome token {word!r} is {len(found)} tokens of this model. Give a single one; a leading space "
                "often matters."
            )
        ids.append(int(found[0]))
    return tuple(dict.fromkeys(ids))
