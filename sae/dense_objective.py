"""What the objectives share that compute every latent of every token: standard, gated, JumpReLU.

Sparsity penalties are sums over latents, averaged over tokens, in units that do not depend on the scale of the data:

    L1     coefficient * mean_b Σ_j f_bj / √(variance * d_out)        f has the units of x
    L0     coefficient * mean_b Σ_j [f_bj > 0]                         a count

With inputs scaled to a variance of d_out, as the trainer's default does, the first is the form of Anthropic 2024
(Circuits Updates, April) divided by d_out, as the reconstruction loss is, so that their coefficients carry over.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from sae.base import SAE
from sae.objective import StepContext, StepLosses


def shifted_pre_acts(sae: SAE, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
    """(x − b_dec) @ W_enc + b_enc with its gradients, without the product that a gradient of x would cost."""
    if not sae.subtracts_b_dec:
        return torch.addmm(sae.b_enc, x, sae.W_enc)
    fixed = sae.b_dec.detach()
    shift = (sae.b_dec - fixed) @ sae.W_enc  # zero: it carries the gradient to b_dec
    return torch.addmm(sae.b_enc - shift, x - fixed, sae.W_enc)


def warmed_up(coefficient: float, context: StepContext, fraction: float) -> float:
    """The sparsity coefficient at this step: linear from 0 over the first `fraction` of the run, then constant."""
    n_warmup = round(fraction * context.n_steps)
    return coefficient * min(1.0, (context.step + 1) / n_warmup) if n_warmup else coefficient


def l1_penalty(weighted_acts: Float[Tensor, "batch d_sae"], context: StepContext) -> Float[Tensor, ""]:
    """mean_b Σ_j f_bj / √variance, this process's share. `weighted_acts` must not be negative."""
    return weighted_acts.sum() / (context.n_tokens * context.variance.sqrt())


def dense_losses(
    total: Float[Tensor, ""], reconstruction: Float[Tensor, ""], latent_acts: Float[Tensor, "batch d_sae"]
) -> StepLosses:
    """The losses with what the latent activations say about firing."""
    active = latent_acts.detach() > 0
    return StepLosses(total, reconstruction, active.any(dim=0), active.sum())
