"""Crosscoder: one set of latents reads and reconstructs several hooks, or the same hook of several models."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sae.config import CrosscoderConfig
from sae.dense_objective import dense_losses, l1_penalty, shifted_pre_acts, warmed_up
from sae.losses import reconstruction_loss
from sae.normalise import Normaliser
from sae.objective import StepContext, StepLosses
from sae.sparse_objective import select_batchtopk, sparse_losses, training_encoder
from sae.threshold import ThresholdSAE


class Crosscoder(ThresholdSAE):
    """Sparse autoencoder of several sources at once; each source s has its own encoder and decoder.

        pre_acts    = Σ_s (x_s - b_dec_s) @ W_enc_s + b_enc
        latent_acts = relu(pre_acts), or the BatchTopK rule
        x_hat_s     = latent_acts @ W_dec_s + b_dec_s
        loss        = Σ_s ‖x_s − x_hat_s‖² / Σ_s variance_s
                      + λ · Σ_j latent_acts_j · Σ_s ‖W_dec_s,j‖ / √(variance * d_in)                      ("l1")
                      + auxk_alpha * AuxK                                                                ("batchtopk")

    Side by side, the sources are one activation vector of width Σ d_ins and their weights one `W_enc` and one `W_dec`,
    so `encode` takes and `decode` gives `join`ed activations. The norms of a latent's parts say whose it is
    (`source_norms`). With "l1" the decoder norms are free, since the penalty weighs them.

    References: Lindsey et al. 2024, Sparse Crosscoders for Cross-Layer Features and Model Diffing ("l1"); Minder et al.
    2025, arXiv:2504.02922 ("batchtopk"). Differs: the encoder subtracts b_dec; with "batchtopk" the joined decoder row
    keeps norm 1 and the selection ranks activations, where the paper ranks activations times summed norms.
    """

    config: CrosscoderConfig

    def __init__(self, config: CrosscoderConfig) -> None:
        super().__init__(config)
        self.unit_norm_decoder = config.sparsity == "batchtopk"
        if config.sparsity == "batchtopk":
            self._add_threshold()

    @property
    def target_l0(self) -> int:
        return self.config.k

    @property
    def batch_widths(self) -> tuple[int, ...]:
        return self.config.d_ins

    def input_and_target(
        self, batch: Sequence[Float[Tensor, "batch _"]]
    ) -> tuple[Float[Tensor, "batch d_in"], Float[Tensor, "batch d_out"]]:
        x = self.join(batch)
        return x, x

    def join(self, sources: Sequence[Float[Tensor, "*batch _"]]) -> Float[Tensor, "*batch d_in"]:
        """The activations of all sources side by side, as `encode` takes them."""
        return torch.cat(list(sources), dim=-1)

    def split(self, x: Float[Tensor, "*batch d_in"]) -> tuple[Float[Tensor, "*batch _"], ...]:
        """The parts of each source, of joined activations or of `W_dec`."""
        parts: tuple[Tensor, ...] = torch.split(x, list(self.config.d_ins), dim=-1)
        return parts

    def source_norms(self) -> Float[Tensor, "d_sae n_sources"]:
        """Norm of each latent's decoder row in each source."""
        return torch.stack([part.norm(dim=1) for part in self.split(self.W_dec)], dim=1)

    def activate(self, pre_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        """By the configured rule."""
        return super().activate(pre_acts) if self.has_threshold else pre_acts.relu()

    @torch.no_grad()
    def fold(self, normalisers: Sequence[Normaliser]) -> None:
        """See `SAE.fold`; each source has its own map (x_s − m_s) · s_s. The latent activations keep their units."""
        scale = torch.cat([normaliser.scale.expand(len(normaliser.shift)) for normaliser in normalisers])
        shift = torch.cat([normaliser.shift for normaliser in normalisers])
        self.b_dec.copy_(self.b_dec / scale + shift)
        self.W_enc.mul_(scale.unsqueeze(1))
        self.W_dec.div_(scale)

    def objective(
        self, x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"], context: StepContext
    ) -> StepLosses:
        """Reconstruction of all sources, and the configured way of keeping it sparse."""
        config = self.config
        if config.sparsity == "batchtopk":
            encoder = training_encoder(self, x)
            latents, smallest_kept = select_batchtopk(encoder, config.k, context)
            return sparse_losses(self, x, target, encoder, latents, context, smallest_kept)
        latent_acts = shifted_pre_acts(self, x).relu()
        x_hat = latent_acts @ self.W_dec + self.b_dec
        reconstruction = reconstruction_loss(target, x_hat, context.variance, context.n_tokens)
        weight = warmed_up(config.l1_coefficient, context, config.sparsity_warmup_fraction) / self.d_out**0.5
        total = reconstruction + weight * l1_penalty(latent_acts * self.source_norms().sum(dim=1), context)
        return dense_losses(total, reconstruction, latent_acts)
