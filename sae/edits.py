"""Edits of latent activations, and which tokens they are for.

Zero(17)                                        latent 17 off, at every token
Clamp([17, 80], 4.0, positions=range(3, 9))     two latents at six positions
Scale(17, 2.0, positions=lambda ids: ids == 42) where the token is 42
Add("all", direction)                           every latent
Patch(17, tap.latents)                          as in another run
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae.tokens import Tokens

Latents = int | Sequence[int] | Literal["all"]
Positions = int | Sequence[int] | Tensor | Callable[[Tensor], Tensor] | None
"""None is everywhere; numbers are positions in the text (`Tokens.position`); a boolean tensor [batch, seq] or [seq] is
by column and false beyond its end; a function is given the token ids [batch, seq] of a pass and returns such a mask."""
Value = float | int | Tensor


@dataclass(frozen=True, eq=False)
class Edit(ABC):
    """A change f' of latent activations f. Several are applied in the order of the list.

    Padding and excluded tokens are never edited.
    """

    latents: Latents
    """One latent, several different ones, or "all"."""
    positions: Positions = field(default=None, kw_only=True)
    """See `Positions`."""

    def __post_init__(self) -> None:
        if isinstance(self.latents, str):
            if self.latents != "all":
                raise ValueError(f"Edit.latents must be numbers or 'all', got {self.latents!r}. Correct it.")
        else:
            numbers = (self.latents,) if isinstance(self.latents, int) else tuple(int(i) for i in self.latents)
            if not numbers or len(set(numbers)) != len(numbers):
                raise ValueError(f"Edit.latents must name different latents, at least one, got {numbers}. Correct it.")
            object.__setattr__(self, "latents", numbers)
        positions = self.positions
        if isinstance(positions, Tensor):
            if positions.dtype != torch.bool or positions.ndim not in (1, 2):
                raise ValueError(
                    "Edit.positions as a tensor must be a boolean mask [batch, seq] or [seq], got "
                    f"{positions.dtype} {tuple(positions.shape)}. Pass a list for positions by number."
                )
        elif positions is not None and not callable(positions):
            numbers = (positions,) if isinstance(positions, int) else tuple(int(i) for i in positions)
            if any(number < 0 for number in numbers):
                raise ValueError(
                    f"Edit.positions must be 0 or more, got {numbers}: during generation there is no last position. "
                    "Count from the start of the text, or pass a mask."
                )
            object.__setattr__(self, "positions", numbers)

    def check(self, d_sae: int) -> None:
        """Raises: ValueError if the edit names a latent that an SAE of this width does not have."""
        for latent in self.numbers or ():
            if not 0 <= latent < d_sae:
                raise ValueError(
                    f"Edit.latents must lie in 0 … {d_sae - 1}, got {latent}. Choose a latent of this SAE."
                )

    @abstractmethod
    def changed(
        self, f: Float[Tensor, "batch seq n"], tokens: Tokens
    ) -> tuple[Float[Tensor, "batch seq n"], Bool[Tensor, "*batch seq"] | None]:
        """f' of the edit's latents at all tokens, and where it is defined (None is everywhere)."""

    @property
    def numbers(self) -> tuple[int, ...] | None:
        """The latents; None is all."""
        return None if isinstance(self.latents, str) else tuple(self.latents)  # type: ignore[arg-type]

    def _of_latents(self, values: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch n"]:
        return values if self.numbers is None else values[..., torch.tensor(self.numbers, device=values.device)]

    def where(self, tokens: Tokens) -> Bool[Tensor, "*batch seq"] | None:
        """The tokens to edit; None is all.

        Raises: ValueError if `positions` needs what is not known of the tokens, or is a mask of the wrong shape.
        """
        if self.positions is None:
            return None
        if isinstance(self.positions, Tensor):
            return by_column(self.positions, tokens)
        if callable(self.positions):
            return boolean(self.positions(tokens.required_ids), tokens)
        wanted = torch.tensor(self.positions, device=tokens.device)
        return torch.isin(tokens.position, wanted)


@dataclass(frozen=True, eq=False)
class Zero(Edit):
    """f' = 0"""

    def changed(
        self, f: Float[Tensor, "batch seq n"], tokens: Tokens
    ) -> tuple[Float[Tensor, "batch seq n"], Bool[Tensor, "*batch seq"] | None]:
        """See `Edit.changed`."""
        return torch.zeros_like(f), None


@dataclass(frozen=True, eq=False)
class _ValueEdit(Edit):
    value: Value
    """A number, one for each latent [n], or one for each token and latent [batch, seq, n]: then by column, batch may be
    1, and tokens beyond its end stay as they are."""

    def changed(
        self, f: Float[Tensor, "batch seq n"], tokens: Tokens
    ) -> tuple[Float[Tensor, "batch seq n"], Bool[Tensor, "*batch seq"] | None]:
        """See `Edit.changed`."""
        if not isinstance(self.value, Tensor):
            return self.combine(f, torch.as_tensor(self.value, dtype=f.dtype, device=f.device)), None
        value = self.value.to(f)
        if value.ndim < 3:
            if value.ndim and value.shape != f.shape[-1:]:
                raise ValueError(
                    f"{type(self).__name__}.value must be a number, one for each of {f.shape[-1]} latents, or a tensor "
                    f"[batch, seq, {f.shape[-1]}], got shape {tuple(value.shape)}. Correct it."
                )
            return self.combine(f, value), None
        value, there = at_columns(value, f, tokens, f"{type(self).__name__}.value")
        return self.combine(f, value), there

    def combine(self, f: Float[Tensor, "batch seq n"], value: Tensor) -> Float[Tensor, "batch seq n"]:
        """f' from f and the value, which broadcasts to it."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Clamp(_ValueEdit):
    """f' = value"""

    def combine(self, f: Float[Tensor, "batch seq n"], value: Tensor) -> Float[Tensor, "batch seq n"]:
        """See the class."""
        return value.expand_as(f)


@dataclass(frozen=True, eq=False)
class Mean(Edit):
    """f' = the latent's mean over a reference set.

    Mean ablation: it takes away what the latent says about this text and leaves what it adds everywhere.
    """

    means: Float[Tensor, " d_sae"]
    """The means of all latents, such as `Tap.mean()` after a pass over the reference set."""

    def changed(
        self, f: Float[Tensor, "batch seq n"], tokens: Tokens
    ) -> tuple[Float[Tensor, "batch seq n"], Bool[Tensor, "*batch seq"] | None]:
        """See `Edit.changed`."""
        return self._of_latents(self.means).to(f).expand_as(f), None


@dataclass(frozen=True, eq=False)
class Scale(_ValueEdit):
    """f' = value · f"""

    def combine(self, f: Float[Tensor, "batch seq n"], value: Tensor) -> Float[Tensor, "batch seq n"]:
        """See the class."""
        return f * value


@dataclass(frozen=True, eq=False)
class Add(_ValueEdit):
    """f' = f + value"""

    def combine(self, f: Float[Tensor, "batch seq n"], value: Tensor) -> Float[Tensor, "batch seq n"]:
        """See the class."""
        return f + value


@dataclass(frozen=True, eq=False)
class Patch(Edit):
    """f' = the latents of another run, column by column; tokens beyond its end stay as they are."""

    source: Float[Tensor, "source_batch source_seq d_sae"]
    """All latents of that run, such as `tap.latents`; a batch of 1 is for every row."""

    def changed(
        self, f: Float[Tensor, "batch seq n"], tokens: Tokens
    ) -> tuple[Float[Tensor, "batch seq n"], Bool[Tensor, "*batch seq"] | None]:
        """See `Edit.changed`."""
        value, there = at_columns(self._of_latents(self.source).to(f), f, tokens, "Patch.source")
        return value.expand_as(f), there


def edited(
    edits: Sequence[Edit], f: Float[Tensor, "batch seq d_sae"], tokens: Tokens
) -> tuple[list[int] | None, Float[Tensor, "batch seq n"], Float[Tensor, "batch seq n"]]:
    """Apply edits in order.

    Returns: the latents that any of them touches (None is all), their f, and their f'.
    """
    chosen = [edit.numbers for edit in edits]
    touched = None if None in chosen else sorted({latent for numbers in chosen for latent in numbers or ()})
    before = f if touched is None else f[..., torch.tensor(touched, device=f.device)]
    after = before
    for edit, numbers in zip(edits, chosen, strict=True):
        if numbers is None:
            after = _one(edit, after, tokens)
            continue
        places = numbers if touched is None else [touched.index(latent) for latent in numbers]
        index = torch.tensor(places, device=f.device)
        after = after.index_copy(-1, index, _one(edit, after[..., index], tokens))
    return touched, before, after


def _one(edit: Edit, f: Float[Tensor, "batch seq n"], tokens: Tokens) -> Float[Tensor, "batch seq n"]:
    new, there = edit.changed(f, tokens)
    where = edit.where(tokens)
    for condition in (there, where):
        if condition is not None:
            new = torch.where(condition.unsqueeze(-1), new, f)
    return new


def by_column(mask: Bool[Tensor, "*_ whole_seq"], tokens: Tokens) -> Bool[Tensor, "*batch seq"]:
    """The part of a mask of whole sequences that belongs to the tokens of this pass; false beyond its end."""
    tokens_there = tokens.columns < mask.shape[-1]
    part = mask.to(tokens.device)[..., tokens.columns.clamp_max(mask.shape[-1] - 1)] & tokens_there
    return boolean(part, tokens)


def boolean(mask: Tensor, tokens: Tokens) -> Bool[Tensor, "*batch seq"]:
    """Raises: ValueError if it is no boolean mask of the tokens."""
    batch, seq = tokens.shape
    if mask.dtype != torch.bool or tuple(mask.shape) not in ((batch, seq), (1, seq), (seq,)):
        raise ValueError(
            f"A mask of tokens must be boolean and fit [{batch}, {seq}], got {mask.dtype} {tuple(mask.shape)}. "
            "Make it for the tokens that the model is given."
        )
    return mask


def at_columns(
    source: Float[Tensor, "source_batch source_seq n"], f: Float[Tensor, "batch seq n"], tokens: Tokens, what: str
) -> tuple[Float[Tensor, "source_batch seq n"], Bool[Tensor, " seq"] | None]:
    """The values of a whole sequence that belong to the tokens of this pass, and which of them exist.

    Raises: ValueError if the batch or the latents differ.
    """
    if source.shape[0] not in (1, f.shape[0]) or source.shape[-1] != f.shape[-1]:
        raise ValueError(
            f"{what} must have shape [{f.shape[0]} or 1, seq, {f.shape[-1]}], got {tuple(source.shape)}. "
            "Take it from a run with as many rows."
        )
    n = source.shape[1]
    if tokens.start == 0 and n == f.shape[1]:
        return source, None
    columns = tokens.columns
    return source[:, columns.clamp_max(n - 1)], columns < n


@dataclass(frozen=True)
class Exclude:
    """Tokens that go on unchanged and are not counted: attention sinks, of which an SAE knows nothing.

    At the residual stream the first position and a few others have a norm many times that of the rest; a dictionary
    that was trained without them does badly on them.
    """

    first: bool = True
    """The first position of every text."""
    token_ids: tuple[int, ...] = ()
    """Such as the tokenizer's BOS."""
    max_norm: float | None = None
    """Tokens whose activation has a larger norm; three times the median is usual."""

    def mask(self, x: Float[Tensor, "batch seq d_in"], tokens: Tokens) -> Bool[Tensor, "batch seq"]:
        """The excluded tokens of a pass.

        Raises: ValueError if positions or ids are asked for and not known.
        """
        mask = torch.zeros(tokens.shape, dtype=torch.bool, device=x.device)
        if self.first:
            mask = mask | (tokens.position == 0)
        if self.token_ids:
            mask = mask | torch.isin(tokens.required_ids, torch.tensor(self.token_ids, device=x.device))
        if self.max_norm is not None:
            mask = mask | (x.float().norm(dim=-1) > self.max_norm)
        return mask


Excluded = Exclude | Tensor | Callable[[Tensor], Tensor] | None
"""A rule, a boolean mask of tokens by column, or a function from activations [batch, seq, d_in] to such a mask."""


def excluded_tokens(
    exclude: Excluded, x: Float[Tensor, "batch seq d_in"], tokens: Tokens
) -> Bool[Tensor, "*batch seq"] | None:
    """Padding and what `exclude` names; None where that is no token."""
    mask: Tensor | None
    match exclude:
        case None:
            mask = None
        case Exclude():
            mask = exclude.mask(x, tokens)
        case Tensor():
            mask = by_column(exclude, tokens)
        case _:
            mask = boolean(exclude(x), tokens)
    if tokens.real is None:
        return mask
    return ~tokens.real if mask is None else mask | ~tokens.real
