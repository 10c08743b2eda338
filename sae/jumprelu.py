"""JumpReLU: each latent has its own threshold. Also the inference form of BatchTopK and of plain ReLU (threshold 0)."""

import torch
from jaxtyping import Float
from torch import Tensor

from sae.base import SAE
from sae.config import JumpReLUConfig


class JumpReLUSAE(SAE):
    """Sparse autoencoder with one threshold per latent. Loaded and used here; not yet trained here.

        pre_acts    = (x - b_dec) @ W_enc + b_enc
        latent_acts = relu(pre_acts) * [pre_acts > threshold]
        x_hat       = latent_acts @ W_dec + b_dec

    Reference: Rajamanoharan et al. 2024, arXiv:2407.14435, section 3. Differs: the paper's encoder does not subtract
    `b_dec`; the two forms are the same function with `b_enc` shifted by `b_dec @ W_enc`.
    """

    config: JumpReLUConfig
    threshold: Float[Tensor, " d_sae"]

    def __init__(self, config: JumpReLUConfig) -> None:
        super().__init__(config)
        self.register_buffer("threshold", torch.zeros(config.d_sae, dtype=torch.float32))

    def activate(self, pre_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        """Pre-activations strictly above their latent's threshold and positive; zero elsewhere."""
        return torch.where(pre_acts > self.threshold.to(pre_acts.dtype), pre_acts, 0).relu()
