"""Gated: one affine map decides which latents fire, a rescaled copy of it how strongly."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae.base import SAE
from sae.config import GatedConfig
from sae.dense_objective import dense_losses, l1_penalty, shifted_pre_acts, warmed_up
from sae.losses import reconstruction_loss
from sae.objective import StepContext, StepLosses


class GatedSAE(SAE):
    """Sparse autoencoder whose L1 penalty does not shrink activations.

        pre_acts    = (x - b_dec) @ W_enc + b_enc                                  π_gate; b_enc is the paper's b_gate
        magnitude   = ((x - b_dec) @ W_enc) * exp(r_mag) + b_mag                   π_mag
        latent_acts = [pre_acts > 0] * relu(magnitude)
        x_hat       = latent_acts @ W_dec + b_dec
        loss        = ‖x − x_hat‖² / variance + λ · Σ_j relu(pre_acts)_j / √(variance * d_in)
                      + ‖x − (relu(pre_acts) @ W_dec' + b_dec')‖² / variance

    where W_dec' and b_dec' are constants: the last term teaches the gate alone. Decoder rows keep norm 1.

    Reference: Rajamanoharan et al. 2024, arXiv:2404.16014, section 3 and appendix on training. Differs: none but the
    units of λ (`sae.dense_objective`).
    """

    config: GatedConfig

    def __init__(self, config: GatedConfig) -> None:
        super().__init__(config)
        self.r_mag = nn.Parameter(torch.zeros(config.d_sae))
        self.b_mag = nn.Parameter(torch.zeros(config.d_sae))

    def activate(self, pre_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        """The magnitude where the gate is open and it is positive, zero elsewhere."""
        magnitude = (pre_acts - self.b_enc) * self.r_mag.exp() + self.b_mag
        return torch.where(pre_acts > 0, magnitude, 0).relu()

    @torch.no_grad()
    def scale_latents(self, factor: float) -> None:
        """See `SAE.scale_latents`."""
        super().scale_latents(factor)
        self.b_mag.mul_(factor)

    def objective(
        self, x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"], context: StepContext
    ) -> StepLosses:
        """Reconstruction, L1 on the gate, and what the gate alone reconstructs through a frozen decoder."""
        config = self.config
        pre_acts = shifted_pre_acts(self, x)
        latent_acts = self.activate(pre_acts)
        x_hat = latent_acts @ self.W_dec + self.b_dec
        reconstruction = reconstruction_loss(target, x_hat, context.variance, context.n_tokens)
        gate = pre_acts.relu()
        gate_hat = gate @ self.W_dec.detach() + self.b_dec.detach()
        weight = warmed_up(config.l1_coefficient, context, config.sparsity_warmup_fraction) / self.d_out**0.5
        total = (
            reconstruction
            + weight * l1_penalty(gate, context)
            + reconstruction_loss(target, gate_hat, context.variance, context.n_tokens)
        )
        return dense_losses(total, reconstruction, latent_acts)
