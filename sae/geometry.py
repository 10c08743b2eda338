"""What the weights alone say about a dictionary: how its directions lie to each other, without an F × F matrix."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae.base import SAE

BLOCK_ELEMENTS = 2**24
"""Cosines that are in memory at once: 64 MB in float32."""


class Geometry(NamedTuple):
    """One value per latent."""

    max_decoder_cosine: Float[Tensor, " d_sae"]
    """Largest cosine of the decoder direction with that of another latent; near 1, the two are one feature twice."""
    encoder_decoder_cosine: Float[Tensor, " d_sae"] | None
    """Cosine of what a latent reads with what it writes; None where these are different spaces."""
    decoder_norm: Float[Tensor, " d_sae"]
    encoder_norm: Float[Tensor, " d_sae"]


@torch.no_grad()
def geometry(sae: SAE, *, same_space: bool = True) -> Geometry:
    """Geometry of the encoder and decoder directions, float32.

    Args:
        same_space: whether the SAE reconstructs what it reads; a transcoder does not.
    """
    W_dec, W_enc = sae.W_dec.detach().float(), sae.W_enc.detach().float().t()
    comparable = same_space and W_dec.shape == W_enc.shape
    cosine = torch.nn.functional.cosine_similarity(W_dec, W_enc, dim=1) if comparable else None
    return Geometry(max_cosines(W_dec), cosine, W_dec.norm(dim=1), W_enc.norm(dim=1))


@torch.no_grad()
def max_cosines(directions: Float[Tensor, "n d"], block: int | None = None) -> Float[Tensor, " n"]:
    """Largest cosine of each row with another row, a block of rows at a time; −1 for a single row.

    A row of zeros has cosine 0 with every other.
    """
    n = len(directions)
    unit = torch.nn.functional.normalize(directions.float(), dim=1)
    step = block or max(1, BLOCK_ELEMENTS // n)
    best = unit.new_full((n,), -1.0)
    for start in range(0, n, step):
        cosines = unit[start : start + step] @ unit.t()
        rows = torch.arange(len(cosines), device=unit.device)
        cosines[rows, rows + start] = -1.0
        best[start : start + step] = cosines.amax(dim=1)
    return best.clamp(-1, 1)
