"""Normalisation of single tokens, by their own mean or norm: what some foreign dictionaries do before their encoder.

    layer_norm               x_n = (x − mean) / (std + 1e-5)      x = x_n · std + mean       std with d_in − 1
    constant_norm_rescale    x_n = x · √d_in / ‖x‖                x = x_n · ‖x‖ / √d_in

Unlike `sae.normalise` it is not the same map for every token, so no weights can absorb it, and a reconstruction can
only be mapped back by somebody who has x. Names and formulas, the asymmetric 1e-5 too, are those of SAELens and of
openai/sparse_autoencoder.
"""

from typing import Literal, NamedTuple, get_args

from jaxtyping import Float
from torch import Tensor

TokenNorm = Literal["none", "layer_norm", "constant_norm_rescale"]
TOKEN_NORMS: tuple[str, ...] = get_args(TokenNorm)
_EPSILON = 1e-5


class TokenScale(NamedTuple):
    """x_n = (x − shift) / divisor and x = x_n · multiplier + shift, of each token."""

    shift: Float[Tensor, "*batch 1"]
    divisor: Float[Tensor, "*batch 1"]
    multiplier: Float[Tensor, "*batch 1"]


def token_scale(x: Float[Tensor, "*batch d_in"], how: TokenNorm) -> TokenScale:
    """The map of each token of `x`; `how` must not be "none"."""
    if how == "layer_norm":
        mean, std = x.mean(dim=-1, keepdim=True), x.std(dim=-1, keepdim=True)
        return TokenScale(mean, std + _EPSILON, std)
    scale = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
    return TokenScale(scale.new_zeros(()).expand_as(scale), scale, scale)


def normalise_tokens(x: Float[Tensor, "*batch d_in"], how: TokenNorm) -> Float[Tensor, "*batch d_in"]:
    """x_n."""
    if how == "none":
        return x
    scale = token_scale(x, how)
    return (x - scale.shift) / scale.divisor
