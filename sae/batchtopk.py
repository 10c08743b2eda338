"""BatchTopK: a batch shares its budget of k latents per token; inference uses one threshold for all latents."""

from jaxtyping import Float
from torch import Tensor

from sae.config import BatchTopKConfig
from sae.objective import StepContext, StepLosses
from sae.sparse_objective import select_batchtopk, sparse_losses, training_encoder
from sae.threshold import ThresholdSAE


class BatchTopKSAE(ThresholdSAE):
    """Sparse autoencoder whose training keeps the k * n_tokens largest positive latents of a batch.

        pre_acts    = (x - b_dec) @ W_enc + b_enc
        latent_acts = pre_acts * [pre_acts among the k * n_tokens largest positive of the batch]     (training)
        latent_acts = relu(pre_acts) * [pre_acts > threshold]                                        (inference)
        x_hat       = latent_acts @ W_dec + b_dec
        loss        = ‖x − x_hat‖² / variance + auxk_alpha * AuxK

    Training follows the selection in `sae.kernels`; `encode` is the inference rule.

    Reference: Bussmann, Leask, Nanda 2024, arXiv:2412.06410, section 3. Differs: the threshold, see `sae.threshold`.
    """

    config: BatchTopKConfig

    adam_lr = 3e-3  # least FVU of 1e-4, 3e-4, 1e-3 and 3e-3 over 1M tokens; longer runs may want less

    def __init__(self, config: BatchTopKConfig) -> None:
        super().__init__(config)
        self._add_threshold()

    @property
    def target_l0(self) -> int:
        return self.config.k

    def objective(
        self, x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"], context: StepContext
    ) -> StepLosses:
        """Reconstruction from the batch's selection, and AuxK."""
        encoder = training_encoder(self, x)
        latents, smallest_kept = select_batchtopk(encoder, self.config.k, context)
        return sparse_losses(self, x, target, encoder, latents, context, smallest_kept)
