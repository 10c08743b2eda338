"""Latents with the most similar decoder rows."""

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor


@torch.no_grad()
def nearest_neighbours(
    W_dec: Float[Tensor, "d_sae d_in"], k: int, *, rows_at_once: int = 1024
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The k latents with the largest cosine to each decoder row, itself left out, most similar first.

    Returns:
        `[d_sae, k]` latents and cosines; k shrinks to d_sae - 1 in a smaller dictionary.
    """
    unit = torch.nn.functional.normalize(W_dec.float(), dim=1)
    k = min(k, len(unit) - 1)
    found, cosines = [], []
    for start in range(0, len(unit), rows_at_once):
        similarity = unit[start : start + rows_at_once] @ unit.T
        here = torch.arange(len(similarity))
        similarity[here, here + start] = -torch.inf
        best = similarity.topk(k, dim=1)
        found.append(best.indices)
        cosines.append(best.values)
    return torch.cat(found).numpy(), torch.cat(cosines).numpy()
