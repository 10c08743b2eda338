"""A network whose wiring is known: tokens put features into the residual stream, and only one of them is read."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipelines.audit.causal.controls import Traits
from pipelines.audit.causal.intervene import Bench
from sae import Dictionary, JumpReLUConfig, build

D_IN, D_SAE, VOCAB, SEQ = 96, 400, 300, 8
CAUSAL, CORRELATED, TARGET = 0, 1, 5
"""Latents 0 and 1 fire on the same tokens; only latent 0 makes token 5 likelier."""
HOOK = "layers.0"


class _Layer(nn.Module):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


class Wired(nn.Module):
    """Token t puts its features (one to three of them) into the stream; logits read the stream."""

    def __init__(self, directions: Tensor, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        features = torch.zeros(VOCAB, D_SAE)
        for token in range(VOCAB):
            chosen = 2 + torch.randperm(D_SAE - 2, generator=generator)[:3]
            features[token, chosen] = 0.5 + torch.rand(3, generator=generator)
        concept = torch.arange(VOCAB) % 3 == 0
        features[concept, CAUSAL] = 0.5 + torch.rand(int(concept.sum()), generator=generator)
        features[concept, CORRELATED] = 0.5 + torch.rand(int(concept.sum()), generator=generator)
        self.embed = features @ directions
        self.layers = nn.ModuleList([_Layer(), _Layer()])
        self.read = directions[CAUSAL]
        self.head = 0.1 * torch.randn(D_IN, VOCAB, generator=generator)

    def forward(self, input_ids: Tensor, use_cache: bool = False, logits_to_keep: int = 0) -> Any:
        x = self.embed[input_ids]
        for layer in self.layers:
            x = layer(x)
        logits = x @ self.head
        seen = (x @ self.read).relu().mean(dim=1, keepdim=True)  # of the whole prompt, as attention would gather it
        logits[..., TARGET] = logits[..., TARGET] + 2 * seen
        return SimpleNamespace(logits=logits[:, -logits_to_keep:] if logits_to_keep else logits)


@dataclass(frozen=True)
class Net:
    model: Wired
    dictionary: Dictionary
    positive: Bench
    neutral: Bench
    traits: Traits


def net(seed: int, n_prompts: int = 12) -> Net:
    """The network, a dictionary of its true features, and prompts with and without the concept."""
    generator = torch.Generator().manual_seed(1000 + seed)
    directions = torch.randn(D_SAE, D_IN, generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    sae = build(JumpReLUConfig(d_in=D_IN, d_sae=D_SAE), seed=0)
    with torch.no_grad():
        state = {"W_enc": directions.T, "W_dec": directions, "threshold": torch.full((D_SAE,), 0.35)}
        for name, value in sae.named_parameters():
            value.copy_(state.get(name, torch.zeros_like(value)))
    dictionary = Dictionary(sae, hook_name=HOOK)
    model = Wired(directions, seed).eval()
    with_concept, without = torch.arange(0, VOCAB, 3), torch.tensor([t for t in range(VOCAB) if t % 3])
    benches = [
        Bench(model, dictionary, pool[torch.randint(len(pool), (n_prompts, SEQ), generator=generator)])
        for pool in (with_concept, without)
    ]
    latents = torch.cat([dictionary.encode(bench.x.reshape(-1, D_IN)) for bench in benches])
    rng = np.random.default_rng(seed)
    auroc = np.clip(0.5 + 0.05 * rng.standard_normal(D_SAE), 0, 1)
    auroc[[CAUSAL, CORRELATED]] = 1.0
    active = latents.where(latents > 0, torch.nan)
    traits = Traits(
        density=(latents > 0).double().mean(0).numpy(),
        decoder_norm=np.ones(D_SAE),
        strength=torch.nan_to_num(active.nanquantile(0.99, dim=0)).double().numpy(),
        auroc=auroc,
    )
    return Net(model, dictionary, benches[0], benches[1], traits)
