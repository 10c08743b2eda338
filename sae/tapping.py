"""Attach an SAE to a language model: read its latents, splice its reconstruction in, edit latents.

    with attach(model, sae, "model.layers.8", edits=[Clamp(17, 4.0)]) as tap:
        model(**inputs)
    tap.latents

It works in a forward pass and in `generate`, and several at once: of two at one hook, the later receives what the
earlier left. Hooks are removed when the block ends, whatever happens in it; nothing is stored on the model.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.base import SAE
from sae.edits import Edit, Excluded, edited, excluded_tokens
from sae.hooks import replace_activations
from sae.naming import torch_module
from sae.tokens import Tokens, Watch, watch_tokens


@dataclass(eq=False)
class _Pass:
    """What one forward pass left."""

    x: Float[Tensor, "batch seq d_in"]
    tokens: Tokens
    excluded: Bool[Tensor, "*batch seq"] | None
    shape: tuple[int, ...]
    """[batch, seq], or what a model that was called without token ids has in their place."""
    latents: Float[Tensor, "batch seq d_sae"] | None = None

    @property
    def counted(self) -> Bool[Tensor, "batch seq"]:
        if self.excluded is None:
            return torch.ones(self.tokens.shape, dtype=torch.bool, device=self.x.device)
        return ~self.excluded.expand(self.tokens.shape)


class Tap:
    """What an attached SAE saw of the sequences that the model processed last, [batch, seq, …].

    A pass from the start replaces what was seen; one that continues a KV cache, as in `generate`, is appended, so that
    `tap.latents[:, column]` always belongs to the token of that column. Tensors are detached from the graph unless
    `attach` was called with `grad=True`; then they are those of the last pass.
    """

    def __init__(self, sae: SAE) -> None:
        self._sae = sae
        self._passes: list[_Pass] = []
        self._error: Tensor | None = None

    @property
    def x(self) -> Float[Tensor, "*batch d_in"]:
        """The model's own activations before any change by this attachment; of one pass, no copy of them.

        Raises: ValueError if nothing was read yet.
        """
        return self._joined([one.x for one in self._seen()])

    @property
    def latents(self) -> Float[Tensor, "*batch d_sae"]:
        """Latent activations of `x` before any edit, computed on first use; with `grad=True`, a node of the graph."""
        for one in self._seen():
            if one.latents is None:
                with torch.no_grad():
                    one.latents = self._sae.encode(one.x)
        return self._joined([one.latents for one in self._passes if one.latents is not None])

    @property
    def error(self) -> Float[Tensor, "*batch d_out"]:
        """What the reconstruction leaves out, as a node of the graph: only with `grad=True` and the error kept."""
        if self._error is None:
            raise ValueError(
                "The error is a node of the graph only where it is kept: attach with grad=True and without "
                'splice=True, or with error="keep", and call the model.'
            )
        return self._error

    @property
    def counted(self) -> Bool[Tensor, "*batch"]:
        """The tokens that are neither padding nor excluded."""
        return self._joined([one.counted for one in self._seen()])

    def mean(self) -> Float[Tensor, " d_sae"]:
        """Mean activation of every latent over the counted tokens. Raises: ValueError if no token counts."""
        latents, counted = self.latents, self.counted
        if not bool(counted.any()):
            raise ValueError("A mean needs a token, but all that was seen is padding or excluded. Pass longer texts.")
        return latents[counted].mean(dim=0)

    def _seen(self) -> list[_Pass]:
        if not self._passes:
            raise ValueError(
                "Nothing was read yet: the hooked module has not run. Call the model inside the `with` block first."
            )
        return self._passes

    def _joined(self, parts: list[Tensor]) -> Tensor:
        if len(parts) > 1:
            return torch.cat(parts, dim=1)
        (part,), (one,) = parts, self._passes
        # A view of the same size would hide the gradient of a node.
        return part if one.shape == one.tokens.shape else part.reshape(*one.shape, *part.shape[2:])

    def _see(self, one: _Pass, keep: bool) -> None:
        end = self._passes[-1].tokens.start + self._passes[-1].tokens.shape[1] if self._passes else -1
        continues = keep and one.tokens.start == end and one.x.shape[0] == self._passes[-1].x.shape[0]
        self._passes = [*self._passes, one] if continues else [one]


@contextmanager
def attach(
    model: Any,
    sae: SAE,
    hook_name: str | Sequence[str],
    *,
    splice: bool = False,
    error: Literal["drop", "keep"] = "drop",
    edits: Sequence[Edit] = (),
    exclude: Excluded = None,
    grad: bool = False,
    output_hook: str | None = None,
) -> Iterator[Tap]:
    """Run `sae` on a module's activations while the block lasts.

    What the model goes on with, f being the latent activations of x and f' the edited ones:

        splice=False                 x + (f' − f) @ W_dec      (x itself, untouched, without edits)
        splice=True                  f' @ W_dec + b_dec        (the error x − x_hat is dropped)
        splice=True, error="keep"    x + (f' − f) @ W_dec      (the same as splice=False)

    A transcoder reads x at `hook_name`; what it edits or replaces is the y of `output_hook`.

    Args:
        model: a module, TransformerLens' models included, or an nnsight model. Positions and padding are read from the
            arguments of its call.
        hook_name: see `sae.naming.find_hook`; several for a crosscoder, which can be read but not spliced.
        edits: applied in order. Padding is never edited.
        exclude: tokens that go on unchanged and are not counted, as attention sinks should; padding always is.
        grad: make latents and error nodes of the graph, so that `tap.latents.grad` is there after a backward pass. With
            the error kept they are leaves and the gradient of x passes as if nothing were attached (Marks et al. 2024,
            arXiv:2403.19647, section 3.1).
        output_hook: where a transcoder's output belongs.
    Raises:
        ValueError: if the hook does not exist, an edit names a latent that does not exist, or, in the forward pass, the
            activations have another width or a position is asked for that is not known.
    """
    hook_names = (hook_name,) if isinstance(hook_name, str) else tuple(hook_name)
    for edit in edits:
        edit.check(sae.d_sae)
    if error not in ("drop", "keep"):
        raise ValueError(f"`error` must be 'drop' or 'keep', got {error!r}. Choose one of them.")
    writes = splice or bool(edits) or grad
    if writes and len(hook_names) > 1:
        raise ValueError(
            f"An SAE of several hooks ({', '.join(hook_names)}) can only be read: its latents are known after the last "
            "of them. Leave `splice`, `edits` and `grad` out."
        )
    root = torch_module(model)
    with ExitStack() as stack:
        watch = stack.enter_context(watch_tokens(root))
        attachment = _Attachment(sae, hook_names, watch, splice and error == "drop", tuple(edits), exclude, grad)
        own = output_hook is None or output_hook == hook_names[0]
        if not writes:
            for i, name in enumerate(hook_names):
                stack.enter_context(replace_activations(root, name, partial(attachment.read, i)))
        elif own:
            stack.enter_context(replace_activations(root, hook_names[0], attachment.read_and_write))
        else:
            assert output_hook is not None
            stack.enter_context(replace_activations(root, hook_names[0], attachment.read_for_write))
            stack.enter_context(replace_activations(root, output_hook, attachment.write))
        yield attachment.tap


class _Attachment:
    """The work of `attach` in a forward pass."""

    def __init__(
        self,
        sae: SAE,
        hook_names: tuple[str, ...],
        watch: Watch,
        drop_error: bool,
        edits: tuple[Edit, ...],
        exclude: Excluded,
        grad: bool,
    ) -> None:
        self.tap = Tap(sae)
        self._sae, self._hook_names, self._watch = sae, hook_names, watch
        self._drop_error, self._edits, self._exclude, self._grad = drop_error, edits, exclude, grad
        self._parts: dict[int, Tensor] = {}
        self._input: Tensor | None = None

    def read(self, i: int, x: Tensor) -> None:
        """What the i-th hook gives; the last one completes the SAE's input."""
        several = len(self._hook_names) > 1
        if several:
            self._parts[i] = x.detach()
            if len(self._parts) < len(self._hook_names):
                return
            x = torch.cat([self._parts[j] for j in range(len(self._hook_names))], dim=-1)
            self._parts.clear()
        self._see(x)

    def read_and_write(self, x: Tensor) -> Tensor | None:
        """At one hook."""
        seen = self._see(x)
        return self._replacement(x, seen, seen)

    def read_for_write(self, x: Tensor) -> None:
        """At a transcoder's input."""
        self._input = self._see(x)

    def write(self, y: Tensor) -> Tensor | None:
        """At a transcoder's output."""
        x, self._input = self._input, None  # not kept: it may hold a graph
        if x is None:
            raise ValueError(
                f"The transcoder's output hook ran before its input hook {self._hook_names[0]}. Exchange the two."
            )
        return self._replacement(y, y.reshape(*x.shape[:2], -1), x)

    def _see(self, x: Tensor) -> Float[Tensor, "batch seq d_in"]:
        d_in = self._sae.d_in
        lead = x.shape[:-1]
        if x.shape[-1] != d_in and x.ndim > 1 and x.shape[-1] * x.shape[-2] == d_in:
            lead = x.shape[:-2]  # heads apart, as TransformerLens' hook_z has them
        elif x.shape[-1] != d_in:
            raise ValueError(
                f"The activations at {', '.join(self._hook_names)} must have width d_in={d_in}, got shape "
                f"{tuple(x.shape)}. Attach to the hook and the model that this SAE was trained on."
            )
        if x.device != self._sae.W_dec.device:
            raise ValueError(
                f"The SAE must be where the activations are, on {x.device}, but it is on {self._sae.W_dec.device}. "
                "Move it there with `.to(…)`."
            )
        tokens = self._watch.tokens(tuple(lead), x.device)
        seen = x.reshape(*tokens.shape, d_in)
        excluded = excluded_tokens(self._exclude, seen.detach(), tokens)
        shape = tokens.shape if tokens.ids is not None else tuple(lead)
        self.tap._see(_Pass(seen.detach(), tokens, excluded, shape), keep=not self._grad)
        return seen

    def _replacement(
        self, given: Tensor, y: Float[Tensor, "batch seq d_out"], x: Float[Tensor, "batch seq d_in"]
    ) -> Tensor | None:
        """What the model goes on with instead of `given`; `y` is the same by token, `x` the SAE's input."""
        one = self.tap._passes[-1]
        if self._drop_error:
            new = self._spliced(one, x)
        elif self._grad:
            new = self._with_nodes(one, y, x)
        elif self._edits:
            latents = self._sae.encode(x)
            one.latents = latents.detach()
            new = y + self._delta(latents, x, one.tokens).to(y.dtype)
        else:
            return None
        if one.excluded is not None:
            new = torch.where(one.excluded.unsqueeze(-1), y, new)
        return new.reshape(given.shape)

    def _spliced(self, one: _Pass, x: Float[Tensor, "batch seq d_in"]) -> Float[Tensor, "batch seq d_out"]:
        """The reconstruction of the edited latents; gradients reach x through the encoder."""
        latents = self._sae.encode(x)
        if self._grad:
            latents = latents if latents.requires_grad else latents.requires_grad_()
            latents.retain_grad()
            one.latents = latents
        else:
            one.latents = latents.detach()
        new = self._sae.decode(latents, x)
        bypass = self._sae.bypass(x)
        if isinstance(bypass, Tensor):
            new = new + bypass
        if self._edits:
            new = new + self._delta(latents, x, one.tokens)
        return new.to(x.dtype)

    def _with_nodes(
        self, one: _Pass, y: Float[Tensor, "batch seq d_out"], x: Float[Tensor, "batch seq d_in"]
    ) -> Float[Tensor, "batch seq d_out"]:
        """y, plus what the latents and the error depart from their own values: nothing, but with gradients."""
        with torch.no_grad():
            values = self._sae.encode(x)
            left_out = y - (self._sae.decode(values, x) + self._sae.bypass(x)).to(y.dtype)
        latents, error = values.clone().requires_grad_(), left_out.clone().requires_grad_()
        one.latents, self.tap._error = latents, error
        new = latents
        if self._edits:
            touched, _, after = edited(self._edits, latents, one.tokens)
            new = after if touched is None else latents.index_copy(-1, _index(touched, latents), after)
        delta = (new - values) @ self._sae.W_dec * self._sae.output_scale(x)
        return y + delta.to(y.dtype) + (error - left_out)

    def _delta(
        self, latents: Float[Tensor, "batch seq d_sae"], x: Float[Tensor, "batch seq d_in"], tokens: Tokens
    ) -> Float[Tensor, "batch seq d_out"]:
        """What the edits add to the reconstruction; exactly 0 where they change nothing."""
        touched, before, after = edited(self._edits, latents, tokens)
        W_dec = self._sae.W_dec
        change: Tensor = (after - before) @ (W_dec if touched is None else W_dec[_index(touched, W_dec)])
        return change * self._sae.output_scale(x)


def _index(numbers: Sequence[int], like: Tensor) -> Int[Tensor, " n"]:
    return torch.tensor(numbers, device=like.device)
