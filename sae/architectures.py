"""From a configuration to an SAE: the one place that knows every architecture."""

from typing import assert_never

import torch

from sae.base import SAE
from sae.batchtopk import BatchTopKSAE
from sae.config import BatchTopKConfig, JumpReLUConfig, SAEConfig, TopKConfig
from sae.jumprelu import JumpReLUSAE
from sae.topk import TopKSAE


def empty(config: SAEConfig) -> SAE:
    """An SAE of the configured architecture with all parameters zero, to be filled from a file."""
    match config:
        case TopKConfig():
            return TopKSAE(config)
        case BatchTopKConfig():
            return BatchTopKSAE(config)
        case JumpReLUConfig():
            return JumpReLUSAE(config)
        case _:
            assert_never(config)


def build(config: SAEConfig, seed: int) -> SAE:
    """A freshly initialised SAE: decoder rows uniform on the unit sphere, encoder tied to them, biases zero.

    Tied initialisation is what keeps latents alive (Gao et al. 2024, arXiv:2406.04093, section 2.4).
    Equal seeds give equal weights.
    """
    sae = empty(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        directions = torch.randn(config.d_sae, config.d_in, generator=generator)
        directions /= directions.norm(dim=1, keepdim=True)
        sae.W_dec.copy_(directions)
        sae.W_enc.copy_(directions.t())
    return sae
