"""Dense oracle of the training path: plain tensor operations and autograd, slow and obviously right."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def topk_mask(pre_acts: Float[Tensor, "batch d_sae"], k: int) -> Bool[Tensor, "batch d_sae"]:
    """The k largest positive pre-activations of each row; of equal values the lowest latent wins."""
    order = pre_acts.argsort(dim=1, descending=True, stable=True)[:, :k]
    chosen = torch.zeros_like(pre_acts, dtype=torch.bool).scatter_(1, order, True)
    return chosen & (pre_acts > 0)


def batchtopk_mask(pre_acts: Float[Tensor, "batch d_sae"], n_keep: int) -> Bool[Tensor, "batch d_sae"]:
    """The `n_keep` largest positive pre-activations of the batch; of equal values the lowest flat index wins."""
    order = pre_acts.flatten().argsort(descending=True, stable=True)[:n_keep]
    chosen = torch.zeros(pre_acts.numel(), dtype=torch.bool, device=pre_acts.device).scatter_(0, order, True)
    return chosen.view_as(pre_acts) & (pre_acts > 0)


def forward(
    x: Float[Tensor, "batch d_in"],
    W_enc: Float[Tensor, "d_in d_sae"],
    b_enc: Float[Tensor, " d_sae"],
    W_dec: Float[Tensor, "d_sae d_in"],
    b_dec: Float[Tensor, " d_in"],
    mask: Bool[Tensor, "batch d_sae"],
) -> Float[Tensor, "batch d_in"]:
    """Reconstruction from the masked latents, differentiable in every parameter."""
    pre_acts = (x - b_dec) @ W_enc + b_enc
    return torch.where(mask, pre_acts, 0) @ W_dec + b_dec
