"""Squared errors of whole batches, without the arrays that autograd would keep for them."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae.kernels.loops import share_evenly, triton_kernels, usable


def squared_distance(x: Float[Tensor, "batch width"], y: Float[Tensor, "rows width"]) -> Float[Tensor, ""]:
    """Σ ‖x_b − y_b‖² without the array of differences; y has as many rows as x, or one. Carries no gradient."""
    x, y = x.detach(), y.detach()
    on_gpu = triton_kernels(x, y)
    if on_gpu is not None:
        distances: Tensor = on_gpu.squared_distances(x, y)
        return distances.sum()
    loops = usable(x, y)
    if loops is None:
        return (x - y).square().sum()
    squares = x.new_empty(len(x))
    arrays = (x.contiguous().numpy(), y.contiguous().numpy(), squares.numpy())
    share_evenly(loops.squared_distances, len(x), x.numel(), *arrays)
    return squares.sum()


class _SquaredError(torch.autograd.Function):
    """Σ ‖x_hat_b − x_b‖² with the gradient 2 (x_hat − x) for x_hat alone."""

    @staticmethod
    def forward(ctx: Any, x_hat: Float[Tensor, "batch width"], x: Float[Tensor, "batch width"]) -> Float[Tensor, ""]:
        ctx.save_for_backward(x_hat, x)
        return squared_distance(x_hat, x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x_hat, x = ctx.saved_tensors
        return (x_hat - x).mul_(2 * grads[0]), None


def squared_error(x_hat: Float[Tensor, "batch width"], x: Float[Tensor, "batch width"]) -> Float[Tensor, ""]:
    """Σ ‖x_hat_b − x_b‖², differentiable in `x_hat`."""
    error: Tensor = _SquaredError.apply(x_hat, x)  # type: ignore[no-untyped-call]
    return error
