"""Matryoshka BatchTopK: nested dictionaries, each of which must reconstruct the activations with its own latents."""

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from sae.base import SparseLatents
from sae.config import MatryoshkaBatchTopKConfig
from sae.losses import reconstruction_loss
from sae.objective import StepContext, StepLosses
from sae.sparse_objective import auxk_term, decode, live_latents, select_batchtopk, step_losses, training_encoder
from sae.threshold import ThresholdSAE

_PARETO = 0.5
"""Exponent of the sampled prefix sizes: P(size > m) falls like m^-0.5 (Nabeshima 2024)."""


class MatryoshkaBatchTopKSAE(ThresholdSAE):
    """BatchTopK with nested prefixes: general latents come first, and cannot be absorbed by specific ones.

        latent_acts = as BatchTopK, one selection over all latents
        x_hat_m     = latent_acts[:m] @ W_dec[:m] + b_dec
        loss        = mean over prefix sizes m of ‖x − x_hat_m‖² / variance + auxk_alpha * AuxK

    The prefix sizes are fixed, or drawn anew in each step from a truncated Pareto distribution; the last is d_sae. A
    prefix adds to the one before, so all of them cost one decoding. `encode` and `decode` are those of BatchTopK.

    References: Bussmann, Nabeshima, Karvonen, Nanda 2025, arXiv:2503.17547, section 3; sampled prefixes: Nabeshima
    2024, Matryoshka Sparse Autoencoders (Alignment Forum). Differs: the mean over prefixes, where the paper has the
    sum, so that the AuxK weight means the same as elsewhere.
    """

    config: MatryoshkaBatchTopKConfig

    def __init__(self, config: MatryoshkaBatchTopKConfig) -> None:
        super().__init__(config)
        self._add_threshold()

    @property
    def target_l0(self) -> int:
        return self.config.k

    def prefixes(self, step: int) -> tuple[int, ...]:
        """The prefix sizes of one training step, rising; the same whenever the step is taken."""
        n_prefixes = self.config.n_sampled_prefixes
        if not n_prefixes:
            return self.config.fixed_prefixes
        generator = torch.Generator().manual_seed(step)
        uniform = torch.rand(n_prefixes - 1, generator=generator, dtype=torch.float64)
        shortest = self.d_sae**-_PARETO
        sizes = (1 - uniform * (1 - shortest)).pow(-1 / _PARETO).long().clamp(1, self.d_sae)
        return tuple(sorted({*sizes.tolist(), self.d_sae}))

    def objective(
        self, x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"], context: StepContext
    ) -> StepLosses:
        """Mean reconstruction loss over the prefixes, and AuxK on what all latents leave."""
        encoder = training_encoder(self, x)
        latents, smallest_kept = select_batchtopk(encoder, self.config.k, context)
        live = live_latents(self, encoder, latents, context)
        prefixes = self.prefixes(context.step)
        own = context.latents.share(self.d_sae)  # all latents, unless they are spread over processes
        x_hat = self.b_dec.expand(len(x), -1)
        nothing = torch.zeros_like(self.b_dec)
        losses = []
        edges = [min(max(edge - own.start, 0), len(self.b_enc)) for edge in (0, *prefixes)]
        rows = torch.split(self.W_dec, [stop - start for start, stop in pairwise(edges)])
        for (start, stop), W_dec in zip(pairwise(edges), rows, strict=True):
            inside = ((live.latent >= start) & (live.latent < stop)).nonzero().squeeze(1)
            group = SparseLatents(live.row[inside], live.latent[inside] - start, live.value[inside])
            x_hat = x_hat + context.latents.combine(decode(group, W_dec, nothing, len(x)))
            losses.append(reconstruction_loss(target, x_hat, context.variance, context.n_tokens))
        total = torch.stack(losses).mean() + auxk_term(self, x, target - x_hat, context)
        return step_losses(total, losses[-1], latents, len(self.b_enc), smallest_kept)
