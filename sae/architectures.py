"""From a configuration to an SAE: the one place that knows every architecture."""

from typing import assert_never

import torch

from sae.base import SAE
from sae.batchtopk import BatchTopKSAE
from sae.config import (
    BatchTopKConfig,
    CrosscoderConfig,
    GatedConfig,
    JumpReLUConfig,
    MatryoshkaBatchTopKConfig,
    SAEConfig,
    StandardConfig,
    TopKConfig,
    TranscoderConfig,
)
from sae.crosscoder import Crosscoder
from sae.gated import GatedSAE
from sae.jumprelu import JumpReLUSAE
from sae.matryoshka_batchtopk import MatryoshkaBatchTopKSAE
from sae.standard import StandardSAE
from sae.topk import TopKSAE
from sae.transcoder import Transcoder


def empty(config: SAEConfig) -> SAE:
    """An SAE of the configured architecture with all parameters zero, to be filled from a file."""
    match config:
        case TopKConfig():
            return TopKSAE(config)
        case BatchTopKConfig():
            return BatchTopKSAE(config)
        case JumpReLUConfig():
            return JumpReLUSAE(config)
        case StandardConfig():
            return StandardSAE(config)
        case GatedConfig():
            return GatedSAE(config)
        case MatryoshkaBatchTopKConfig():
            return MatryoshkaBatchTopKSAE(config)
        case TranscoderConfig():
            return Transcoder(config)
        case CrosscoderConfig():
            return Crosscoder(config)
        case _:
            assert_never(config)


def build(config: SAEConfig, seed: int) -> SAE:
    """A freshly initialised SAE: decoder rows uniform on the unit sphere, encoder tied to them, biases zero.

    Tied initialisation is what keeps latents alive (Gao et al. 2024, arXiv:2406.04093, section 2.4). A transcoder reads
    another space than it writes, so its encoder is drawn apart. Equal seeds give equal weights.
    """
    sae = empty(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        sae.W_dec.copy_(_directions(sae.d_sae, sae.d_out, generator))
        tied = not isinstance(config, TranscoderConfig)
        sae.W_enc.copy_((sae.W_dec if tied else _directions(sae.d_sae, sae.d_in, generator)).t())
    return sae


def _directions(n: int, width: int, generator: torch.Generator) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(n, width, generator=generator), dim=1)
