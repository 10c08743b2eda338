"""TopK: every token keeps its k largest latents."""

import torch
from jaxtyping import Float
from torch import Tensor

from sae.base import SAE, SparseLatents
from sae.config import TopKConfig
from sae.objective import StepContext, StepLosses
from sae.sparse_objective import select_topk, sparse_losses, training_encoder


def keep_topk(
    pre_acts: Float[Tensor, "*batch d_sae"], k: int, *, in_place: bool = False
) -> Float[Tensor, "*batch d_sae"]:
    """The k largest entries of each row where positive, zero elsewhere.

    Args:
        in_place: use the memory of `pre_acts`, which must not be part of a graph, for the result.
    """
    values, indices = pre_acts.topk(k, dim=-1, sorted=False)
    kept = pre_acts.zero_() if in_place else torch.zeros_like(pre_acts)
    return kept.scatter_(-1, indices, values.relu())


class TopKSAE(SAE):
    """Sparse autoencoder that keeps the k largest latents of each token.

        pre_acts    = (x - b_dec) @ W_enc + b_enc
        latent_acts = relu(topk(pre_acts, k))
        x_hat       = latent_acts @ W_dec + b_dec
        loss        = ‖x − x_hat‖² / variance + auxk_alpha * AuxK

    Reference: Gao et al. 2024, arXiv:2406.04093, section 2.3. Differs: none.
    """

    config: TopKConfig

    adam_lr = 3e-3  # least FVU of 1e-4, 3e-4, 1e-3 and 3e-3 over 1M tokens; longer runs may want less

    def __init__(self, config: TopKConfig) -> None:
        super().__init__(config)

    def activate(self, pre_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        """The k largest pre-activations of each token where positive, zero elsewhere; at most k nonzero per token."""
        return keep_topk(pre_acts, self.config.k)

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """See `SAE.encode`."""
        return keep_topk(self.pre_acts(x), self.config.k, in_place=not torch.is_grad_enabled())

    def _sparse_block(self, x: Float[Tensor, "batch d_in"]) -> SparseLatents:
        values, latents = self.pre_acts(x).topk(self.config.k, dim=-1, sorted=False)
        latents, order = latents.sort(dim=-1)
        values = values.gather(-1, order)
        row, slot = (values > 0).nonzero(as_tuple=True)
        return SparseLatents(row, latents[row, slot], values[row, slot])

    def objective(
        self, x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"], context: StepContext
    ) -> StepLosses:
        """Reconstruction from each token's k latents, and AuxK."""
        encoder = training_encoder(self, x)
        return sparse_losses(self, x, target, encoder, select_topk(encoder, self.config.k, context), context)
