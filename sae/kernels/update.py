"""Projection, clipping, Adam and the unit norm of decoder rows, row by row while a row is in cache."""

import math
from types import ModuleType

import torch
from torch import Tensor

from sae.base import SAE
from sae.features import SPLIT_DIMS
from sae.kernels.loops import share_evenly, triton_kernels, usable
from sae.parallel import Group

Job = tuple[Tensor, dict[str, Tensor], list[Tensor]]
"""A parameter, its state in Adam, and weight, gradient and both moments as matrices."""


def _rows(tensor: Tensor) -> Tensor | None:
    """The tensor's memory as a matrix, in the order in which it lies; None if it has gaps."""
    if tensor.is_contiguous():
        return tensor.reshape(len(tensor) if tensor.ndim > 1 else 1, -1)
    return tensor.t() if tensor.ndim == 2 and tensor.t().is_contiguous() else None


def _state_of(parameter: Tensor, adam: torch.optim.Adam) -> dict[str, Tensor]:
    """The moments of a parameter as torch's Adam keeps them; zero before the first step."""
    state: dict[str, Tensor] = adam.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return state


def _counted(parameter: Tensor, sae: SAE, latents: Group) -> bool:
    """Whether this process adds the parameter's gradient to the norm of all: what all of them have counts once."""
    return latents.rank == 0 or any(parameter is getattr(sae, name) for name in SPLIT_DIMS)


def _over_latents(norm: Tensor, latents: Group) -> Tensor:
    """Norm of all processes' latents, from that of each."""
    return norm if latents.world_size == 1 else latents.sum(norm.square()).sqrt()


@torch.no_grad()
def clip_gradients(sae: SAE, grad_clip: float, latents: Group) -> None:
    """Scale all gradients so that the norm of all of them together is at most `grad_clip`."""
    if latents.world_size == 1:
        torch.nn.utils.clip_grad_norm_(sae.parameters(), grad_clip)
        return
    gradients = [(parameter, parameter.grad) for parameter in sae.parameters() if parameter.grad is not None]
    own = [gradient.norm() for parameter, gradient in gradients if _counted(parameter, sae, latents)]
    norm = _over_latents(torch.stack(own).norm(), latents)
    scale = (grad_clip / (norm + 1e-6)).clamp(max=1)
    for _, gradient in gradients:
        gradient.mul_(scale)


@torch.no_grad()
def fused_update(sae: SAE, adam: torch.optim.Adam, grad_clip: float | None, latents: Group) -> bool:
    """What `Optimizer._update_in_steps` does, in two passes over the weights instead of about ten.

    1. per row of W_dec, remove the gradient along it (if rows have norm 1); norms of all gradients
    2. per row, clip, step of Adam, and norm 1 again

    Args:
        latents: the processes that the latents are spread over; all of theirs have one norm.

    Returns: False, with nothing changed, where only torch can do it: not float32, or neither numba nor Triton.
    """
    parameters = [parameter for parameter in sae.parameters() if parameter.grad is not None]
    loops, on_gpu = usable(*parameters), triton_kernels(*parameters)
    if loops is None and on_gpu is None:
        return False
    jobs: list[Job] = []
    for parameter in parameters:
        assert parameter.grad is not None
        state = _state_of(parameter, adam)
        tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        matrices = [matrix.detach() for tensor in tensors if (matrix := _rows(tensor)) is not None]
        if len(matrices) < 4 or len({matrix.shape for matrix in matrices}) > 1:
            return False
        jobs.append((parameter, state, matrices))
    if on_gpu is not None:
        _update_on_gpu(on_gpu, sae, adam, grad_clip, latents, jobs)
    else:
        assert loops is not None
        _update_on_cpu(loops, sae, adam, grad_clip, latents, jobs)
    return True


def _update_on_gpu(
    kernels: ModuleType, sae: SAE, adam: torch.optim.Adam, grad_clip: float | None, latents: Group, jobs: list[Job]
) -> None:
    norms = []
    if sae.unit_norm_decoder:
        (decoder,) = (matrices for parameter, _, matrices in jobs if parameter is sae.W_dec)
        norms = [kernels.project(decoder[0], decoder[1], along_rows=True).sum().sqrt()]
    others = [
        grad
        for parameter, _, (_, grad, _, _) in jobs
        if (parameter is not sae.W_dec or not sae.unit_norm_decoder) and _counted(parameter, sae, latents)
    ]
    norms += torch._foreach_norm(others)
    norm = _over_latents(torch.stack(norms).norm(), latents)
    # On the device: the host does not wait for the gradients.
    scale = torch.ones_like(norm) if grad_clip is None else (grad_clip / (norm + 1e-6)).clamp(max=1)
    group = adam.param_groups[0]
    (beta1, beta2), lr, eps = group["betas"], float(group["lr"]), float(group["eps"])
    for parameter, state, (weight, grad, mean, square) in jobs:
        state["step"] = state["step"].cpu() + 1
        t = int(state["step"])
        kernels.adam(
            weight,
            grad,
            mean,
            square,
            scale,
            step_size=lr / (1 - beta1**t),
            betas=(beta1, beta2),
            correction2=1 / math.sqrt(1 - beta2**t),
            eps=eps,
            unit_norm=parameter is sae.W_dec and sae.unit_norm_decoder,
        )


def _update_on_cpu(
    loops: ModuleType, sae: SAE, adam: torch.optim.Adam, grad_clip: float | None, latents: Group, jobs: list[Job]
) -> None:
    arrays = [(parameter, state, [matrix.numpy() for matrix in matrices]) for parameter, state, matrices in jobs]
    squares = []
    for parameter, _, (weight, grad, _, _) in arrays:
        rows = torch.empty(len(weight))
        project = parameter is sae.W_dec and sae.unit_norm_decoder
        share_evenly(loops.project_rows, len(weight), weight.size, weight, grad, rows.numpy(), project)
        if _counted(parameter, sae, latents):
            squares.append(rows.sum(dtype=torch.float64))
    norm = math.sqrt(float(latents.sum(torch.stack(squares).sum())))
    scale = 1.0 if grad_clip is None else min(1.0, grad_clip / (norm + 1e-6))
    group = adam.param_groups[0]
    (beta1, beta2), lr, eps = group["betas"], float(group["lr"]), float(group["eps"])
    for parameter, state, (weight, grad, mean, square) in arrays:
        state["step"] += 1
        t = int(state["step"])
        numbers = (scale, lr / (1 - beta1**t), beta1, beta2, 1 / math.sqrt(1 - beta2**t), eps)
        unit_norm = parameter is sae.W_dec and sae.unit_norm_decoder
        scalars = [weight.dtype.type(number) for number in numbers]
        share_evenly(loops.adam_rows, len(weight), 4 * weight.size, weight, grad, mean, square, *scalars, unit_norm)
