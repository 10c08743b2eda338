"""Which tokens a forward pass is about: their ids, positions and padding, read from what the model is called with.

A hook inside of the model sees activations only. `watch_tokens` looks at the call of the model itself, so that an edit
can name positions, padding stays untouched, and a decode step of `generate` (one column, the rest in the KV cache)
knows where in the sequence it is.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

_IDS = ("input_ids", "input", "tokens", "idx")
_PAST = ("past_key_values", "past_kv_cache", "layer_past")


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of one forward pass, [batch, seq].

    A column is a place in the sequence as the model receives it, padding included; a position is the token's place in
    its text, as the model itself counts: `position_ids` where the caller gives them (they restart at every packed
    document), else the number of tokens before it that are no padding.
    """

    shape: tuple[int, int]
    device: torch.device
    start: int = 0
    """Column of the first token: the length of the KV cache."""
    ids: Int[Tensor, "batch seq"] | None = None
    real: Bool[Tensor, "batch seq"] | None = None
    """False at padding; None where nothing is padded."""
    given_position: Int[Tensor, "batch seq"] | None = None
    seen: bool = True
    """Whether the model itself was called; else only the shape is known."""

    @property
    def columns(self) -> Int[Tensor, " seq"]:
        return torch.arange(self.start, self.start + self.shape[1], device=self.device)

    @property
    def position(self) -> Int[Tensor, "batch seq"]:
        """Raises: ValueError if the model itself was not called."""
        self.require_call("positions")
        if self.given_position is not None:
            return self.given_position
        return self.columns.expand(self.shape)

    @property
    def required_ids(self) -> Int[Tensor, "batch seq"]:
        """Raises: ValueError if the model was not called with token ids."""
        self.require_call("token ids")
        if self.ids is None:
            raise ValueError(
                "Token ids are needed here, but the model was called without. Pass `input_ids`, or name positions."
            )
        return self.ids

    def require_call(self, what: str) -> None:
        """Raises: ValueError if nothing but the shape is known of these tokens."""
        if not self.seen:
            raise ValueError(
                f"The {what} are known only inside a call of the model that was attached to, but a module of it ran on "
                "its own. Call that model, or attach to the one that you call."
            )


class Watch:
    """Where the call of a model that is running leaves what it was given."""

    def __init__(self) -> None:
        self._call: Mapping[str, Any] | None = None
        self._start = 0

    def begin(self, call: Mapping[str, Any] | None) -> None:
        """The model is called with these arguments, or (None) its call has ended."""
        self._call = call
        # Now, because the first layer already adds to the cache.
        self._start = 0 if call is None else _past_length(call)

    def tokens(self, shape: tuple[int, ...], device: torch.device) -> Tokens:
        """The tokens behind activations of this leading shape.

        Args:
            shape: [batch, seq]; [batch * seq] where a module flattens, or [seq] without a batch.
        """
        call = self._call
        if call is None:
            return Tokens(_two_dimensional(shape, None), device, seen=False)
        ids = next((call[name] for name in _IDS if _is_integer(call.get(name), 2)), None)
        embeds = call.get("inputs_embeds")
        known = ids if ids is not None else embeds if isinstance(embeds, Tensor) else None
        batch, seq = two = _two_dimensional(shape, None if known is None else tuple(known.shape))
        if ids is not None and tuple(ids.shape) != two:  # a module that sees some tokens only, such as an expert
            return Tokens(two, device, seen=False)
        mask = call.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[-1] < seq or mask.shape[0] != batch:
            mask = None
        start = self._start
        position: Any = call.get("position_ids")
        if _is_integer(position, 2) or _is_integer(position, 1):
            position = position[..., -seq:].expand(batch, seq)
        elif mask is not None:
            position = (mask.long().cumsum(-1) - 1).clamp_min(0)[:, -seq:]
            if mask.shape[1] == seq and start:  # a mask of the new columns alone
                position = position + start
        else:
            position = None
        real = None if mask is None else mask[:, -seq:].bool()
        if real is not None and real.device.type == "cpu" and bool(real.all()):
            real = None
        # A model spread over devices is called on one and runs its layers on others.
        ids, real, position = (None if each is None else each.to(device) for each in (ids, real, position))
        return Tokens(two, device, start, ids, real, position)


def _two_dimensional(shape: tuple[int, ...], ids: tuple[int, ...] | None) -> tuple[int, int]:
    if len(shape) == 2:
        return shape[0], shape[1]
    n = 1
    for size in shape:
        n *= size
    if ids is not None and ids[0] * ids[1] == n:
        return ids[0], ids[1]
    return (1, n) if len(shape) < 2 else (n // shape[-1], shape[-1])


def _is_integer(value: Any, ndim: int) -> bool:
    return (
        isinstance(value, Tensor) and value.ndim == ndim and not value.is_floating_point() and value.dtype != torch.bool
    )


def _past_length(call: Mapping[str, Any]) -> int:
    """Columns in the KV cache."""
    past = next((call[name] for name in _PAST if call.get(name) is not None), None)
    if past is None:
        return 0
    if hasattr(past, "get_seq_length"):
        return int(past.get_seq_length())
    if hasattr(past, "entries"):  # TransformerLens: past_keys are [batch, pos, head, d_head]
        return int(past.entries[0].past_keys.shape[1])
    return int(past[0][0].shape[-2])  # a tuple of (keys, values) for each layer, [batch, head, pos, d_head]


@contextmanager
def watch_tokens(model: nn.Module) -> Iterator[Watch]:
    """While the block lasts, know what the model is called with; nothing is known between two calls of it."""
    watch = Watch()
    signature = inspect.signature(model.forward)

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        watch.begin(_arguments(signature, args, kwargs))

    def after(_module: nn.Module, _args: Any, _output: Any) -> None:
        watch.begin(None)

    # The last one is called even when the forward pass raises, so that nothing stale is left for the next call.
    handles = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after, always_call=True),
    ]
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()


def _arguments(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    try:
        given = dict(signature.bind_partial(*args, **kwargs).arguments)
    except TypeError:  # the call is wrong, and the model will say so
        return dict(kwargs)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= given.pop(parameter.name, {})
    return given
