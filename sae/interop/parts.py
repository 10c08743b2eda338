"""What the readers of foreign formats share: a table of names, the checks, and the folds.

A reader says where each of our tensors is found in the file (`At`), which other entries may be there, and which
configuration the SAE has. `take` checks names, shapes and numbers and gives the tensors our names; `filled` makes the
SAE. The folds turn what other tools do outside our equations into weights that give the same function.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from sae.architectures import empty
from sae.base import SAE
from sae.config import SAEConfig
from sae.gated import GatedSAE

_BLOCK_LATENTS = 4096


class Foreign(NamedTuple):
    """A dictionary of another tool."""

    sae: SAE
    hook_names: tuple[str, ...] = ()
    """As for `Dictionary`; names of modules or of TransformerLens hooks, whichever the format records."""
    metadata: Mapping[str, Any] = {}


@runtime_checkable
class Format(Protocol):
    """One foreign format: a module of this package."""

    NAME: str

    def claims(self, folder: Path) -> tuple[str, ...]:
        """The files of the folder that make it one of this format; empty if it is none."""

    def read(self, folder: Path) -> Foreign:
        """The dictionary. Raises: ValueError naming the key or tensor that is wrong."""


class At(NamedTuple):
    """Where one of our tensors is found."""

    key: str
    transposed: bool = False


def take(
    tensors: Mapping[str, Any], where: Mapping[str, At], config: SAEConfig, *, unused: Sequence[str] = ()
) -> dict[str, Tensor]:
    """The tensors under our names, in float32, in the layout of our parameters.

    Args:
        where: for each tensor of an SAE of this configuration.
        unused: entries that may be in the file but carry nothing.
    Raises: ValueError listing every tensor that is missing, not expected, misshapen, not of numbers or not finite.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in _unfilled(config).state_dict().items()}
    problems = [f"tensor `{where[name].key}` is missing" for name in wanted if where[name].key not in tensors]
    known = {at.key for name, at in where.items() if name in wanted} | set(unused)
    problems += [f"tensor `{key}` is not part of this kind of dictionary" for key in tensors if key not in known]
    taken: dict[str, Tensor] = {}
    for name, shape in wanted.items():
        at = where[name]
        if at.key not in tensors:
            continue
        theirs = shape[::-1] if at.transposed else shape
        problem = tensor_problem(at.key, tensors[at.key], theirs)
        if problem is None:
            tensor = tensors[at.key].detach().float()
            taken[name] = tensor.t() if at.transposed else tensor
        else:
            problems.append(problem)
    if problems:
        raise ValueError("; ".join(sorted(problems)) + ".")
    return taken


def tensor_problem(key: str, tensor: Any, shape: tuple[int, ...]) -> str | None:
    """What is wrong with a tensor that should have this shape and hold finite numbers."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        return f"tensor `{key}` must hold floating-point numbers, got {kind}"
    if tuple(tensor.shape) != shape:
        return f"tensor `{key}` must have shape {shape}, got {tuple(tensor.shape)}"
    # One pass over the memory: a sum is finite unless an element is not, or it overflows.
    if not bool(torch.isfinite(tensor.sum())) and not bool(torch.isfinite(tensor).all()):
        return f"tensor `{key}` holds NaN or infinity"
    return None


def dimension(tensors: Mapping[str, Any], key: str, axis: int) -> int:
    """Length of an axis of a matrix, for formats that record no widths.

    Raises: ValueError if there is no such matrix.
    """
    tensor = tensors.get(key)
    if not isinstance(tensor, Tensor) or tensor.ndim != 2:
        got = "nothing" if tensor is None else f"shape {tuple(getattr(tensor, 'shape', ()))}"
        raise ValueError(f"tensor `{key}` must be a matrix, got {got}.")
    return tensor.shape[axis]


def whole_number(values: Mapping[str, Any], key: str) -> int:
    """A count of at least 1 in a configuration. Raises: ValueError naming the key."""
    value = values.get(key)
    if isinstance(value, Tensor) and value.ndim == 0 and not value.is_floating_point():
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{key}` must be a whole number of at least 1, got {value!r}.")
    return value


def number(values: Mapping[str, Any], key: str) -> float:
    """A finite positive number in a configuration. Raises: ValueError naming the key."""
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ValueError(f"`{key}` must be a positive number, got {value!r}.")
    return float(value)


def filled(config: SAEConfig, tensors: Mapping[str, Tensor]) -> SAE:
    """An SAE that holds these tensors themselves, not copies; `take` has checked them."""
    sae = _unfilled(config)
    sae.load_state_dict(dict(tensors), assign=True)
    return sae.requires_grad_(False)


def _unfilled(config: SAEConfig) -> SAE:
    """An SAE without memory for its tensors, so that a configuration can ask for any size."""
    with torch.device("meta"):
        return empty(config)


def decoder_norms(sae: SAE) -> Float[Tensor, " d_sae"]:
    """Norm of each decoder row, at least 1e-8."""
    norms: Tensor = sae.W_dec.norm(dim=1)
    return norms.clamp_min(1e-8)


# ---- folds -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def shift_biases(sae: SAE, at: Float[Tensor, " d_in"]) -> None:
    """Make act(x @ W_enc + b_enc) of a foreign encoder act((x − at) @ W_enc + b_enc') with our b_enc', in place."""
    shift = torch.cat(
        [
            at.double() @ sae.W_enc[:, start : start + _BLOCK_LATENTS].double()
            for start in range(0, sae.d_sae, _BLOCK_LATENTS)
        ]
    )
    sae.b_enc.copy_((sae.b_enc.double() + shift).float())
    if isinstance(sae, GatedSAE):
        sae.b_mag.copy_((sae.b_mag.double() + shift * sae.r_mag.double().exp()).float())


@torch.no_grad()
def rescale_latents(sae: SAE, factor: Float[Tensor, " d_sae"]) -> None:
    """Multiply each pre-activation by a positive factor of its own and divide its decoder row by it, in place.

    Thresholds and k are left alone: they are compared with what comes out.
    """
    sae.W_enc.mul_(factor)
    sae.b_enc.mul_(factor)
    sae.W_dec.div_(factor.unsqueeze(1))
    if isinstance(sae, GatedSAE):
        sae.b_mag.mul_(factor)


@torch.no_grad()
def scale_input(sae: SAE, s_in: float, s_out: float | None = None) -> None:
    """Make an SAE of x · s_in that reconstructs y · s_out one of x that reconstructs y, latents unchanged, in place.

    Only for encoders of which `b_dec` is no part yet, or with s_in = s_out.
    """
    s_out = s_in if s_out is None else s_out
    sae.W_enc.mul_(s_in)
    sae.W_dec.div_(s_out)
    sae.b_dec.div_(s_out)
