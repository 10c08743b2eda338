"""Selection: which pre-activations become latent activations. The only dense product of a training step is here.

The encoder runs over blocks of tokens and only the survivors of each block are kept. Its product is in bfloat16 where
the processor multiplies bfloat16 faster than float32 (`multiplies_bf16`); survivors are then found with a margin of
their rounding and recomputed in float32, so that values, ties and, up to that margin, the selection are those of
float32.

Ties go to the lowest flat index, row * d_sae + latent.
"""

from functools import cache
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae.base import SparseLatents
from sae.kernels.loops import share_evenly, triton_kernels, usable
from sae.parallel import Group

_BLOCK_ELEMENTS = 4_000_000
"""Pre-activations computed at a time: 16 MB in float32, about the last-level cache's share of two cores."""

_GPU_BLOCK_ELEMENTS = 2**26
"""The same on a GPU: enough rows to fill its matrix units."""

_BOUND_MARGIN = 0.9
"""Lower bound of a BatchTopK selection as a share of the last step's threshold: about 1.4 survivors per kept entry."""

_GPU_BOUND_MARGIN = 0.97
"""A closer one that is tried first on a GPU, which finds survivors fast and is slow to compute their values again."""

_BF16_SLACK = 2
"""Steps of bfloat16 (each 0.4 to 0.8 %) below the k-th value within which entries are candidates for the k largest."""


class Encoder(NamedTuple):
    """The parameters of the encoder, and the activations already shifted by `b_dec`."""

    x_centred: Float[Tensor, "batch d_in"]
    W_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, " d_sae"]


class BatchSelection(NamedTuple):
    """What a BatchTopK selection kept, and the smallest value kept anywhere in the global batch."""

    latents: SparseLatents
    smallest_kept: float


@cache
def multiplies_bf16(device: torch.device) -> bool:
    """Whether the device has matrix units for bfloat16: AMX on a CPU, tensor cores on a GPU."""
    if device.type == "cpu":
        return bool(torch.cpu._is_amx_tile_supported())
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def largest(values: Float[Tensor, " n"], n_keep: int) -> Bool[Tensor, " n"]:
    """Mask of the `n_keep` largest values; of equal ones those with the lowest index."""
    if n_keep >= len(values):
        return torch.ones_like(values, dtype=torch.bool)
    if values.device.type == "cuda":  # the same without waiting for the device
        smallest = values.topk(n_keep, sorted=False).values.min()
        above, tied = values > smallest, values == smallest
        return above | (tied & (tied.cumsum(0) <= n_keep - above.sum()))
    loops = usable(values)
    if loops is not None and bool((values > 0).all()):
        key, n_above = loops.nth_largest(values.contiguous().view(torch.int32).numpy(), n_keep)
        smallest = torch.tensor(key, dtype=torch.int32).view(torch.float32)
        keep = values > smallest
        n_above = int(n_above)
    else:
        smallest = values.topk(n_keep, sorted=False).values.min()
        keep = values > smallest
        n_above = int(keep.sum())
    ties = (values == smallest).nonzero().squeeze(1)
    keep[ties[: n_keep - n_above]] = True
    return keep


def _block_rows(encoder: Encoder) -> int:
    elements = _GPU_BLOCK_ELEMENTS if encoder.W_enc.device.type == "cuda" else _BLOCK_ELEMENTS
    return max(1, elements // encoder.W_enc.shape[1])


def _key(value: float) -> int:
    """The bits of a float32 of at least 0; they sort like the number."""
    return int(np.float32(value).view(np.int32))


def _search(encoder: Encoder, k: int, bound: float, bf16: bool) -> SparseLatents | None:
    """Pre-activations above `bound`, the k largest of each row or (k = 0) all; None where only torch works."""
    x, W_enc, b_enc = encoder.x_centred.detach().contiguous(), encoder.W_enc.detach(), encoder.b_enc.detach()
    lowest = np.int32(max(1, (_key(bound) >> 16) - _BF16_SLACK) if bf16 else max(1, _key(bound) + 1))
    on_gpu = triton_kernels(x, W_enc, b_enc)
    if on_gpu is not None:
        return SparseLatents(*on_gpu.search(x, W_enc, b_enc, k, bound, int(lowest), bf16=bf16))
    loops = usable(x, W_enc, b_enc)
    if loops is None:
        return None
    d_sae, dtype = W_enc.shape[1], torch.bfloat16 if bf16 else torch.float32
    by_latent = W_enc.t().contiguous().numpy()
    low = tuple(tensor.to(dtype) for tensor in (x, W_enc, b_enc))
    slack = np.int32(_BF16_SLACK if bf16 else 0)
    capacity = min(d_sae, (2 * k if bf16 else k) or 256)
    n_rows = min(_block_rows(encoder), len(x))
    buffer = torch.empty(n_rows, d_sae, dtype=dtype)
    parts: list[SparseLatents] = []
    for start in range(0, len(x), n_rows):
        block = torch.addmm(low[2], low[0][start : start + n_rows], low[1], out=buffer[: min(n_rows, len(x) - start)])
        keys = block.view(torch.int16 if bf16 else torch.int32).numpy()
        n_block = len(block)
        counts = np.empty(n_block, np.int64)
        while True:
            latents = np.empty((n_block, capacity), np.int32)
            share_evenly(loops.select_rows, n_block, block.numel(), keys, k, lowest, slack, latents, counts)
            if counts.max() <= capacity:
                break
            capacity = min(d_sae, 2 * int(counts.max()))
        values = np.empty((n_block, capacity), np.float32)
        n_found = int(counts.sum())
        if bf16:
            rows = x[start : start + n_rows].numpy()
            work = n_found * x.shape[1]
            share_evenly(loops.recompute, n_block, work, rows, by_latent, b_enc.numpy(), latents, counts, values)
            share_evenly(loops.prune, n_block, n_found, latents, values, counts, k, np.float32(bound))
        else:
            share_evenly(loops.take, n_block, n_found, block.numpy(), latents, counts, values)
        parts.append(_flattened(loops, latents, values, counts, start))
    return SparseLatents(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _flattened(
    loops: ModuleType, latents: np.ndarray, values: np.ndarray, counts: np.ndarray, first_row: int
) -> SparseLatents:
    """The first counts[row] entries of each row of the tables (rows, capacity), one after the other."""
    offsets = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    n = int(offsets[-1])
    found = SparseLatents(torch.empty(n, dtype=torch.int64), torch.empty(n, dtype=torch.int64), torch.empty(n))
    flat = (tensor.numpy() for tensor in found)
    share_evenly(loops.flatten, len(counts), n, latents, values, counts, offsets, first_row, *flat)
    return found


def select_above_each(encoder: Encoder, lower: Float[Tensor, " d_sae"], max_density: float) -> SparseLatents | None:
    """All pre-activations strictly above the bound of their latent, in row-major order, negative ones included.

    Returns: None as soon as a block of tokens has more than `max_density` of all its pre-activations above the bounds,
        or the compiled loops find a token with more than four times that: dense products are then faster.
    """
    x, W_enc, b_enc = encoder.x_centred.detach().contiguous(), encoder.W_enc.detach(), encoder.b_enc.detach()
    loops = usable(x, W_enc, b_enc, lower)
    capacity = min(len(b_enc), max(64, int(4 * max_density * len(b_enc))))
    n_rows = _block_rows(encoder)
    parts = []
    for start in range(0, len(x), n_rows):
        block = torch.addmm(b_enc, x[start : start + n_rows], W_enc)
        if loops is None:
            row, latent = (block > lower).nonzero(as_tuple=True)
            found = SparseLatents(row + start, latent, block[row, latent])
        else:
            latents, counts = np.empty((len(block), capacity), np.int32), np.empty(len(block), np.int64)
            tables = (block.numpy(), lower.detach().contiguous().numpy())
            share_evenly(loops.select_above_each, len(block), block.numel(), *tables, latents, counts)
            if counts.max() > capacity or counts.sum() > max_density * block.numel():
                return None
            values = np.empty((len(block), capacity), np.float32)
            share_evenly(loops.take, len(block), int(counts.sum()), tables[0], latents, counts, values)
            found = _flattened(loops, latents, values, counts, start)
        if len(found.value) > max_density * block.numel():
            return None
        parts.append(found)
    return SparseLatents(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def select_above(encoder: Encoder, bound: float, *, bf16: bool = False) -> SparseLatents:
    """All pre-activations strictly above `bound`, which must not be negative, in row-major order.

    Args:
        bf16: run the dense product in bfloat16 to find candidates, then compute their values in float32. Entries within
            the rounding of bfloat16 (about 0.4 %) of the bound may be missed, all values are exact.
    """
    found = _search(encoder, 0, bound, bf16)
    if found is not None:
        return found
    d_sae = encoder.W_enc.shape[1]
    dtype = torch.bfloat16 if bf16 else encoder.W_enc.dtype
    x, W_enc, b_enc = (tensor.to(dtype) for tensor in encoder)
    n_rows = _block_rows(encoder)
    flat_indices, values = [], []
    for start in range(0, len(x), n_rows):
        block = torch.addmm(b_enc, x[start : start + n_rows], W_enc).view(-1)
        index = (block > bound).nonzero().squeeze(1)
        values.append(block[index])
        flat_indices.append(index + start * d_sae)
    flat_index, value = torch.cat(flat_indices), torch.cat(values)
    row = torch.div(flat_index, d_sae, rounding_mode="floor")
    found = SparseLatents(row, flat_index - row * d_sae, value)
    if not bf16:
        return found
    value = _exact(found, encoder)
    keep = value > bound
    return SparseLatents(found.row[keep], found.latent[keep], value[keep])


def _exact(found: SparseLatents, encoder: Encoder) -> Float[Tensor, " n_active"]:
    """The float32 values of entries found in lower precision."""
    x, W_enc, b_enc = encoder
    offsets = torch.zeros(len(x) + 1, dtype=torch.int64, device=x.device)
    torch.cumsum(torch.bincount(found.row, minlength=len(x)), 0, out=offsets[1:])
    dots: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        x, W_enc.t(), found.latent, offsets, found.row, 0
    )
    return dots + b_enc[found.latent]


def _estimate_smallest_kept(encoder: Encoder, share: float) -> float:
    """The value that `share` of all pre-activations exceed, judged by the first block of rows; not below 0."""
    rows = encoder.x_centred[: _block_rows(encoder)]
    block = torch.addmm(encoder.b_enc, rows, encoder.W_enc).view(-1)
    n_above = max(1, min(len(block), round(share * len(block))))
    return float(block.topk(n_above, sorted=False).values.min().relu())


def batch_candidates(
    encoder: Encoder, n_keep: int, last_smallest: float, group: Group, *, bf16: bool = False
) -> SparseLatents:
    """This process's pre-activations above a bound that at least `n_keep` of all processes' reach, or all positive."""
    if last_smallest == 0:
        n_own = n_keep / group.world_size
        estimate = _estimate_smallest_kept(encoder, n_own / (len(encoder.x_centred) * len(encoder.b_enc)))
        last_smallest = group.mean_float(estimate)
    closer = (_GPU_BOUND_MARGIN,) if encoder.W_enc.device.type == "cuda" else ()
    for share in (*closer, _BOUND_MARGIN, 0.5, 0.0):
        bound = share * last_smallest
        found = select_above(encoder, bound, bf16=bf16)
        if bound == 0 or group.sum_int(len(found.value)) >= n_keep:
            break
    return found


def select_batchtopk(
    encoder: Encoder, n_keep: int, last_smallest: float, group: Group, *, bf16: bool = False
) -> BatchSelection:
    """The `n_keep` largest positive pre-activations of the batch whose rows the processes of `group` hold together.

    Exact whatever `last_smallest` is: it only brackets the search. When fewer than `n_keep` survive the bracket, it is
    lowered, in the end to zero. The batch is the processes' rows one after the other, in order of rank.

    Args:
        n_keep: k times the tokens of the global batch.
        last_smallest: `smallest_kept` of the step before; 0 when there was none, which estimates it. Equal in all
            processes.
    """
    found = batch_candidates(encoder, n_keep, last_smallest, group, bf16=bf16)
    everywhere, own = group.gather_values(found.value)
    keep = largest(everywhere, n_keep)
    smallest_kept = float(torch.where(keep, everywhere, torch.inf).min()) if len(everywhere) else 0.0
    index = keep[own].nonzero().squeeze(1)
    return BatchSelection(SparseLatents(*(tensor[index] for tensor in found)), smallest_kept)


def select_topk(encoder: Encoder, k: int, *, bf16: bool = False) -> SparseLatents:
    """The k largest pre-activations of each row where positive, in row-major order.

    Args:
        bf16: find candidates in bfloat16 (see `select_above`); rows where bfloat16 rounding ties more than twice k
            entries are cut by the lowest latent.
    """
    found = _search(encoder, k, 0.0, bf16)
    if found is not None:
        return found
    n_rows = _block_rows(encoder)
    parts = [
        _topk_of_block(encoder._replace(x_centred=encoder.x_centred[start : start + n_rows]), k, start, bf16)
        for start in range(0, len(encoder.x_centred), n_rows)
    ]
    return SparseLatents(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _topk_of_block(encoder: Encoder, k: int, first_row: int, bf16: bool) -> SparseLatents:
    x, W_enc, b_enc = encoder
    d_sae = W_enc.shape[1]
    if bf16:
        pre_acts = torch.addmm(b_enc.bfloat16(), x.bfloat16(), W_enc.bfloat16())
        candidate = pre_acts.topk(min(2 * k, d_sae), dim=1, sorted=False).indices.sort(dim=1).values
        rows = torch.arange(len(x), device=x.device).unsqueeze(1).expand_as(candidate)
        found = SparseLatents(rows.reshape(-1), candidate.reshape(-1), pre_acts.new_empty(0, dtype=x.dtype))
        values = _exact(found, encoder).view_as(candidate)
        chosen, slot = _topk_lowest_first(values, k)
        latent = candidate.gather(1, slot)
    else:
        chosen, latent = _topk_lowest_first(torch.addmm(b_enc, x, W_enc), k)
    latent, order = latent.sort(dim=1)
    value = chosen.gather(1, order)
    row, slot = (value > 0).nonzero(as_tuple=True)
    return SparseLatents(row + first_row, latent[row, slot], value[row, slot])


def _topk_lowest_first(values: Float[Tensor, "rows width"], k: int) -> tuple[Tensor, Tensor]:
    """`values.topk(k)` that resolves ties to the lowest column: rows whose k-th value is not unique are sorted."""
    if k >= values.shape[1]:
        return values.topk(k, dim=1, sorted=False)
    top = values.topk(k + 1, dim=1)
    value, index = top.values[:, :k], top.indices[:, :k].clone()
    tied = ((top.values[:, k] == top.values[:, k - 1]) & (top.values[:, k] > 0)).nonzero().squeeze(1)
    if len(tied):
        index[tied] = values[tied].argsort(dim=1, descending=True, stable=True)[:, :k]
    return value, index
