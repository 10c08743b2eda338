"""JumpReLU: each latent has its own threshold. Also the inference form of BatchTopK and of plain ReLU (threshold 0)."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae.base import SAE, SparseLatents
from sae.config import JumpReLUConfig
from sae.dense_objective import dense_losses, shifted_pre_acts, warmed_up
from sae.kernels.select import select_above_each
from sae.losses import reconstruction_loss
from sae.objective import StepContext, StepLosses
from sae.sparse_objective import decode, live_latents, step_losses, training_encoder

_MAX_DENSITY = 0.1
"""Share of pre-activations active or within reach of their threshold up to which the sparse path is the faster one."""


class JumpReLUSAE(SAE):
    """Sparse autoencoder with one learned threshold θ per latent.

        pre_acts    = (x - b_dec) @ W_enc + b_enc
        latent_acts = relu(pre_acts) * [pre_acts > θ]
        x_hat       = latent_acts @ W_dec + b_dec
        loss        = ‖x − x_hat‖² / variance + λ · Σ_j s_j

        penalty "l0"      s = [pre_acts > θ]
        penalty "tanh"    s = tanh(c · latent_acts),   and + λ_P · Σ_j relu(θ − pre_acts) / variance

    Both are discontinuous in θ; their pseudo-derivatives, with K the rectangle of width 1 and height 1 around 0, are

        ∂ latent_acts / ∂θ = −θ/ε · K((pre_acts − θ)/ε)
        ∂ [pre_acts > θ] / ∂θ = −1/ε · K((pre_acts − θ)/ε)

    With "tanh" the pre-activations get the opposite of the first as well, so that latents just below θ learn.

    References: Rajamanoharan et al. 2024, arXiv:2407.14435, sections 3 and 4 ("l0"); Conerly et al. 2025, Circuits
    Updates January 2025, Dictionary Learning Optimization Techniques ("tanh").
    Differs: θ itself is learned, not its logarithm, and kept at 0 or above, because steps in the logarithm are
    proportional to θ and barely move a small one; the encoder subtracts `b_dec`, which is the same function with
    `b_enc` shifted; decoder rows keep norm 1 in both, which makes the second's weighting by decoder norm 1; λ is in
    units of FVU.
    """

    config: JumpReLUConfig
    float32_tensors = ("threshold",)

    def __init__(self, config: JumpReLUConfig) -> None:
        super().__init__(config)
        self.threshold = nn.Parameter(torch.zeros(config.d_sae))
        if config.penalty == "l0":
            self.adam_betas = (0.0, 0.999)  # the paper's, appendix on training

    def activate(self, pre_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        """Pre-activations strictly above their latent's threshold and positive; zero elsewhere."""
        return torch.where(pre_acts.float() > self.threshold, pre_acts, 0).relu()

    @torch.no_grad()
    def start_at(self, x_centre: Float[Tensor, " d_in"], target_centre: Float[Tensor, " d_out"]) -> None:
        """See `SAE.start_at`; sets the initial threshold too."""
        super().start_at(x_centre, target_centre)
        self.threshold.fill_(self.config.threshold_at_start)

    @torch.no_grad()
    def after_update(self) -> None:
        self.threshold.clamp_(min=0.0)

    @torch.no_grad()
    def scale_latents(self, factor: float) -> None:
        """See `SAE.scale_latents`."""
        super().scale_latents(factor)
        self.threshold.mul_(factor)

    def objective(
        self, x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"], context: StepContext
    ) -> StepLosses:
        """Reconstruction, and the configured penalty by straight-through estimates."""
        config = self.config
        if config.penalty == "l0":
            sparse = self._sparse_objective(x, target, context)
            if sparse is not None:
                return sparse
        pre_acts = shifted_pre_acts(self, x)
        to_input = config.penalty == "tanh"
        latent_acts: Tensor = _JumpReLU.apply(pre_acts, self.threshold, config.window, to_input)  # type: ignore[no-untyped-call]
        x_hat = latent_acts @ self.W_dec + self.b_dec
        reconstruction = reconstruction_loss(target, x_hat, context.variance, context.n_tokens)
        weight = warmed_up(config.sparsity_coefficient, context, config.warmup)
        if config.penalty == "l0":
            active: Tensor = _Step.apply(pre_acts, self.threshold, config.window)  # type: ignore[no-untyped-call]
            total = reconstruction + weight * active.sum() / context.n_tokens
        else:
            saturating = torch.tanh(config.tanh_scale * latent_acts).sum() / context.n_tokens
            below = (self.threshold - pre_acts).relu().sum() / (context.n_tokens * context.variance)
            total = reconstruction + weight * saturating + config.pre_act_coefficient * below
        return dense_losses(total, reconstruction, latent_acts)

    def _sparse_objective(
        self, x: Float[Tensor, "batch d_in"], target: Float[Tensor, "batch d_out"], context: StepContext
    ) -> StepLosses | None:
        """The "l0" objective from the pre-activations above θ − ε/2 alone: no other has a gradient or is active.

        Returns: None where they are too many for this to be faster, as at the start of training.
        """
        config = self.config
        encoder = training_encoder(self, x)
        lower = self.threshold.detach() - 0.51 * config.window  # a little more than ε/2, for rounding
        near = select_above_each(encoder, lower, _MAX_DENSITY)
        if near is None:
            return None
        live = live_latents(self, encoder, near, context)
        value, threshold = live.value.unsqueeze(0), self.threshold[live.latent]
        latent_acts: Tensor = _JumpReLU.apply(value, threshold, config.window, False)  # type: ignore[no-untyped-call]
        active: Tensor = _Step.apply(value, threshold, config.window)  # type: ignore[no-untyped-call]
        x_hat = decode(SparseLatents(live.row, live.latent, latent_acts.squeeze(0)), self.W_dec, self.b_dec, len(x))
        reconstruction = reconstruction_loss(target, x_hat, context.variance, context.n_tokens)
        weight = warmed_up(config.sparsity_coefficient, context, config.warmup)
        total = reconstruction + weight * active.sum() / context.n_tokens
        on = active.detach().squeeze(0) > 0
        kept = SparseLatents(live.row[on], live.latent[on], live.value.detach()[on])
        return step_losses(total, reconstruction, kept, self.d_sae)


def _window(pre_acts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    return ((pre_acts - threshold).abs() < bandwidth / 2).to(pre_acts.dtype)


class _JumpReLU(torch.autograd.Function):
    """pre_acts · [pre_acts > threshold] with the pseudo-derivatives of `JumpReLUSAE`."""

    @staticmethod
    def forward(ctx: Any, pre_acts: Tensor, threshold: Tensor, bandwidth: float, to_input: bool) -> Tensor:
        ctx.save_for_backward(pre_acts, threshold)
        ctx.bandwidth, ctx.to_input = bandwidth, to_input
        return torch.where(pre_acts > threshold, pre_acts, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        pre_acts, threshold = ctx.saved_tensors
        through = grad * _window(pre_acts, threshold, ctx.bandwidth) * (threshold / ctx.bandwidth)
        grad_pre_acts = torch.where(pre_acts > threshold, grad, 0)
        if ctx.to_input:
            grad_pre_acts = grad_pre_acts + through
        return grad_pre_acts, -through.sum(dim=0), None, None


class _Step(torch.autograd.Function):
    """[pre_acts > threshold] with the pseudo-derivative of `JumpReLUSAE`."""

    @staticmethod
    def forward(ctx: Any, pre_acts: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre_acts, threshold)
        ctx.bandwidth = bandwidth
        return (pre_acts > threshold).to(pre_acts.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        pre_acts, threshold = ctx.saved_tensors
        return None, -(grad * _window(pre_acts, threshold, ctx.bandwidth)).sum(dim=0) / ctx.bandwidth, None
