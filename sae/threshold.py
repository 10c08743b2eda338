"""The rule that BatchTopK architectures share: a batch selects k latents a token, inference uses one threshold.

    training     the k * n_tokens largest positive pre-activations of the global batch
    inference    relu(pre_acts) * [pre_acts > threshold]

so that a token's latents do not depend on its neighbours.

Reference: Bussmann, Leask, Nanda 2024, arXiv:2412.06410, section 3. Differs: the paper estimates the threshold as the
mean over batches of the smallest kept activation; `calibrate_threshold` solves for mean L0 = k instead.
"""

from abc import abstractmethod
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from sae.base import SAE, SparseLatents
from sae.kernels.cpu import Encoder, select_above

_BIN_SHIFT = 9
"""Bits dropped from a positive float32 to make its histogram bin: 2^22 bins, each 2^-14 of its value wide."""


class ThresholdSAE(SAE):
    """An SAE with one inference threshold for all latents.

    Subclasses call `_add_threshold` in `__init__`; one whose configuration may ask for another rule need not.
    """

    threshold: Float[Tensor, ""]
    float32_tensors = ("threshold",)

    @property
    def has_threshold(self) -> bool:
        """Whether this SAE's configuration asks for the threshold."""
        return "threshold" in self._buffers

    @property
    @abstractmethod
    def target_l0(self) -> int:
        """Mean number of latents a token that the threshold is calibrated to."""

    def _add_threshold(self) -> None:
        self.register_buffer("threshold", torch.zeros((), dtype=torch.float32))

    def activate(self, pre_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        """Pre-activations strictly above the threshold, which is never negative; zero elsewhere."""
        return torch.where(pre_acts.float() > self.threshold, pre_acts, 0).relu()

    @torch.no_grad()
    def encode_sparse(self, x: Float[Tensor, "batch d_in"]) -> SparseLatents:
        """The nonzero entries of `encode(x)` in row-major order, without the dense array. Carries no gradient."""
        if not self.has_threshold:
            return super().encode_sparse(x)
        encoder = Encoder(self._encoder_input(x), self.W_enc, self.b_enc)
        return select_above(encoder, max(float(self.threshold), 0.0))

    @torch.no_grad()
    def scale_latents(self, factor: float) -> None:
        """See `SAE.scale_latents`."""
        super().scale_latents(factor)
        if isinstance(threshold := getattr(self, "threshold", None), Tensor):
            threshold.mul_(factor)

    @torch.no_grad()
    def follow_threshold(self, smallest_kept: float, step: int) -> None:
        """Move the threshold towards the smallest value that a training step kept: a running mean, rate 0.1."""
        if step > 0 and self.threshold.device.type == "cuda":  # without waiting for the device
            self.threshold.mul_(0.9).add_(0.1 * smallest_kept)
            return
        self.threshold.fill_(smallest_kept if step == 0 else 0.9 * float(self.threshold) + 0.1 * smallest_kept)

    @torch.no_grad()
    def calibrate_threshold(self, batches: Iterable[Float[Tensor, "_ d_in"]], k: int | None = None) -> float:
        """Set the threshold so that the mean L0 over the tokens of `batches` is `k`, and return it.

        One pass, memory independent of the number of tokens: positive floats sort like their bit patterns, so a
        histogram of the bits gives the (k * n_tokens)-th largest pre-activation to one part in 2^14.

        Args:
            batches: activations as `encode` takes them; tokens that will not be encoded (sinks) left out.
            k: target, by default `target_l0`.
        Raises:
            ValueError: if `batches` holds no tokens.
        """
        if not self.has_threshold:
            raise ValueError(f"{self.config} has no threshold to calibrate. Only a selection over batches needs one.")
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
        target = (self.target_l0 if k is None else k) * n_tokens
        n_above_edge = counts.flip(0).cumsum(0).flip(0)  # values at or above each bin's lower edge
        bin_index = int((n_above_edge - target).abs().argmin())
        threshold = torch.tensor([bin_index << _BIN_SHIFT], dtype=torch.int32).view(torch.float32)[0]
        self.threshold.copy_(threshold)
        return float(threshold)


def thresholded(sae: SAE) -> ThresholdSAE | None:
    """`sae` if it has a threshold to calibrate, else None."""
    return sae if isinstance(sae, ThresholdSAE) and sae.has_threshold else None
