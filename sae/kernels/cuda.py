"""The loops of the sparse training path for NVIDIA GPUs, in Triton. Same operations as `sae.kernels.compiled`.

Off unless SAE_TRITON=1 (`sae.kernels.loops.triton_kernels`): the tests have run these through Triton's interpreter, on
a CPU, and not yet on a GPU. Without it a GPU takes torch operations. With it, selection by token, decoding and the
weight gradients are these; the selection over a batch and the optimizer's step still are torch operations.

One program handles one row, or one row of the output and a stretch of its columns; each sums in index order, without
atomics, so that results repeat bit for bit. Nothing here waits for the device.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


def _jit(function: F) -> Any:
    """`triton.jit`, for the type checker."""
    return cast(Any, triton.jit(function))


@_jit
@no_type_check
def _topk(pre_acts, latents, values, counts, width, k, BLOCK: tl.constexpr):
    """One row: the k largest positive entries, ascending; of equal ones the lowest latent."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    value = tl.load(pre_acts + row * width + column, mask=column < width, other=-1.0)
    key = value.to(tl.int32, bitcast=True)  # positive floats sort like their bits
    kth = 0
    for i in range(31):
        candidate = kth | (1 << (30 - i))
        reached = tl.sum((key >= candidate).to(tl.int32), axis=0)
        kth = tl.where(reached >= k, candidate, kth)
    kth = tl.maximum(kth, 1)
    above = key > kth
    tie = key == kth
    n_ties = k - tl.sum(above.to(tl.int32), axis=0)
    keep = above | (tie & (tl.cumsum(tie.to(tl.int32), axis=0) <= n_ties))
    place = tl.cumsum(keep.to(tl.int32), axis=0) - 1
    tl.store(latents + row * k + place, column.to(tl.int64), mask=keep)
    tl.store(values + row * k + place, value, mask=keep)
    tl.store(counts + row, tl.sum(keep.to(tl.int32), axis=0))


@_jit
@no_type_check
def _weighted_sums(starts, members, weights, table, base, out, width, HAS_BASE: tl.constexpr, BLOCK: tl.constexpr):
    """One stretch of columns of out[i] = base + Σ weights[e] * table[members[e]], starts[i] <= e < starts[i + 1]."""
    i = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    if HAS_BASE:
        total += tl.load(base + column, mask=inside, other=0.0)
    for e in range(tl.load(starts + i), tl.load(starts + i + 1)):
        member = tl.load(members + e)
        total += tl.load(weights + e) * tl.load(table + member * width + column, mask=inside, other=0.0)
    tl.store(out + i * width + column, total, mask=inside)


@_jit
@no_type_check
def _dots(starts, members, left, right, dots, width, BLOCK: tl.constexpr):
    """dots[e] = left[row] · right[members[e]] for the entries of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    own = tl.load(left + row * width + column, mask=inside, other=0.0)
    for e in range(tl.load(starts + row), tl.load(starts + row + 1)):
        member = tl.load(members + e)
        other = tl.load(right + member * width + column, mask=inside, other=0.0)
        tl.store(dots + e, tl.sum(own * other, axis=0))


@_jit
@no_type_check
def _project(weight, grad, squares, width, PROJECT: tl.constexpr, BLOCK: tl.constexpr):
    """Remove from a row of the gradient its part along the unit vector `weight`; squares = norm² of what is left."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    g = tl.load(grad + row * width + column, mask=inside, other=0.0)
    if PROJECT:
        w = tl.load(weight + row * width + column, mask=inside, other=0.0)
        g -= tl.sum(g * w, axis=0) * w
        tl.store(grad + row * width + column, g, mask=inside)
    tl.store(squares + row, tl.sum(g * g, axis=0))


@_jit
@no_type_check
def _adam(
    weight, grad, mean, square, scale, width, step_size, beta1, beta2, correction2, eps,
    UNIT_NORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row's step of Adam on the gradient times scale[0], then norm 1."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    at = row * width + column
    g = tl.load(grad + at, mask=inside, other=0.0) * tl.load(scale)
    m = tl.load(mean + at, mask=inside, other=0.0)
    v = tl.load(square + at, mask=inside, other=0.0)
    m += (1 - beta1) * (g - m)
    v = beta2 * v + (1 - beta2) * g * g
    w = tl.load(weight + at, mask=inside, other=0.0) - step_size * m / (tl.sqrt(v) * correction2 + eps)
    if UNIT_NORM:
        w /= tl.maximum(tl.sqrt(tl.sum(tl.where(inside, w * w, 0.0), axis=0)), 1e-30)
    tl.store(mean + at, m, mask=inside)
    tl.store(square + at, v, mask=inside)
    tl.store(weight + at, w, mask=inside)


def topk(pre_acts: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest positive entries of each row, ties to the lowest column.

    Args:
        pre_acts: (rows, width) float32, contiguous, width at most 65,536.
    Returns: columns and values, both (rows, k), and how many of each row count; what stands behind them is undefined.
    """
    n_rows, width = pre_acts.shape
    latents = torch.zeros(n_rows, k, dtype=torch.int64, device=pre_acts.device)
    values = torch.zeros(n_rows, k, dtype=torch.float32, device=pre_acts.device)
    counts = torch.zeros(n_rows, dtype=torch.int32, device=pre_acts.device)
    block = triton.next_power_of_2(width)
    _topk[(n_rows,)](
        pre_acts.contiguous(), latents, values, counts, width, k, BLOCK=block, num_warps=min(32, max(4, block // 1024))
    )
    return latents, values, counts


def weighted_sums(starts: Tensor, members: Tensor, weights: Tensor, table: Tensor, base: Tensor | None) -> Tensor:
    """base + Σ weights[e] * table[members[e]] over the entries of each bin (`sae.kernels.cpu._weighted_sums`)."""
    n_bins, width = len(starts) - 1, table.shape[1]
    out = torch.empty(n_bins, width, dtype=table.dtype, device=table.device)
    block = min(1024, triton.next_power_of_2(width))
    arrays = (starts, members, weights.contiguous(), table.contiguous(), table if base is None else base, out)
    _weighted_sums[(n_bins, triton.cdiv(width, block))](*arrays, width, HAS_BASE=base is not None, BLOCK=block)
    return out


def dots(starts: Tensor, members: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """left[row] · right[members[e]] for the entries of each row."""
    found = torch.empty(len(members), dtype=left.dtype, device=left.device)
    width = left.shape[1]
    arrays = (starts, members, left.contiguous(), right.contiguous(), found)
    _dots[(len(left),)](*arrays, width, BLOCK=triton.next_power_of_2(width))
    return found


def project(weight: Tensor, grad: Tensor, *, along_rows: bool) -> Tensor:
    """In place, the gradient without its part along the rows of `weight`; returns the norm² of each row."""
    squares = torch.empty(len(grad), dtype=torch.float32, device=grad.device)
    width = grad.shape[1]
    _project[(len(grad),)](weight, grad, squares, width, PROJECT=along_rows, BLOCK=triton.next_power_of_2(width))
    return squares


def adam(
    weight: Tensor,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    scale: Tensor,
    *,
    step_size: float,
    betas: tuple[float, float],
    correction2: float,
    eps: float,
    unit_norm: bool,
) -> None:
    """A step of Adam, in place, on matrices (`sae.kernels.compiled.adam_rows`); `scale` is one number on the device."""
    width = weight.shape[1]
    numbers = (step_size, *betas, correction2, eps)
    _adam[(len(weight),)](
        weight, grad, mean, square, scale, width, *numbers, UNIT_NORM=unit_norm, BLOCK=triton.next_power_of_2(width)
    )
