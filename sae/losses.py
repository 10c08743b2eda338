"""Training losses, each a ratio of squared errors, so that neither depends on the scale of the activations."""

from jaxtyping import Float
from torch import Tensor

from sae.kernels.errors import squared_distance, squared_error


def total_variance(x: Float[Tensor, "batch d_in"]) -> Float[Tensor, ""]:
    """Variance of a batch summed over dimensions: mean_b ‖x_b − mean(x)‖²."""
    return squared_distance(x, x.mean(dim=0, keepdim=True)) / len(x)


def reconstruction_loss(
    x: Float[Tensor, "batch d_in"], x_hat: Float[Tensor, "batch d_in"], variance: Float[Tensor, ""], n_tokens: int
) -> Float[Tensor, ""]:
    """Squared error per token over the variance of the inputs: the batch's fraction of variance unexplained.

        Σ_b ‖x_b − x_hat_b‖² / (n_tokens · variance)

    Reference: Gao et al. 2024, arXiv:2406.04093, section 2.1 and the normalised MSE of appendix A.

    Args:
        variance: `total_variance` of the whole batch. With several processes it is the variance of the global batch.
        n_tokens: tokens in the whole batch, so that the processes' losses add up.
    """
    return squared_error(x_hat, x) / (n_tokens * variance)


def auxk_loss(
    residual: Float[Tensor, "batch d_in"],
    residual_hat: Float[Tensor, "batch d_in"],
    variance: Float[Tensor, ""],
    n_tokens: int,
) -> Float[Tensor, ""]:
    """How badly the dead latents alone reconstruct what the live ones missed; its gradient revives them.

        e     = x − x_hat                            (a constant: no gradient flows into the live latents)
        e_hat = topk_aux(pre_acts of dead latents) @ W_dec          (no b_dec: it is already in x_hat)
        loss  = Σ_b ‖e_b − e_hat_b‖² / (n_tokens · variance(e))

    The trainer adds it with coefficient 1/32.

    Reference: Gao et al. 2024, arXiv:2406.04093, appendix A.2.

    Args:
        residual: e; detached here.
        variance: `total_variance` of the residual over the whole batch.
        n_tokens: tokens in the whole batch.
    """
    return squared_error(residual_hat, residual.detach()) / (n_tokens * variance)
