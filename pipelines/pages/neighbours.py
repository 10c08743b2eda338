"""The nearest decoder directions of every latent."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from sae.search import Neighbour

_AT_ONCE = 2**24
"""Cosines held at a time: 64 MB."""


def nearest_neighbours(W_dec: Float[Tensor, "d_sae d_out"], n: int) -> Iterator[list[Neighbour]]:
    """For each latent in order, the `n` others of largest cosine, largest first.

    Directions of norm zero have cosine 0 with all. Time grows with d_sae², memory with d_sae.
    """
    W = W_dec.float()
    unit = W / W.norm(dim=1, keepdim=True).clamp_min(1e-12)
    d_sae = len(unit)
    rows = max(1, min(d_sae, _AT_ONCE // max(d_sae, 1)))
    for start in range(0, d_sae, rows):
        cosines = unit[start : start + rows] @ unit.T
        own = torch.arange(len(cosines))
        cosines[own, own + start] = -torch.inf
        top = cosines.topk(min(n, d_sae - 1), dim=1)
        for latents, values in zip(top.indices.tolist(), top.values.tolist(), strict=True):
            yield [Neighbour(*pair) for pair in zip(latents, values, strict=True)]
