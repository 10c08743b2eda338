"""Dictionaries whose figures are known."""

import torch

from sae import SAE, Dictionary, TopKConfig, build


def random_dictionary(hook_name: str, d_in: int = 32, d_sae: int = 96, k: int = 8, seed: int = 0) -> Dictionary:
    """Random weights; a decoder bias, so that the zero vector is nothing special."""
    sae = build(TopKConfig(d_in=d_in, d_sae=d_sae, k=k), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        sae.b_dec.copy_(torch.randn(d_in, generator=generator))
        sae.b_enc.copy_(torch.randn(d_sae, generator=generator))
    return Dictionary(sae, hook_name=hook_name)


def perfect_dictionary(hook_name: str, d_in: int = 32) -> Dictionary:
    """x = relu(x) - relu(-x): the reconstruction is x to the last bit."""
    sae = _topk(d_in, 2 * d_in, d_in)
    eye = torch.eye(d_in)
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([eye, -eye], dim=1))
        sae.W_dec.copy_(torch.cat([eye, -eye]))
    return Dictionary(sae, hook_name=hook_name)


def zero_dictionary(hook_name: str, d_in: int = 32) -> Dictionary:
    """Every reconstruction is zero."""
    sae = _topk(d_in, 2 * d_in, d_in)
    with torch.no_grad():
        sae.W_dec.zero_()
    return Dictionary(sae, hook_name=hook_name)


def _topk(d_in: int, d_sae: int, k: int) -> SAE:
    sae = build(TopKConfig(d_in=d_in, d_sae=d_sae, k=k), seed=0)
    with torch.no_grad():
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    return sae
