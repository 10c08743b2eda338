"""Some latents of an SAE without the others: what their activations depend on is computed, and nothing else.

Every rule but TopK looks at one latent at a time. Under TopK whether a latent is on depends on all the others, so all
pre-activations are computed, in blocks of tokens, and the chosen ones kept.
"""

from collections.abc import Sequence
from typing import assert_never

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.base import SAE
from sae.config import (
    BatchTopKConfig,
    CrosscoderConfig,
    GatedConfig,
    JumpReLUConfig,
    MatryoshkaBatchTopKConfig,
    StandardConfig,
    TopKConfig,
    TranscoderConfig,
)
from sae.gated import GatedSAE

_BLOCK_ELEMENTS = 2**24
"""Pre-activations held at a time under TopK: 64 MB in float32."""


def latent_index(latents: Sequence[int] | Int[Tensor, " n"] | slice, d_sae: int) -> Int[Tensor, " n"]:
    """The latents as a tensor of indices.

    Raises: ValueError if one does not exist.
    """
    if isinstance(latents, slice):
        return torch.arange(d_sae)[latents]
    index = torch.as_tensor(latents, dtype=torch.int64).reshape(-1)
    if len(index) and not bool(((index >= 0) & (index < d_sae)).all()):
        wrong = index[(index < 0) | (index >= d_sae)][0]
        raise ValueError(f"Latents must lie in 0 … {d_sae - 1}, got {int(wrong)}. Choose latents of this dictionary.")
    return index


def encode_latents(sae: SAE, x: Float[Tensor, "*batch d_in"], index: Int[Tensor, " n"]) -> Float[Tensor, "*batch n"]:
    """`encode(x)[..., index]`."""
    index = index.to(sae.W_enc.device)
    config = sae.config
    if isinstance(config, TopKConfig) or (isinstance(config, TranscoderConfig) and config.activation == "topk"):
        return _of_all(sae, x, index)
    x_read = sae._encoder_input(x)
    pre_acts = x_read @ sae.W_enc[:, index] + sae.b_enc[index]
    threshold = sae.state_dict().get("threshold")
    match config:
        case StandardConfig():
            return pre_acts.relu()
        case GatedConfig():
            assert isinstance(sae, GatedSAE)
            magnitude = (pre_acts - sae.b_enc[index]) * sae.r_mag[index].exp() + sae.b_mag[index]
            return torch.where(pre_acts > 0, magnitude, 0).relu()
        case (
            BatchTopKConfig() | MatryoshkaBatchTopKConfig() | JumpReLUConfig() | TranscoderConfig() | CrosscoderConfig()
        ):
            if threshold is None:
                return pre_acts.relu()
            threshold = threshold if threshold.ndim == 0 else threshold[index]
            return torch.where(pre_acts.float() > threshold, pre_acts, 0).relu()
        case _:
            assert_never(config)


def _of_all(sae: SAE, x: Float[Tensor, "*batch d_in"], index: Int[Tensor, " n"]) -> Float[Tensor, "*batch n"]:
    flat = x.reshape(-1, x.shape[-1])
    n_rows = max(1, _BLOCK_ELEMENTS // sae.d_sae)
    parts = [sae.encode(flat[start : start + n_rows])[:, index] for start in range(0, max(1, len(flat)), n_rows)]
    return torch.cat(parts).reshape(*x.shape[:-1], len(index))
