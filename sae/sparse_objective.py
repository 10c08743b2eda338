"""The training objective of the architectures that keep k latents: selection, sparse decoding, AuxK.

All calls from the architectures into `sae.kernels` go through here:

    encoder = training_encoder(sae, x)          the affine map, input shifted by b_dec where the architecture does so
    latents = select_topk(...) or select_batchtopk(...)                 what is kept, no gradient
    live    = live_latents(sae, encoder, latents)                       the same with gradients to the encoder
    x_hat   = reconstruct(sae, live, n_tokens, context)                 sparse decoding

Where latents are spread over processes (`sae.features`), `sae` has this process's own, and selection, decoding and
AuxK agree with the others.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae.base import SAE, SparseLatents
from sae.kernels import cpu as kernels
from sae.kernels import sharded
from sae.kernels.cpu import Encoder, decode
from sae.losses import auxk_loss, reconstruction_loss
from sae.objective import StepContext, StepLosses
from sae.parallel import Group

__all__ = [
    "auxk_term",
    "decode",
    "live_latents",
    "reconstruct",
    "select_batchtopk",
    "select_topk",
    "sparse_losses",
    "step_losses",
]


def training_encoder(sae: SAE, x: Float[Tensor, "batch d_in"]) -> Encoder:
    """The encoder on this batch. `b_dec` enters as a constant here; `live_latents` adds its gradient."""
    return kernels.Encoder(x - sae.b_dec.detach() if sae.subtracts_b_dec else x, sae.W_enc, sae.b_enc)


@torch.no_grad()
def select_topk(encoder: Encoder, k: int, context: StepContext) -> SparseLatents:
    """The k largest positive pre-activations of each token."""
    if context.latents.world_size > 1:
        return sharded.select_topk(encoder, k, context.latents, bf16=context.bf16)
    return kernels.select_topk(encoder, k, bf16=context.bf16)


@torch.no_grad()
def select_batchtopk(encoder: Encoder, k: int, context: StepContext) -> tuple[SparseLatents, float]:
    """The k * n_tokens largest positive pre-activations of the global batch, and the smallest of them."""
    split = context.latents.world_size > 1
    select, group = (sharded.select_batchtopk, context.latents) if split else (kernels.select_batchtopk, context.group)
    latents, smallest_kept = select(encoder, k * context.n_tokens, context.smallest_kept, group, bf16=context.bf16)
    return latents, smallest_kept


def live_latents(sae: SAE, encoder: Encoder, latents: SparseLatents, context: StepContext) -> SparseLatents:
    """The same latents with values that carry gradients to the encoder."""
    b_dec = context.latents.shared(sae.b_dec) if sae.subtracts_b_dec else None
    return kernels.differentiable(latents, encoder, b_dec)


def reconstruct(sae: SAE, live: SparseLatents, n_tokens: int, context: StepContext) -> Float[Tensor, "batch d_out"]:
    """What all latents, this process's and the others', decode to, and `b_dec`."""
    if context.latents.world_size == 1:
        return decode(live, sae.W_dec, sae.b_dec, n_tokens)
    own = decode(live, sae.W_dec, torch.zeros_like(sae.b_dec), n_tokens)
    return context.latents.combine(own) + sae.b_dec


def sparse_losses(
    sae: SAE,
    x: Float[Tensor, "batch d_in"],
    target: Float[Tensor, "batch d_out"],
    encoder: Encoder,
    latents: SparseLatents,
    context: StepContext,
    smallest_kept: float = 0.0,
) -> StepLosses:
    """Reconstruction of `target` from the kept latents, and AuxK.

    total = Σ_b ‖target_b − x_hat_b‖² / (n_tokens · variance) + auxk_alpha · auxk_loss
    """
    x_hat = reconstruct(sae, live_latents(sae, encoder, latents, context), len(x), context)
    bypass = sae.bypass(x)
    if isinstance(bypass, Tensor):
        x_hat = x_hat + bypass
    reconstruction = reconstruction_loss(target, x_hat, context.variance, context.n_tokens)
    total = reconstruction
    if revives_dead_latents(context):
        total = total + auxk_term(sae, x, target - x_hat, context)
    return step_losses(total, reconstruction, latents, len(sae.b_enc), smallest_kept)


def step_losses(
    total: Float[Tensor, ""],
    reconstruction: Float[Tensor, ""],
    latents: SparseLatents,
    n_latents: int,
    smallest_kept: float = 0.0,
) -> StepLosses:
    """The losses with what the kept latents say about firing of the process's own `n_latents`."""
    fired = torch.zeros(n_latents, dtype=torch.bool, device=total.device)
    fired[latents.latent] = True
    n_active = torch.full((), len(latents.value), device=total.device)  # a kernel, where `tensor` would copy
    return StepLosses(total, reconstruction, fired, n_active, smallest_kept)


def revives_dead_latents(context: StepContext) -> bool:
    """Whether this step has an AuxK loss: it is configured, and some latent is dead."""
    if context.auxk_alpha == 0:
        return False
    return bool(context.dead.any()) if context.any_dead is None else context.any_dead


def auxk_term(
    sae: SAE, x: Float[Tensor, "batch d_in"], residual: Float[Tensor, "batch d_out"], context: StepContext
) -> Float[Tensor, ""] | float:
    """auxk_alpha · auxk_loss; 0 while no latent is dead."""
    if not revives_dead_latents(context):
        return 0.0
    residual = residual.detach()
    variance, _ = context.group.total_variance(residual)
    residual_hat = context.latents.combine(decode_dead(sae, x, context.dead, context.k_aux, context.latents))
    return context.auxk_alpha * auxk_loss(residual, residual_hat, variance, context.n_tokens)


def decode_dead(
    sae: SAE, x: Float[Tensor, "batch d_in"], dead: Bool[Tensor, " n_own"], k_aux: int, latents: Group
) -> Float[Tensor, "batch d_out"]:
    """What the k_aux largest dead latents of each token reconstruct, without b_dec (see `losses.auxk_loss`).

    Where latents are spread over processes, the part of it that this process's own latents have.
    """
    W_enc, b_enc = sae.W_enc[:, dead], sae.b_enc[dead]
    if sae.subtracts_b_dec:
        shift = (
            latents.shared(sae.b_dec) - sae.b_dec.detach()
        ) @ W_enc  # zero: it carries the gradient to b_dec without one of x
        pre_acts = (x - sae.b_dec.detach()) @ W_enc + (b_enc - shift)
    else:
        pre_acts = x @ W_enc + b_enc
    if latents.world_size > 1:
        pre_acts = sharded.keep_largest(pre_acts, k_aux, latents)
    elif pre_acts.shape[1] > k_aux:
        top = pre_acts.topk(k_aux, dim=1, sorted=False)
        pre_acts = torch.zeros_like(pre_acts).scatter(1, top.indices, top.values)
    return pre_acts.relu() @ sae.W_dec[dead]
