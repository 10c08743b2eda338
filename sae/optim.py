"""Learning-rate schedule and the unit norm of the decoder's rows."""

import torch
from jaxtyping import Float
from torch import Tensor


def schedule(step: int, n_steps: int, warmup_fraction: float, decay_fraction: float) -> float:
    """Multiplier of the learning rate at `step` (0-based): linear warm-up, constant, linear decay towards zero.

    The first step has a multiplier above 0 and the last one too, so no step is wasted.

        warm-up   (step + 1) / n_warmup          for step < n_warmup
        decay     (n_steps − step) / (n_decay + 1)   for the last n_decay steps
    """
    n_warmup = round(warmup_fraction * n_steps)
    n_decay = round(decay_fraction * n_steps)
    warmup = (step + 1) / n_warmup if step < n_warmup else 1.0
    decay = (n_steps - step) / (n_decay + 1) if step >= n_steps - n_decay else 1.0
    return min(warmup, decay)


@torch.no_grad()
def project_gradient(W_dec: Float[Tensor, "d_sae d_in"], gradient: Float[Tensor, "d_sae d_in"]) -> None:
    """Remove, in place, the part of the gradient along each unit-norm decoder row, which renormalisation would undo.

    Reference: Bricken et al. 2023, Towards Monosemanticity, appendix "Advice for training sparse autoencoders".
    """
    along = torch.linalg.vecdot(gradient, W_dec).unsqueeze(1)
    gradient.addcmul_(W_dec, along, value=-1)


@torch.no_grad()
def normalise_rows(W_dec: Float[Tensor, "d_sae d_in"]) -> None:
    """Scale each row, in place, to norm 1."""
    W_dec.div_(torch.linalg.vector_norm(W_dec, dim=1, keepdim=True).clamp_min_(torch.finfo(W_dec.dtype).tiny))
