"""SAE: what every architecture shares. Parameters, the encoder's affine map, the decoder, and the two output types.

An architecture adds two rules: `activate`, which pre-activations become latent activations at inference, and
`objective`, what training minimises. Further tensors need their part of `scale_latents`, so that `fold` stays exact.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae.config import SAEConfig
from sae.normalise import Normaliser
from sae.objective import StepContext, StepLosses
from sae.tokennorm import TokenNorm, normalise_tokens, token_scale

_BLOCK_ELEMENTS = 2**24
"""Pre-activations that `encode_sparse` holds at a time: 64 MB in float32."""


class SAEOutput(NamedTuple):
    """What `SAE.forward` returns."""

    x_hat: Float[Tensor, "*batch d_out"]
    latent_acts: Float[Tensor, "*batch d_sae"]


class SparseLatents(NamedTuple):
    """The nonzero latent activations of a flat batch in row-major order: latent_acts[row[i], latent[i]] = value[i]."""

    row: Int[Tensor, " n_active"]
    latent: Int[Tensor, " n_active"]
    value: Float[Tensor, " n_active"]

    def per_token(self, n_tokens: int) -> tuple[Int[Tensor, "n_tokens most"], Float[Tensor, "n_tokens most"]]:
        """Indices and values of each token's active latents, as wide as the token with most; padded with −1 and 0."""
        counts = torch.bincount(self.row, minlength=n_tokens)
        width = int(counts.max()) if len(counts) else 0
        slot = torch.arange(len(self.row), device=self.row.device) - (counts.cumsum(0) - counts)[self.row]
        latents = self.latent.new_full((n_tokens, width), -1)
        values = self.value.new_zeros(n_tokens, width)
        latents[self.row, slot], values[self.row, slot] = self.latent, self.value
        return latents, values


class SAE(nn.Module, ABC):
    """Sparse autoencoder over activations of width `d_in` with `d_sae` latents.

        pre_acts    = (x - b_dec) @ W_enc + b_enc
        latent_acts = activate(pre_acts)            # the architecture's rule
        x_hat       = latent_acts @ W_dec + b_dec

    Inputs may have any float dtype; the arithmetic and the outputs have the dtype of the weights.
    """

    config: SAEConfig

    subtracts_b_dec: ClassVar[bool] = True
    """Whether the encoder reads x − b_dec (else x)."""
    token_norm: TokenNorm = "none"
    """How each token is normalised by its own mean or norm before the encoder, as some foreign dictionaries do it;
    `encode` takes and `forward` returns raw activations."""
    unit_norm_decoder: bool = True
    """Whether training keeps the decoder rows at norm 1."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates where `TrainerConfig.betas` leaves them to the architecture."""

    adam_lr: float = 1e-3
    """Adam's peak learning rate where `TrainerConfig.lr` leaves it to the architecture."""
    float32_tensors: ClassVar[tuple[str, ...]] = ()
    """Tensors that stay float32 when the rest is cast: rounding a threshold would switch latents on and off."""

    def __init__(self, config: SAEConfig) -> None:
        super().__init__()
        self.config = config
        # W_enc has shape (d_in, d_sae) but is stored latent by latent, like W_dec: a latent's encoder and decoder
        # directions are both contiguous, so the gradients of the sparse path land in the layout of the parameter.
        self.W_enc = nn.Parameter(torch.zeros(config.d_sae, config.d_in).t())
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae))
        self.W_dec = nn.Parameter(torch.zeros(config.d_sae, self.d_out))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out))

    @property
    def d_in(self) -> int:
        return self.config.d_in

    @property
    def d_out(self) -> int:
        """Width of what is reconstructed."""
        return self.config.d_in

    @property
    def d_sae(self) -> int:
        return self.config.d_sae

    @abstractmethod
    def activate(self, pre_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        """Latent activations from pre-activations by the inference rule; never negative."""

    @abstractmethod
    def objective(
        self, x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"], context: StepContext
    ) -> StepLosses:
        """What a training step minimises, on this process's share of a normalised batch."""

    # ---- inference ------------------------------------------------------------------------------------------------

    def _encoder_input(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        if x.shape[-1] != self.d_in:
            raise ValueError(
                f"The last dimension of `x` must be d_in={self.d_in}, got shape {tuple(x.shape)}. "
                "Pass activations from the hook that this SAE was trained on."
            )
        x = normalise_tokens(x.to(self.W_enc.dtype), self.token_norm)
        return x - self.b_dec if self.subtracts_b_dec else x

    def pre_acts(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Encoder output before the activation rule.

        Raises: ValueError if the last dimension of `x` is not `d_in`.
        """
        x_read = self._encoder_input(x)
        return torch.addmm(self.b_enc, x_read.reshape(-1, self.d_in), self.W_enc).reshape(*x.shape[:-1], self.d_sae)

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Latent activations of `x`, dense, by the inference rule; zero where a latent is off, never negative."""
        return self.activate(self.pre_acts(x))

    def encode_sparse(self, x: Float[Tensor, "batch d_in"]) -> SparseLatents:
        """The nonzero entries of `encode(x)` in row-major order; no dense array is larger than a block of tokens."""
        n_rows = max(1, _BLOCK_ELEMENTS // self.d_sae)
        parts = [self._sparse_block(x[start : start + n_rows]) for start in range(0, max(1, len(x)), n_rows)]
        rows = [part.row + i * n_rows for i, part in enumerate(parts)]
        return SparseLatents(
            torch.cat(rows), torch.cat([part.latent for part in parts]), torch.cat([part.value for part in parts])
        )

    def _sparse_block(self, x: Float[Tensor, "batch d_in"]) -> SparseLatents:
        latent_acts = self.encode(x)
        row, latent = latent_acts.nonzero(as_tuple=True)
        return SparseLatents(row, latent, latent_acts[row, latent])

    def decode(
        self, latent_acts: Float[Tensor, "*batch d_sae"], x: Float[Tensor, "*batch d_in"] | None = None
    ) -> Float[Tensor, "*batch d_out"]:
        """Reconstruction from latent activations.

        Args:
            x: what was encoded; only an SAE with `token_norm` needs it, to undo the normalisation of each token.
        Raises: ValueError if such an SAE gets no `x`.
        """
        return self._denormalised(latent_acts.to(self.W_dec.dtype) @ self.W_dec + self.b_dec, x)

    def _denormalised(
        self, x_hat: Float[Tensor, "*batch d_out"], x: Float[Tensor, "*batch d_in"] | None
    ) -> Float[Tensor, "*batch d_out"]:
        if self.token_norm == "none":
            return x_hat
        if x is None:
            raise ValueError(
                f"This SAE normalises each token (`token_norm` is {self.token_norm!r}): its reconstruction depends on "
                "the activations that were encoded. Pass them as `x`, or call the SAE itself."
            )
        scale = token_scale(x.to(self.W_dec.dtype), self.token_norm)
        return x_hat * scale.multiplier + scale.shift

    def decode_sparse(
        self, latents: SparseLatents, n_tokens: int, x: Float[Tensor, "n_tokens d_in"] | None = None
    ) -> Float[Tensor, "n_tokens d_out"]:
        """`decode` of sparse latent activations in row-major order: a weighted sum of a few decoder rows per token.

        Args:
            x: see `decode`.
        """
        counts = torch.bincount(latents.row, minlength=n_tokens)
        x_hat = self.b_dec + nn.functional.embedding_bag(
            latents.latent,
            self.W_dec,
            counts.cumsum(0) - counts,
            per_sample_weights=latents.value.to(self.W_dec.dtype),
            mode="sum",
        )
        return self._denormalised(x_hat, x)

    def output_scale(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch 1"] | float:
        """What a change of latents times `W_dec` is multiplied by in the output; 1 without `token_norm`."""
        return 1.0 if self.token_norm == "none" else token_scale(x.to(self.W_dec.dtype), self.token_norm).multiplier

    def bypass(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"] | float:
        """What of the output goes past the latents; 0 but for a skip connection."""
        return 0.0

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> SAEOutput:
        """Reconstruction and latent activations of `x`."""
        latent_acts = self.encode(x)
        return SAEOutput(self.decode(latent_acts, x) + self.bypass(x), latent_acts)

    # ---- training -------------------------------------------------------------------------------------------------

    @property
    def batch_widths(self) -> tuple[int, ...]:
        """Widths of the tensors that a training batch holds: one, but for transcoders and crosscoders."""
        return (self.d_in,)

    def input_and_target(
        self, batch: Sequence[Float[Tensor, "batch _"]]
    ) -> tuple[Float[Tensor, "batch d_in"], Float[Tensor, "batch d_out"]]:
        """What the encoder reads and what is reconstructed, from the tensors of a batch."""
        return batch[0], batch[0]

    @torch.no_grad()
    def start_at(self, x_centre: Float[Tensor, " d_in"], target_centre: Float[Tensor, " d_out"]) -> None:
        """Set the biases before the first step, so that the latents need not learn the centre of the data."""
        self.b_dec.copy_(target_centre)

    def after_update(self) -> None:
        """Bring the parameters back to where they must lie, after each step of the optimizer."""

    # ---- folding --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def scale_latents(self, factor: float) -> None:
        """Multiply every latent activation by `factor` (positive) without changing the reconstruction, in place.

        Exact for every rule that compares pre-activations with each other or with a threshold that is scaled too.
        """
        self.W_enc.mul_(factor)
        self.b_enc.mul_(factor)
        self.W_dec.div_(factor)

    @torch.no_grad()
    def fold(self, normalisers: Sequence[Normaliser]) -> None:
        """Turn the SAE of normalised activations into the same function of raw ones, in place.

        With s(x − m) as input and the reconstruction mapped back:

            latent_acts / s = activate(((x − m − b_dec / s) @ W_enc + b_enc / s)

        so `b_dec` becomes m + b_dec / s, `b_enc` and thresholds are divided by s, and the decoder keeps its row norms.

        Args:
            normalisers: one for each tensor of a training batch.
        """
        (normaliser,) = normalisers
        scale = float(normaliser.scale)
        self.b_dec.copy_(self.b_dec / scale + normaliser.shift)
        self.W_enc.mul_(scale)
        self.W_dec.div_(scale)
        self.scale_latents(1 / scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SAE":
        """`nn.Module.to` and its kin, with `float32_tensors` kept in float32."""
        exact: dict[str, Any] = {
            name: getattr(self, name).detach().clone() for name in self.float32_tensors if hasattr(self, name)
        }
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in exact.items():
            tensor = getattr(self, name)
            tensor.data = value.to(tensor.device)
        return self
