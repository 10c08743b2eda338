"""The training path with torch operations only: one dense product, the encoder's; everything after it is sparse.

A dense step multiplies (batch, d_in) by (d_in, d_sae) six times. With k of d_sae latents active, five of the six touch
k / d_sae of what they compute. Here

- the encoder runs in blocks of rows that stay in cache, and only the survivors of each block are kept;
- decoding gathers k decoder rows per token, and so do its gradients (`embedding_bag`);
- the gradient of the encoder is gathered from the survivors, sorted by latent;
- `b_dec` gets its gradient through the encoder from that of `b_enc`, so that no gradient of `x` is formed.

Written for CPUs; the operations exist on every device.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.base import SparseLatents
from sae.parallel import Group

_BLOCK_ELEMENTS = 2_000_000
"""Pre-activations computed at a time: 8 MB in float32, within the last-level cache."""

_BOUND_MARGIN = 0.9
"""Lower bound of a BatchTopK selection as a share of the last step's threshold: about 1.4 survivors per kept entry."""


class Encoder(NamedTuple):
    """The parameters of the encoder, and the activations already shifted by `b_dec`."""

    x_centred: Float[Tensor, "batch d_in"]
    W_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, " d_sae"]


class BatchSelection(NamedTuple):
    """What a BatchTopK selection kept, and the smallest value kept anywhere in the global batch."""

    latents: SparseLatents
    smallest_kept: float


def largest(values: Float[Tensor, " n"], n_keep: int) -> Bool[Tensor, " n"]:
    """Mask of the `n_keep` largest values; of equal ones those with the lowest index."""
    if n_keep >= len(values):
        return torch.ones_like(values, dtype=torch.bool)
    smallest = values.topk(n_keep, sorted=False).values.min()
    keep = values > smallest
    ties = (values == smallest).nonzero().squeeze(1)
    keep[ties[: n_keep - int(keep.sum())]] = True
    return keep


def _block_rows(encoder: Encoder) -> int:
    return max(1, _BLOCK_ELEMENTS // encoder.W_enc.shape[1])


def select_above(encoder: Encoder, bound: float, *, bf16: bool = False) -> SparseLatents:
    """All pre-activations strictly above `bound`, in row-major order.

    Args:
        bf16: run the dense product in bfloat16 to find candidates, then compute their values in float32. Entries within
            the rounding of bfloat16 (about 0.4 %) of the bound may be missed, all values are exact.
    """
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
    return _exact(found, encoder, bound) if bf16 else found


def _exact(found: SparseLatents, encoder: Encoder, bound: float) -> SparseLatents:
    """The float32 values of entries found in lower precision; those not above `bound` are dropped."""
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        encoder.x_centred, encoder.W_enc.t(), found.latent, _offsets(found.row, len(encoder.x_centred)), found.row, 0
    )
    value = dots + encoder.b_enc[found.latent]
    keep = value > bound
    return SparseLatents(found.row[keep], found.latent[keep], value[keep])


def _estimate_smallest_kept(encoder: Encoder, share: float) -> float:
    """The value that `share` of all pre-activations exceed, judged by the first block of rows; not below 0."""
    rows = encoder.x_centred[: _block_rows(encoder)]
    block = torch.addmm(encoder.b_enc, rows, encoder.W_enc).view(-1)
    n_above = max(1, min(len(block), round(share * len(block))))
    return float(block.topk(n_above, sorted=False).values.min().relu())


def select_batchtopk(
    encoder: Encoder, n_keep: int, last_smallest: float, group: Group, *, bf16: bool = False
) -> BatchSelection:
    """The `n_keep` largest positive pre-activations of the batch that all processes of `group` hold together.

    Exact whatever `last_smallest` is: it only brackets the search. When fewer than `n_keep` survive the bracket, it is
    lowered, in the end to zero.

    Args:
        n_keep: k times the tokens of the global batch.
        last_smallest: `smallest_kept` of the step before; 0 when there was none, which estimates it. Equal in all
            processes.
    """
    if last_smallest == 0:
        n_own = n_keep / group.world_size
        estimate = _estimate_smallest_kept(encoder, n_own / (len(encoder.x_centred) * len(encoder.b_enc)))
        last_smallest = group.mean_float(estimate)
    for bound in (_BOUND_MARGIN * last_smallest, 0.5 * last_smallest, 0.0):
        found = select_above(encoder, bound, bf16=bf16)
        if bound == 0 or group.sum_int(len(found.value)) >= n_keep:
            break
    everywhere, own = group.gather_values(found.value)
    keep = largest(everywhere, n_keep)
    smallest_kept = float(everywhere[keep].min()) if len(everywhere) else 0.0
    keep = keep[own]
    return BatchSelection(SparseLatents(found.row[keep], found.latent[keep], found.value[keep]), smallest_kept)


def select_topk(encoder: Encoder, k: int) -> SparseLatents:
    """The k largest pre-activations of each row where positive, in row-major order."""
    n_rows = _block_rows(encoder)
    values, latents = [], []
    for start in range(0, len(encoder.x_centred), n_rows):
        block = torch.addmm(encoder.b_enc, encoder.x_centred[start : start + n_rows], encoder.W_enc)
        top = block.topk(k, dim=1, sorted=False)
        values.append(top.values)
        latents.append(top.indices)
    latent, order = torch.cat(latents).sort(dim=1)
    value = torch.cat(values).gather(1, order)
    row, slot = (value > 0).nonzero(as_tuple=True)
    return SparseLatents(row, latent[row, slot], value[row, slot])


class _SelectedPreActs(torch.autograd.Function):
    """The selected entries of (x − b_dec) @ W_enc + b_enc, already computed; backward sends their gradient on.

    dW_enc[:, j] = Σ_i g_ij (x_i − b_dec)       over the entries (i, j) selected
    db_enc[j]    = Σ_i g_ij
    db_dec       = − W_enc @ db_enc
    """

    @staticmethod
    def forward(
        ctx: Any,
        W_enc: Float[Tensor, "d_in d_sae"],
        b_enc: Float[Tensor, " d_sae"],
        b_dec: Float[Tensor, " d_in"] | None,
        x_centred: Float[Tensor, "batch d_in"],
        row: Int[Tensor, " n_active"],
        latent: Int[Tensor, " n_active"],
        value: Float[Tensor, " n_active"],
    ) -> Float[Tensor, " n_active"]:
        ctx.save_for_backward(W_enc, x_centred, row, latent)
        ctx.shifts_input = b_dec is not None
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        W_enc, x_centred, row, latent = ctx.saved_tensors
        d_sae = W_enc.shape[1]
        by_latent = latent.argsort(stable=True)
        grad_W_enc = F.embedding_bag(
            row[by_latent],
            x_centred,
            _offsets(latent, d_sae),
            mode="sum",
            per_sample_weights=grad[by_latent],
            include_last_offset=True,
        ).t()
        grad_b_enc = torch.zeros(d_sae, dtype=grad.dtype, device=grad.device).index_add_(0, latent, grad)
        grad_b_dec = -(W_enc @ grad_b_enc) if ctx.shifts_input else None
        return grad_W_enc, grad_b_enc, grad_b_dec, None, None, None, None


def differentiable(latents: SparseLatents, encoder: Encoder, b_dec: Float[Tensor, " d_in"] | None) -> SparseLatents:
    """The same latents with values that carry gradients to W_enc, b_enc and, where the input was shifted, b_dec."""
    value = _SelectedPreActs.apply(encoder.W_enc, encoder.b_enc, b_dec, encoder.x_centred, *latents)  # type: ignore[no-untyped-call]
    return SparseLatents(latents.row, latents.latent, value)


def decode(
    latents: SparseLatents, W_dec: Float[Tensor, "d_sae d_in"], b_dec: Float[Tensor, " d_in"], n_tokens: int
) -> Float[Tensor, "n_tokens d_in"]:
    """latent_acts @ W_dec + b_dec from row-major sparse latents, differentiable in all three."""
    x_hat = F.embedding_bag(
        latents.latent,
        W_dec,
        _offsets(latents.row, n_tokens),
        mode="sum",
        per_sample_weights=latents.value,
        include_last_offset=True,
    )
    return x_hat + b_dec


def _offsets(index: Int[Tensor, " n_active"], n_bins: int) -> Int[Tensor, " n_offsets"]:
    """Where each bin starts among the entries once they are sorted by `index`; one more than bins."""
    offsets = torch.zeros(n_bins + 1, dtype=torch.int64, device=index.device)
    torch.cumsum(torch.bincount(index, minlength=n_bins), 0, out=offsets[1:])
    return offsets
