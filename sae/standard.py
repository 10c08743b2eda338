"""Standard: ReLU latents, kept sparse by an L1 penalty."""

from jaxtyping import Float
from torch import Tensor

from sae.base import SAE
from sae.config import StandardConfig
from sae.dense_objective import dense_losses, l1_penalty, shifted_pre_acts, warmed_up
from sae.losses import reconstruction_loss
from sae.objective import StepContext, StepLosses


class StandardSAE(SAE):
    """Sparse autoencoder with ReLU latents and an L1 penalty.

        pre_acts    = (x - b_dec) @ W_enc + b_enc
        latent_acts = relu(pre_acts)
        x_hat       = latent_acts @ W_dec + b_dec
        loss        = ‖x − x_hat‖² / variance + λ · Σ_j latent_acts_j / √(variance * d_in)

    Decoder rows keep norm 1, without which the penalty could be evaded by long rows.

    Reference: Bricken et al. 2023, Towards Monosemanticity, "The architecture and training"; λ = 5 and its warm-up from
    Conerly et al. 2024, Circuits Updates April 2024. Differs: the update frees the decoder's norms and weights the
    penalty by them instead; with rows of norm 1 the weights are 1. Dead latents are not resampled.
    """

    config: StandardConfig

    def __init__(self, config: StandardConfig) -> None:
        super().__init__(config)

    def activate(self, pre_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        """The positive part."""
        return pre_acts.relu()

    def objective(
        self, x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"], context: StepContext
    ) -> StepLosses:
        """Reconstruction, and L1."""
        config = self.config
        latent_acts = shifted_pre_acts(self, x).relu()
        x_hat = latent_acts @ self.W_dec + self.b_dec
        reconstruction = reconstruction_loss(target, x_hat, context.variance, context.n_tokens)
        weight = warmed_up(config.l1_coefficient, context, config.sparsity_warmup_fraction) / self.d_out**0.5
        total = reconstruction + weight * l1_penalty(latent_acts, context)
        return dense_losses(total, reconstruction, latent_acts)
