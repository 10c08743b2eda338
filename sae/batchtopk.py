"""BatchTopK: a batch shares its budget of k latents per token; inference uses one threshold for all latents."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from sae.base import SAE, SparseLatents
from sae.config import BatchTopKConfig
from sae.kernels.cpu import Encoder, select_above

_BIN_SHIFT = 9
"""Bits dropped from a positive float32 to make its histogram bin: 2^22 bins, each 2^-14 of its value wide."""


class BatchTopKSAE(SAE):
    """Sparse autoencoder whose training keeps the k * n_tokens largest positive latents of a batch.

        pre_acts    = (x - b_dec) @ W_enc + b_enc
        latent_acts = pre_acts * [pre_acts among the k * n_tokens largest positive of the batch]     (training)
        latent_acts = relu(pre_acts) * [pre_acts > threshold]                                        (inference)
        x_hat       = latent_acts @ W_dec + b_dec

    Training follows the selection in `sae.kernels`; `encode` is the inference rule, so that a token's latents do not
    depend on its neighbours.

    Reference: Bussmann, Leask, Nanda 2024, arXiv:2412.06410, section 3. Differs: the paper estimates the threshold as
    the mean over batches of the smallest kept activation; `calibrate_threshold` solves for mean L0 = k instead.
    """

    config: BatchTopKConfig
    threshold: Float[Tensor, ""]

    def __init__(self, config: BatchTopKConfig) -> None:
        super().__init__(config)
        self.register_buffer("threshold", torch.zeros((), dtype=torch.float32))

    def activate(self, pre_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        """Pre-activations strictly above the threshold, which is never negative; zero elsewhere."""
        return torch.where(pre_acts > self.threshold.to(pre_acts.dtype), pre_acts, 0).relu()

    @torch.no_grad()
    def encode_sparse(self, x: Float[Tensor, "batch d_in"]) -> SparseLatents:
        """The nonzero entries of `encode(x)` in row-major order, without the dense array. Carries no gradient."""
        encoder = Encoder(self._centred(x), self.W_enc, self.b_enc)
        return select_above(encoder, max(float(self.threshold), 0.0))

    @torch.no_grad()
    def calibrate_threshold(self, batches: Iterable[Float[Tensor, "_ d_in"]], k: int | None = None) -> float:
        """Set the threshold so that the mean L0 over the tokens of `batches` is `k`, and return it.

        One pass, memory independent of the number of tokens: positive floats sort like their bit patterns, so a
        histogram of the bits gives the (k * n_tokens)-th largest pre-activation to one part in 2^14.

        Args:
            batches: activations as `encode` takes them; tokens that will not be encoded (sinks) left out.
            k: target, by default `config.k`.
        Raises:
            ValueError: if `batches` holds no tokens.
        """
        counts = torch.zeros(2 ** (31 - _BIN_SHIFT), dtype=torch.int64)
        n_tokens = 0
        for batch in batches:
            pre_acts = self.pre_acts(batch).float()
            bits = pre_acts[pre_acts > 0].cpu().view(torch.int32) >> _BIN_SHIFT
            counts += torch.bincount(bits, minlength=len(counts))
            n_tokens += len(batch)
        if n_tokens == 0:
            raise ValueError(
                "calibrate_threshold needs at least one token, got no batches. Pass activations of the training split."
            )
        target = (self.config.k if k is None else k) * n_tokens
        n_above_edge = counts.flip(0).cumsum(0).flip(0)  # values at or above each bin's lower edge
        bin_index = int((n_above_edge - target).abs().argmin())
        threshold = torch.tensor([bin_index << _BIN_SHIFT], dtype=torch.int32).view(torch.float32)[0]
        self.threshold.copy_(threshold)
        return float(threshold)
