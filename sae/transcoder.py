"""Transcoder: sparse latents of one hook's activations predict another's, such as an MLP's output from its input."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae.config import TranscoderConfig
from sae.normalise import Normaliser
from sae.objective import StepContext, StepLosses
from sae.sparse_objective import select_batchtopk, select_topk, sparse_losses, training_encoder
from sae.threshold import ThresholdSAE
from sae.topk import keep_topk


class Transcoder(ThresholdSAE):
    """Sparse map from activations x of width d_in to activations y of width d_out.

        pre_acts    = x @ W_enc + b_enc
        latent_acts = k of them a token, by the TopK or the BatchTopK rule, or those above thresholds of their own
        y_hat       = latent_acts @ W_dec + b_dec  (+ x @ W_skip.T)
        loss        = ‖y − y_hat‖² / variance(y) + auxk_alpha * AuxK

    `forward` gives y_hat; `decode` leaves the skip connection out, since it does not pass the latents (`bypass`).

    References: Dunefsky, Chlenski, Nanda 2024, arXiv:2406.11944; TopK and the skip connection: Paulo, Shabalin, Belrose
    2025, arXiv:2501.18823. Differs: W_skip starts at 0, decoder rows at norm 1 (there: 0), and `b_enc` starts where the
    centre of x has pre-activations 0, which stands in for the shift by b_dec of an autoencoder.
    """

    config: TranscoderConfig
    subtracts_b_dec = False

    def __init__(self, config: TranscoderConfig) -> None:
        super().__init__(config)
        if config.activation == "batchtopk":
            self._add_threshold()
        elif config.activation == "jumprelu":
            self.threshold = nn.Parameter(torch.zeros(config.d_sae))
        if config.skip:
            self.W_skip = nn.Parameter(torch.zeros(config.d_out, config.d_in))

    @property
    def d_out(self) -> int:
        return self.config.d_out

    @property
    def target_l0(self) -> int:
        return self.config.k

    @property
    def batch_widths(self) -> tuple[int, ...]:
        return (self.config.d_in, self.config.d_out)

    def input_and_target(
        self, batch: Sequence[Float[Tensor, "batch _"]]
    ) -> tuple[Float[Tensor, "batch d_in"], Float[Tensor, "batch d_out"]]:
        return batch[0], batch[1]

    def activate(self, pre_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        """By the configured rule."""
        return keep_topk(pre_acts, self.config.k) if self.config.activation == "topk" else super().activate(pre_acts)

    def bypass(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"] | float:
        """The skip connection's part of the output."""
        return x.to(self.W_skip.dtype) @ self.W_skip.t() if self.config.skip else 0.0

    @torch.no_grad()
    def start_at(self, x_centre: Float[Tensor, " d_in"], target_centre: Float[Tensor, " d_out"]) -> None:
        """See `SAE.start_at`."""
        self.b_dec.copy_(target_centre)
        self.b_enc.copy_(-(x_centre @ self.W_enc))

    @torch.no_grad()
    def fold(self, normalisers: Sequence[Normaliser]) -> None:
        """See `SAE.fold`; x and y have each their own map, (x − m) · s and (y − n) · t.

        latent_acts / t = activate((x @ W_enc · s + b_enc − s m @ W_enc) / t)
        y_hat           = latent_acts / t @ W_dec + (b_dec / t + n − s/t m @ W_skip.T) + s/t x @ W_skip.T
        """
        of_x, of_y = normalisers
        s, t = float(of_x.scale), float(of_y.scale)
        self.b_enc.sub_(s * (of_x.shift @ self.W_enc))
        self.W_enc.mul_(s)
        self.W_dec.div_(t)
        self.b_dec.copy_(self.b_dec / t + of_y.shift)
        if self.config.skip:
            self.W_skip.mul_(s / t)
            self.b_dec.sub_(of_x.shift @ self.W_skip.t())
        self.scale_latents(1 / t)

    def objective(
        self, x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"], context: StepContext
    ) -> StepLosses:
        """Prediction of the target from the selected latents, and AuxK.

        Raises: ValueError for a jumprelu transcoder.
        """
        if self.config.activation == "jumprelu":
            raise ValueError(
                "A transcoder with a threshold for each latent can be loaded, but not trained. Train one with "
                "activation 'batchtopk' or 'topk'."
            )
        encoder = training_encoder(self, x)
        if not self.has_threshold:
            return sparse_losses(self, x, target, encoder, select_topk(encoder, self.config.k, context), context)
        latents, smallest_kept = select_batchtopk(encoder, self.config.k, context)
        return sparse_losses(self, x, target, encoder, latents, context, smallest_kept)
