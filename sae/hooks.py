"""Attach an SAE to a module of a language model: read its latents, splice its reconstruction in, edit single latents.

    with attach(model, sae, "model.layers.8") as tap:
        model(**inputs)
    tap.latents

Hooks are removed when the block ends, whatever happens in it; nothing is stored on the model.
"""

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sae.base import SAE

Passthrough = Bool[Tensor, "*batch"] | Callable[[Tensor], Tensor] | None


@dataclass(frozen=True, kw_only=True)
class Edit:
    """A change of one latent at every token.

    zero     f' = 0
    scale    f' = value · f
    clamp    f' = value
    add      f' = f + value
    """

    latent: int
    kind: Literal["zero", "scale", "clamp", "add"]
    value: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("zero", "scale", "clamp", "add"):
            raise ValueError(f"Edit.kind must be zero, scale, clamp or add, got {self.kind!r}. Choose one of them.")

    def apply(self, latent_acts: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """The latent's new activations."""
        match self.kind:
            case "zero":
                return torch.zeros_like(latent_acts)
            case "scale":
                return latent_acts * self.value
            case "clamp":
                return torch.full_like(latent_acts, self.value)
            case "add":
                return latent_acts + self.value


class Tap:
    """What an attached SAE saw in the model's last forward pass.

    `x` is the model's own tensor before any change, not a copy. `latents` are its latent activations, computed on
    first use.
    """

    def __init__(self, sae: SAE) -> None:
        self._sae = sae
        self._x: Tensor | None = None
        self._latents: Tensor | None = None

    @property
    def x(self) -> Float[Tensor, "*batch d_in"]:
        if self._x is None:
            raise ValueError(
                "Nothing was read yet: the hooked module has not run. Call the model inside the `with` block first."
            )
        return self._x

    @property
    def latents(self) -> Float[Tensor, "*batch d_sae"]:
        if self._latents is None:
            self._latents = self._sae.encode(self.x)
        return self._latents

    def _see(self, x: Tensor) -> None:
        self._x, self._latents = x, None


def split_hook_name(hook_name: str) -> tuple[str, Literal["input", "output"]]:
    """The module path of a hook name and the side of the module: "a.b" and "a.b:output" are its output.

    Raises: ValueError if what follows the colon is neither "input" nor "output".
    """
    path, colon, side = hook_name.partition(":")
    if side == "input":
        return path, "input"
    if side == "output" or not colon:
        return path, "output"
    raise ValueError(f"A hook name ends in `:output` or `:input`, got {hook_name!r}. Drop or correct `:{side}`.")


def find_module(model: nn.Module, hook_name: str) -> nn.Module:
    """The module that `hook_name` names.

    Args:
        hook_name: a path as in `model.named_modules()`, optionally followed by ":output" (the default) or ":input".
    Raises: ValueError naming the nearest module paths if there is no such module.
    """
    path, _ = split_hook_name(hook_name)
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if path not in modules or not path:
        near = difflib.get_close_matches(path, [name for name in modules if name], n=5, cutoff=0.3)
        raise ValueError(
            f"A hook name must be the path of a module of {type(model).__name__}, got {path!r}. "
            f"Nearest: {', '.join(near) or 'none'}. `model.named_modules()` lists all."
        )
    return modules[path]


@contextmanager
def attach(
    model: nn.Module,
    sae: SAE,
    hook_name: str,
    *,
    splice: bool = False,
    error: Literal["drop", "keep"] = "drop",
    edits: Sequence[Edit] = (),
    passthrough: Passthrough = None,
) -> Iterator[Tap]:
    """Run `sae` on a module's activations while the block lasts.

    What the model goes on with, f being the latent activations of x and f' the edited ones:

        splice=False                 x + (f' − f) @ W_dec      (x itself, untouched, without edits)
        splice=True                  f' @ W_dec + b_dec        (the error x − x_hat is dropped)
        splice=True, error="keep"    x + (f' − f) @ W_dec      (the same as splice=False)

    Args:
        edits: applied in order to every token.
        passthrough: mask of tokens, or a function from x to one, that go on unchanged, as attention sinks should.
    Raises:
        ValueError: if the hook does not exist, an edit names a latent that does not exist, or the activations have
            another width.
    """
    for edit in edits:
        if not 0 <= edit.latent < sae.d_sae:
            raise ValueError(
                f"Edit.latent must lie in 0 … {sae.d_sae - 1}, got {edit.latent}. Choose a latent of this SAE."
            )
    if error not in ("drop", "keep"):
        raise ValueError(f"`error` must be 'drop' or 'keep', got {error!r}. Choose one of them.")
    tap = Tap(sae)

    def replace(x: Tensor) -> Tensor | None:
        if x.shape[-1] != sae.d_in:
            raise ValueError(
                f"The activations at {hook_name} must have width d_in={sae.d_in}, got shape {tuple(x.shape)}. "
                "Attach to the hook and the model that this SAE was trained on."
            )
        tap._see(x)
        replaced = _replacement(tap, sae, splice and error == "drop", edits)
        if replaced is None or passthrough is None:
            return replaced
        unchanged = passthrough(x) if callable(passthrough) else passthrough
        return torch.where(unchanged.to(x.device).unsqueeze(-1), x, replaced)

    with replace_activations(model, hook_name, replace):
        yield tap


def _replacement(tap: Tap, sae: SAE, drop_error: bool, edits: Sequence[Edit]) -> Tensor | None:
    x = tap.x
    if not drop_error and not edits:
        return None
    latents = tap.latents
    delta = torch.zeros_like(x, dtype=sae.W_dec.dtype)
    edited: dict[int, Tensor] = {}
    for edit in edits:
        edited[edit.latent] = edit.apply(edited.get(edit.latent, latents[..., edit.latent]))
    if edited:
        chosen = list(edited)
        change = torch.stack([edited[latent] - latents[..., latent] for latent in chosen], dim=-1)
        delta = change @ sae.W_dec[chosen]
    if drop_error:
        return (sae.decode(latents) + delta).to(x.dtype)
    return (x + delta).to(x.dtype)


@contextmanager
def replace_activations(model: nn.Module, hook_name: str, replace: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """While the block lasts, the model goes on with `replace(x)` at the hook, or with x itself where that is None.

    Where the module takes or returns several values, x is the first.
    """
    module, (_, side) = find_module(model, hook_name), split_hook_name(hook_name)

    def on_output(_module: nn.Module, _args: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        new = replace(first)
        if new is None:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    def on_input(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        key = None if args else next(iter(kwargs))
        new = replace(args[0] if key is None else kwargs[key])
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if key is None else (args, kwargs | {key: new})

    if side == "output":
        handle = module.register_forward_hook(on_output)
    else:
        handle = module.register_forward_pre_hook(on_input, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
