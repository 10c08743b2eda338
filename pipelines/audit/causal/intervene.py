"""Interventions at a hook on a fixed set of prompts: layers before it run once, what follows runs for each of them.

    bench = Bench(model, dictionary, tokens)
    push = bench.push(latent, 0.0)                       # f' - f at every token: switch the latent off
    clean, changed = bench.clean(outcome), bench.run([bench.delta(push, dictionary.W_dec[latent])], outcome)

An intervention is x' = x + (f' - f) d with d the latent's decoder direction: the error term stays as it is, and so does
the first position, which is an attention sink. A control gets the same push f' - f along another direction of the same
norm, so that it differs from the candidate in nothing but where it points.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from itertools import islice
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipelines.audit.causal.outcomes import Outcome
from pipelines.prefix import Prefix
from sae import Dictionary
from sae.hooks import replace_activations

Delta = Float[Tensor, "n_prompts seq d_in"]


class _Reached(Exception):
    """Ends a forward pass at the hook of an outcome."""


class Bench:
    """Prompts of equal length, ready for interventions at a dictionary's hook."""

    def __init__(
        self, model: Any, dictionary: Dictionary, tokens: Int[Tensor, "n_prompts seq"], *, at_once: int = 8
    ) -> None:
        """Runs the layers up to the hook once.

        Args:
            model: a causal language model of Transformers in evaluation mode.
            at_once: interventions a forward pass.
        """
        self.model, self.tokens, self.at_once = model, tokens, at_once
        self.hook_name = dictionary.required_hook_name
        self._sae = dictionary
        self._prefix = Prefix(model, [self.hook_name])
        seen: list[Tensor] = []
        with (
            torch.inference_mode(),
            self._prefix.record(),
            suppress(_Reached),
            replace_activations(model, self.hook_name, _taking(seen)),
        ):
            self._forward(1, last_only=True)
        self.x: Float[Tensor, "n_prompts seq d_in"] = seen[0]
        self._latents: dict[int, Float[Tensor, "n_prompts seq"]] = {}

    def latent(self, number: int) -> Float[Tensor, "n_prompts seq"]:
        """A latent's activations on the prompts, without an intervention."""
        if number not in self._latents:
            with torch.inference_mode():
                self._latents[number] = self._sae.encode(self.x.float(), latents=[number])[..., 0]
        return self._latents[number]

    def push(self, number: int, value: float, *, only_where_active: bool = False) -> Float[Tensor, "n_prompts seq"]:
        """f' - f for clamping a latent to `value` (0 switches it off) at every token but the first."""
        f = self.latent(number)
        change = value - f
        if only_where_active:
            change = change * (f > 0)
        change = change.clone()
        change[:, 0] = 0
        return change

    def delta(self, push: Float[Tensor, "n_prompts seq"], direction: Float[Tensor, " d_in"]) -> Delta:
        """What an intervention adds at the hook."""
        return push[..., None].to(self.x) * direction.to(self.x)

    def clean(self, outcome: Outcome) -> Float[Tensor, "n_prompts *_"]:
        """The outcome without an intervention."""
        return next(self.run([torch.zeros_like(self.x)], outcome))

    def run(self, deltas: Iterable[Delta], outcome: Outcome) -> Iterator[Float[Tensor, "n_prompts *_"]]:
        """The outcome under each intervention, in order; consumed lazily, `at_once` of them a pass."""
        waiting = iter(deltas)
        while group := list(islice(waiting, self.at_once)):
            seen = self._changed(torch.cat(group), len(group), outcome)
            found = outcome.read(seen)
            yield from found.reshape(len(group), len(self.tokens), *found.shape[1:])

    def _changed(self, delta: Tensor, copies: int, outcome: Outcome) -> Float[Tensor, "batch seq width"]:
        """What the outcome reads when `delta` is added at the hook of `copies` copies of the prompts."""
        seen: list[Tensor] = []
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            stack.enter_context(self._prefix.replay(copies))
            stack.enter_context(replace_activations(self.model, self.hook_name, lambda x: x + delta))
            if outcome.hook_name is not None:
                stack.enter_context(suppress(_Reached))
                stack.enter_context(replace_activations(self.model, outcome.hook_name, _taking(seen)))
            logits = self._forward(copies, last_only=outcome.last_only)
            seen.append(logits)
        return seen[0]

    def _forward(self, copies: int, *, last_only: bool) -> Float[Tensor, "batch seq vocab"]:
        keep = {"logits_to_keep": 1} if last_only else {}
        logits: Tensor = self.model(input_ids=self.tokens.repeat(copies, 1), use_cache=False, **keep).logits
        return logits


def _taking(seen: list[Tensor]) -> Callable[[Tensor], None]:
    """A hook that keeps the activations and ends the pass."""

    def take(x: Tensor) -> None:
        seen.append(x)
        raise _Reached

    return take
