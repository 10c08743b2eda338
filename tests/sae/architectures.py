"""One configuration of every architecture and variant, and SAEs of them with every tensor set."""

import torch

from sae import (
    SAE,
    BatchTopKConfig,
    CrosscoderConfig,
    GatedConfig,
    JumpReLUConfig,
    MatryoshkaBatchTopKConfig,
    SAEConfig,
    StandardConfig,
    TopKConfig,
    TranscoderConfig,
    build,
)

D_IN, D_OUT, D_SAE, K = 6, 5, 24, 3

ALL: dict[str, SAEConfig] = {
    "standard": StandardConfig(d_in=D_IN, d_sae=D_SAE),
    "gated": GatedConfig(d_in=D_IN, d_sae=D_SAE),
    "topk": TopKConfig(d_in=D_IN, d_sae=D_SAE, k=K),
    "batchtopk": BatchTopKConfig(d_in=D_IN, d_sae=D_SAE, k=K),
    "jumprelu": JumpReLUConfig(d_in=D_IN, d_sae=D_SAE),
    "jumprelu_tanh": JumpReLUConfig(d_in=D_IN, d_sae=D_SAE, penalty="tanh"),
    "matryoshka_batchtopk": MatryoshkaBatchTopKConfig(d_in=D_IN, d_sae=D_SAE, k=K),
    "matryoshka_sampled": MatryoshkaBatchTopKConfig(d_in=D_IN, d_sae=D_SAE, k=K, n_sampled_prefixes=4),
    "transcoder_topk": TranscoderConfig(d_in=D_IN, d_out=D_OUT, d_sae=D_SAE, k=K, activation="topk"),
    "transcoder_batchtopk": TranscoderConfig(d_in=D_IN, d_out=D_OUT, d_sae=D_SAE, k=K),
    "transcoder_skip": TranscoderConfig(d_in=D_IN, d_out=D_OUT, d_sae=D_SAE, k=K, skip=True),
    "crosscoder_l1": CrosscoderConfig(d_ins=(D_IN, D_OUT), d_sae=D_SAE, sparsity="l1"),
    "crosscoder_batchtopk": CrosscoderConfig(d_ins=(D_IN, D_OUT), d_sae=D_SAE, k=K),
}


def random_sae(config: SAEConfig, seed: int = 1) -> SAE:
    """An SAE whose every tensor differs from its start; thresholds positive, so that some latents are off."""
    sae = build(config, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for tensor in sae.parameters():
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
        if isinstance(threshold := getattr(sae, "threshold", None), torch.Tensor):
            threshold.copy_(0.2 + 0.4 * torch.rand(threshold.shape, generator=generator))
    return sae


def batch(config: SAEConfig, n_tokens: int = 64, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Activations for the configuration: off centre, of unequal variances, and of another scale in each source."""
    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for i, width in enumerate(build(config, seed=0).batch_widths):
        x = torch.randn(n_tokens, width, generator=generator) * torch.linspace(0.5, 2, width) + torch.arange(width)
        tensors.append(x * (3 - 2 * i))
    return tuple(tensors)
