"""SAE: what every architecture shares. Parameters, the encoder's affine map, the decoder, and the two output types.

An architecture adds one rule, `activate`: which pre-activations become latent activations at inference.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae.config import SAEConfig


class SAEOutput(NamedTuple):
    """What `SAE.forward` returns."""

    x_hat: Float[Tensor, "*batch d_in"]
    latent_acts: Float[Tensor, "*batch d_sae"]


class SparseLatents(NamedTuple):
    """The nonzero latent activations of a flat batch in row-major order: latent_acts[row[i], latent[i]] = value[i]."""

    row: Int[Tensor, " n_active"]
    latent: Int[Tensor, " n_active"]
    value: Float[Tensor, " n_active"]


class SAE(nn.Module, ABC):
    """Sparse autoencoder over activations of width `d_in` with `d_sae` latents.

        pre_acts    = (x - b_dec) @ W_enc + b_enc
        latent_acts = activate(pre_acts)            # the architecture's rule
        x_hat       = latent_acts @ W_dec + b_dec

    Inputs may have any float dtype; the arithmetic and the outputs have the dtype of the weights.
    """

    config: SAEConfig

    def __init__(self, config: SAEConfig) -> None:
        super().__init__()
        self.config = config
        # W_enc has shape (d_in, d_sae) but is stored latent by latent, like W_dec: a latent's encoder and decoder
        # directions are both contiguous, so the gradients of the sparse path land in the layout of the parameter.
        self.W_enc = nn.Parameter(torch.zeros(config.d_sae, config.d_in).t())
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae))
        self.W_dec = nn.Parameter(torch.zeros(config.d_sae, config.d_in))
        self.b_dec = nn.Parameter(torch.zeros(config.d_in))

    @property
    def d_in(self) -> int:
        return self.config.d_in

    @property
    def d_sae(self) -> int:
        return self.config.d_sae

    @abstractmethod
    def activate(self, pre_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        """Latent activations from pre-activations by the inference rule; never negative."""

    def _centred(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        if x.shape[-1] != self.d_in:
            raise ValueError(
                f"The last dimension of `x` must be d_in={self.d_in}, got shape {tuple(x.shape)}. "
                "Pass activations from the hook that this SAE was trained on."
            )
        return x.to(self.W_enc.dtype) - self.b_dec

    def pre_acts(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Encoder output before the activation rule.

        Raises: ValueError if the last dimension of `x` is not `d_in`.
        """
        x_centred = self._centred(x)
        return torch.addmm(self.b_enc, x_centred.reshape(-1, self.d_in), self.W_enc).reshape(*x.shape[:-1], self.d_sae)

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Latent activations of `x`, dense, by the inference rule; zero where a latent is off, never negative."""
        return self.activate(self.pre_acts(x))

    def encode_sparse(self, x: Float[Tensor, "batch d_in"]) -> SparseLatents:
        """The nonzero entries of `encode(x)` in row-major order."""
        latent_acts = self.encode(x)
        row, latent = latent_acts.nonzero(as_tuple=True)
        return SparseLatents(row, latent, latent_acts[row, latent])

    def decode(self, latent_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_in"]:
        """Reconstruction from latent activations."""
        return latent_acts.to(self.W_dec.dtype) @ self.W_dec + self.b_dec

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> SAEOutput:
        """Reconstruction and latent activations of `x`."""
        latent_acts = self.encode(x)
        return SAEOutput(self.decode(latent_acts), latent_acts)
