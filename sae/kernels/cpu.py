"""The sparse training path: one dense product, the encoder's; everything after it touches only active latents.

A dense step multiplies (batch, d_in) by (d_in, d_sae) six times. With k of d_sae latents active, five of the six touch
k / d_sae of what they compute. Here

- `sae.kernels.select` runs the encoder in blocks of tokens and keeps only the survivors of each block;
- decoding gathers k decoder rows per token, and so do its gradients;
- the gradients of encoder and decoder are sums over the entries of each latent; one counting sort serves both;
- `b_dec` gets its gradient through the encoder from that of `b_enc`, so that no gradient of `x` is formed.

Each operation has three forms with the same result up to rounding: loops compiled by numba (`sae.kernels.compiled`, on
CPUs, with the extra `fast`), Triton kernels (`sae.kernels.cuda`), and torch operations, which exist on every device.
"""

from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sae.base import SparseLatents
from sae.kernels.loops import n_shares, share, share_evenly, triton_kernels, usable
from sae.kernels.select import (
    BatchSelection,
    Encoder,
    largest,
    multiplies_bf16,
    select_above,
    select_batchtopk,
    select_topk,
)

__all__ = [
    "BatchSelection",
    "Encoder",
    "decode",
    "differentiable",
    "largest",
    "multiplies_bf16",
    "select_above",
    "select_batchtopk",
    "select_topk",
]


class _Layout:
    """The pattern of row-major sparse latents, sorted both ways; each order is made once, for all gradients."""

    def __init__(self, row: Int[Tensor, " n_active"], latent: Int[Tensor, " n_active"]) -> None:
        self.row = row
        self.latent = latent
        self.n_rows = 0
        self.d_sae = 0

    @cached_property
    def by_row(self) -> Int[Tensor, " n_offsets"]:
        """Where each row's entries start; one more than rows."""
        if self.row.device.type == "cuda":  # counting there waits for the device; the rows are already in order
            return torch.searchsorted(self.row, torch.arange(self.n_rows + 1, device=self.row.device))
        return _starts(self.row, self.n_rows)

    @cached_property
    def by_latent(self) -> tuple[Int[Tensor, " n_offsets"], Int[Tensor, " n_active"], Int[Tensor, " n_active"]]:
        """Where each latent's entries start, sorted by latent and row; the entries in that order; and their rows."""
        if self.row.device.type == "cuda" and (on_gpu := triton_kernels()) is not None:
            by_latent: tuple[Tensor, Tensor, Tensor] = on_gpu.sort_by_latent(self.row, self.latent, self.d_sae)
            return by_latent
        loops = usable()
        if loops is None or self.row.device.type != "cpu":
            order = self.latent.argsort(stable=True)
            return _starts(self.latent, self.d_sae), order, self.row[order]
        starts, order, rows = torch.empty(self.d_sae + 1, dtype=torch.int64), self.row.clone(), self.row.clone()
        loops.sort_by_latent(self.by_row.numpy(), self.latent.numpy(), starts.numpy(), order.numpy(), rows.numpy())
        return starts, order, rows


_LAYOUTS = WeakTensorKeyDictionary()
"""The layout of each `SparseLatents.latent` that is still alive."""


def _layout(row: Tensor, latent: Tensor, *, n_rows: int = 0, d_sae: int = 0) -> _Layout:
    layout: _Layout | None = _LAYOUTS.get(latent)  # type: ignore[no-untyped-call]
    if layout is None or layout.row is not row:
        layout = _LAYOUTS[latent] = _Layout(row, latent)
    layout.n_rows, layout.d_sae = max(layout.n_rows, n_rows), max(layout.d_sae, d_sae)
    return layout


def _starts(index: Int[Tensor, " n_active"], n_bins: int) -> Int[Tensor, " n_offsets"]:
    """Where each bin starts among the entries once they are sorted by `index`; one more than bins."""
    starts = torch.zeros(n_bins + 1, dtype=torch.int64, device=index.device)
    torch.cumsum(torch.bincount(index, minlength=n_bins), 0, out=starts[1:])
    return starts


def _weighted_sums(
    starts: Int[Tensor, " n_offsets"],
    members: Int[Tensor, " n_active"],
    weights: Float[Tensor, " n_active"],
    table: Float[Tensor, "n_members width"],
    base: Float[Tensor, " width"] | None = None,
) -> Float[Tensor, "n_bins width"]:
    """base + Σ weights[e] * table[members[e]] over the entries of each bin, in their order."""
    on_gpu = triton_kernels(weights, table)
    if on_gpu is not None:
        gathered: Tensor = on_gpu.weighted_sums(starts, members, weights, table, base)
        return gathered
    loops = usable(weights, table)
    if loops is None:
        sums = F.embedding_bag(members, table, starts, mode="sum", per_sample_weights=weights, include_last_offset=True)
        return sums if base is None else sums.add_(base)
    n_bins, n = len(starts) - 1, n_shares(len(members) * table.shape[1])
    # Bins differ in size: they are divided so that every thread gets about as many entries.
    inner = torch.searchsorted(starts[:-1].contiguous(), torch.arange(1, n) * (len(members) // n)).tolist()
    out = table.new_empty(n_bins, table.shape[1])
    base = table.new_zeros(table.shape[1]) if base is None else base
    arrays = (tensor.contiguous().numpy() for tensor in (starts, members, weights, table, base))
    share(loops.weighted_sums, [0, *inner, n_bins], *arrays, out.numpy())
    return out


def _dots(
    layout: _Layout, left: Float[Tensor, "n_rows width"], right: Float[Tensor, "d_sae width"]
) -> Float[Tensor, " n_active"]:
    """left[row] · right[latent] for every entry."""
    on_gpu = triton_kernels(left, right)
    if on_gpu is not None:
        dots: Tensor = on_gpu.pair_dots(layout.row, layout.latent, left, right)
        return dots
    loops = usable(left, right)
    if loops is None:
        dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            left, right, layout.latent, layout.by_row, layout.row, 0
        )
        return dots
    dots = left.new_empty(len(layout.latent))
    arrays = (tensor.contiguous().numpy() for tensor in (layout.by_row, layout.latent, left, right))
    share_evenly(loops.dot_products, len(left), dots.numel() * left.shape[1], *arrays, dots.numpy())
    return dots


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
        ctx.save_for_backward(W_enc, x_centred)
        ctx.layout = _layout(row, latent, n_rows=len(x_centred), d_sae=W_enc.shape[1])
        ctx.shifts_input = b_dec is not None
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        W_enc, x_centred = ctx.saved_tensors
        starts, order, rows = ctx.layout.by_latent
        on_gpu = triton_kernels(grad, x_centred)
        if on_gpu is None:
            grad_W_enc = _weighted_sums(starts, rows, grad[order], x_centred).t()
            grad_b_enc = grad.new_zeros(W_enc.shape[1]).index_add_(0, ctx.layout.latent, grad)
        else:
            grad_b_enc = grad.new_empty(W_enc.shape[1])
            grad_W_enc = on_gpu.weighted_sums(starts, rows, grad[order], x_centred, None, grad_b_enc).t()
        grad_b_dec = -(W_enc @ grad_b_enc) if ctx.shifts_input else None
        return grad_W_enc, grad_b_enc, grad_b_dec, None, None, None, None


def differentiable(latents: SparseLatents, encoder: Encoder, b_dec: Float[Tensor, " d_in"] | None) -> SparseLatents:
    """The same latents with values that carry gradients to W_enc, b_enc and, where the input was shifted, b_dec."""
    value = _SelectedPreActs.apply(encoder.W_enc, encoder.b_enc, b_dec, encoder.x_centred, *latents)  # type: ignore[no-untyped-call]
    return SparseLatents(latents.row, latents.latent, value)


class _Decode(torch.autograd.Function):
    """x_hat_i = b_dec + Σ_j f_ij W_dec[j] over the entries (i, j); with G the gradient of x_hat

    df_ij     = G_i · W_dec[j]
    dW_dec[j] = Σ_i f_ij G_i
    db_dec    = Σ_i G_i
    """

    @staticmethod
    def forward(
        ctx: Any,
        value: Float[Tensor, " n_active"],
        W_dec: Float[Tensor, "d_sae d_in"],
        b_dec: Float[Tensor, " d_in"],
        layout: _Layout,
    ) -> Float[Tensor, "n_tokens d_in"]:
        ctx.save_for_backward(value, W_dec)
        ctx.layout = layout
        return _weighted_sums(layout.by_row, layout.latent, value, W_dec, b_dec)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        value, W_dec = ctx.saved_tensors
        grad = grad.contiguous()
        grad_value = _dots(ctx.layout, grad, W_dec) if ctx.needs_input_grad[0] else None
        grad_W_dec = None
        if ctx.needs_input_grad[1]:
            starts, order, rows = ctx.layout.by_latent
            grad_W_dec = _weighted_sums(starts, rows, value[order], grad)
        return grad_value, grad_W_dec, grad.sum(dim=0) if ctx.needs_input_grad[2] else None, None


def decode(
    latents: SparseLatents, W_dec: Float[Tensor, "d_sae d_in"], b_dec: Float[Tensor, " d_in"], n_tokens: int
) -> Float[Tensor, "n_tokens d_in"]:
    """latent_acts @ W_dec + b_dec from row-major sparse latents, differentiable in all three."""
    layout = _layout(latents.row, latents.latent, n_rows=n_tokens, d_sae=len(W_dec))
    x_hat: Tensor = _Decode.apply(latents.value, W_dec, b_dec, layout)  # type: ignore[no-untyped-call]
    return x_hat
