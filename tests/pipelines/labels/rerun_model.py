"""A tiny language model and a dictionary at one of its hooks, for tests that run both."""

import torch
from torch.nn.functional import normalize

from pipelines.config import ModelConfig
from pipelines.models import LanguageModel, resolve_model
from sae import Dictionary, StandardConfig, build
from tests.tiny import write_tiny_model

D_MODEL = 32


def tiny_lm(folder):
    """A random Llama of three layers."""
    config = ModelConfig(source=str(write_tiny_model(folder, d_model=D_MODEL)), dtype="float32", device="cpu")
    return LanguageModel(resolve_model(config), config)


def random_dictionary(hook_name, d_sae, seed=0, **provenance):
    """Random unit decoder rows; every latent fires on the half space of its row."""
    sae = build(StandardConfig(d_in=D_MODEL, d_sae=d_sae, l1_coefficient=1.0), seed=seed)
    rows = normalize(torch.randn(d_sae, D_MODEL, generator=torch.Generator().manual_seed(seed)), dim=1)
    with torch.no_grad():
        sae.W_dec.copy_(rows)
        sae.W_enc.copy_(rows.T)
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    return Dictionary(sae.requires_grad_(False), hook_name=hook_name, provenance=provenance)
