"""The sparse training path on NVIDIA GPUs, in Triton. Same operations as `sae.kernels.compiled`.

    search          the encoder's product over blocks of tokens; candidates, exact values, the k largest
    weighted_sums   decoding, and the gradients of both weight matrices
    pair_dots       the gradient of the latents
    project, adam   projection, clipping, Adam and the unit norm

Used on every CUDA device where Triton is installed; SAE_TRITON=0 turns it off. Tested and measured on one NVIDIA H200,
driver 580.159.04, torch 2.11.0+cu130, Triton 3.6.0 (docs/benchmarks/2026-11-26-train-gpu.md); on no other chip.

A program handles one row (a token, a latent) or a stretch of its columns, several entries at a time. There are no
atomics and every sum has a fixed order, so that results repeat bit for bit. Nothing here waits for the device but the
end of `search`, whose result has a length that the host must know.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])

BLOCK_ELEMENTS = 2**27
"""Pre-activations computed at a time: 256 MB in bfloat16, enough rows to fill the matrix units."""

_BF16_SLACK = 2
"""Steps of bfloat16 below the k-th value within which entries are candidates (`sae.kernels.select`)."""

_VECTOR = 1024
"""Length of the rows into which vectors are cut for the optimizer's step."""


def _jit(function: F) -> Any:
    """`triton.jit`, for the type checker."""
    return cast(Any, triton.jit(function, do_not_specialize=["lowest"] if function.__name__ == "_candidates" else None))


@_jit
@no_type_check
def _kth_key(keys, k, BITS: tl.constexpr):
    """The largest number that at least k of `keys` reach, bit by bit from the top; 0 if fewer than k are positive."""
    kth = 0
    for i in range(BITS):
        candidate = kth | (1 << (BITS - 1 - i))
        reached = tl.sum((keys >= candidate).to(tl.int32), axis=0)
        kth = tl.where(reached >= k, candidate, kth)
    return kth


@_jit
@no_type_check
def _candidates(
    pre_acts, latents, counts, width, k, lowest, slack, capacity, BF16: tl.constexpr, TOP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: the columns, ascending, of all entries that may be among its k largest, or of all with key >= lowest.

    The largest of each of BLOCK groups of columns are found first. At least k entries reach the k-th of these, and
    hardly more do as long as the k largest lie in different groups.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    own = pre_acts + row * width
    bound = lowest
    if TOP:
        best = tl.zeros((BLOCK,), dtype=tl.int32)
        for start in tl.range(0, width, BLOCK, loop_unroll_factor=4):
            value = tl.load(own + start + column, mask=start + column < width, other=-1.0)
            key = value.to(tl.int16, bitcast=True).to(tl.int32) if BF16 else value.to(tl.int32, bitcast=True)
            best = tl.maximum(best, key)
        if BF16:
            bound = tl.maximum(lowest, _kth_key(best, k, 15) - slack)
        else:
            bound = tl.maximum(lowest, _kth_key(best, k, 31) - slack)
    n = 0
    for start in tl.range(0, width, BLOCK, loop_unroll_factor=2):
        value = tl.load(own + start + column, mask=start + column < width, other=-1.0)
        # Positive floats sort like their bits.
        key = value.to(tl.int16, bitcast=True).to(tl.int32) if BF16 else value.to(tl.int32, bitcast=True)
        keep = (key >= bound).to(tl.int32)
        n_keep = tl.sum(keep, axis=0)
        if n_keep > 0:
            place = n + tl.cumsum(keep, axis=0) - 1
            tl.store(latents + row * capacity + place, start + column, mask=(keep > 0) & (place < capacity))
        n += n_keep
    tl.store(counts + row, n)


@_jit
@no_type_check
def _prune(latents, values, counts, kept_latents, kept_values, kept_counts, k, capacity, BLOCK: tl.constexpr):
    """One row: the k largest positive of its candidates, ascending by latent; of equal ones the lowest latent."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, BLOCK)
    inside = slot < tl.minimum(tl.load(counts + row), capacity)
    value = tl.load(values + row * capacity + slot, mask=inside, other=-1.0)
    latent = tl.load(latents + row * capacity + slot, mask=inside, other=0)
    key = value.to(tl.int32, bitcast=True)
    kth = tl.maximum(_kth_key(key, k, 31), 1)
    above = key > kth
    tie = key == kth
    n_ties = k - tl.sum(above.to(tl.int32), axis=0)
    keep = above | (tie & (tl.cumsum(tie.to(tl.int32), axis=0) <= n_ties))
    place = tl.cumsum(keep.to(tl.int32), axis=0) - 1
    tl.store(kept_latents + row * k + place, latent, mask=keep)
    tl.store(kept_values + row * k + place, value, mask=keep)
    tl.store(kept_counts + row, tl.sum(keep.to(tl.int32), axis=0))


@_jit
@no_type_check
def _flatten(
    latents, values, counts, ends, rows, flat_latents, flat_values, capacity, HAS_VALUES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of a table, to where its entries lie among all."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, BLOCK)
    count = tl.load(counts + row)
    begin = tl.load(ends + row) - count
    for start in range(0, count, BLOCK):
        inside = start + slot < count
        source = row * capacity + start + slot
        at = begin + start + slot
        tl.store(rows + at, tl.zeros((BLOCK,), dtype=tl.int64) + row, mask=inside)
        latent = tl.load(latents + source, mask=inside, other=0)
        tl.store(flat_latents + at, latent.to(tl.int64), mask=inside)
        if HAS_VALUES:
            tl.store(flat_values + at, tl.load(values + source, mask=inside, other=0.0), mask=inside)


@_jit
@no_type_check
def _pair_dots(rows, members, left, right, bias, dots, width, n, HAS_BIAS: tl.constexpr, ENTRIES: tl.constexpr,
               BLOCK: tl.constexpr):  # fmt: skip
    """dots[e] = left[rows[e]] · right[members[e]] for some entries, whatever rows they are of."""
    entry = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    column = tl.arange(0, BLOCK)
    valid = entry < n
    row = tl.load(rows + entry, mask=valid, other=0)
    member = tl.load(members + entry, mask=valid, other=0)
    total = tl.zeros((ENTRIES, BLOCK), dtype=tl.float32)
    for start in range(0, width, BLOCK):
        inside = valid[:, None] & (start + column < width)[None, :]
        own = tl.load(left + row[:, None] * width + (start + column)[None, :], mask=inside, other=0.0)
        total += own * tl.load(right + member[:, None] * width + (start + column)[None, :], mask=inside, other=0.0)
    dot = tl.sum(total, axis=1)
    if HAS_BIAS:
        dot += tl.load(bias + member, mask=valid, other=0.0)
    tl.store(dots + entry, dot, mask=valid)


@_jit
@no_type_check
def _squared_distances(x, y, squares, width, Y_ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """squares[row] = ‖x[row] − y[row]‖², or ‖x[row] − y[0]‖²."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    other = y + row * width if Y_ROWS else y
    difference = tl.load(x + row * width + column, mask=inside, other=0.0)
    difference -= tl.load(other + column, mask=inside, other=0.0)
    tl.store(squares + row, tl.sum(difference * difference, axis=0))


@_jit
@no_type_check
def _weighted_sums(
    starts, members, weights, table, base, out, sums, width, HAS_BASE: tl.constexpr, HAS_SUMS: tl.constexpr,
    ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One stretch of columns of out[i] = base + Σ weights[e] * table[members[e]], starts[i] <= e < starts[i + 1]."""
    i = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    entry = tl.arange(0, ENTRIES)
    begin = tl.load(starts + i)
    end = tl.load(starts + i + 1)
    total = tl.zeros((ENTRIES, BLOCK), dtype=tl.float32)
    weight_total = tl.zeros((ENTRIES,), dtype=tl.float32)
    for first in range(begin, end, ENTRIES):
        valid = first + entry < end
        member = tl.load(members + first + entry, mask=valid, other=0).to(tl.int64)
        weight = tl.load(weights + first + entry, mask=valid, other=0.0)
        rows = table + member[:, None] * width + column[None, :]
        total += weight[:, None] * tl.load(rows, mask=valid[:, None] & inside[None, :], other=0.0)
        weight_total += weight
    result = tl.sum(total, axis=0)
    if HAS_BASE:
        result += tl.load(base + column, mask=inside, other=0.0)
    tl.store(out + i * width + column, result, mask=inside)
    if HAS_SUMS:
        tl.store(sums + i, tl.sum(weight_total, axis=0), mask=tl.program_id(1) == 0)


@_jit
@no_type_check
def _table_dots(
    counts, members, left, right, bias, dots, width, capacity, ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dots[e] = left[row] · right[members[e]] + bias[members[e]] for the entries of one row of a table."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    entry = tl.arange(0, ENTRIES)
    begin = row * capacity
    end = begin + tl.minimum(tl.load(counts + row), capacity)
    for first in range(begin, end, ENTRIES):
        valid = first + entry < end
        member = tl.load(members + first + entry, mask=valid, other=0).to(tl.int64)
        total = tl.zeros((ENTRIES, BLOCK), dtype=tl.float32)
        for start in range(0, width, BLOCK):
            inside = start + column < width
            own = tl.load(left + row * width + start + column, mask=inside, other=0.0)
            others = right + member[:, None] * width + (start + column)[None, :]
            total += own[None, :] * tl.load(others, mask=valid[:, None] & inside[None, :], other=0.0)
        dot = tl.sum(total, axis=1) + tl.load(bias + member, mask=valid, other=0.0)
        tl.store(dots + first + entry, dot, mask=valid)


@_jit
@no_type_check
def _project(weight, grad, squares, width, n, PROJECT: tl.constexpr, BLOCK: tl.constexpr):
    """Remove from a row of the gradient its part along the unit vector `weight`; squares = norm² of what is left."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    at = row * width + column
    inside = (column < width) & (at < n)
    g = tl.load(grad + at, mask=inside, other=0.0)
    if PROJECT:
        w = tl.load(weight + at, mask=inside, other=0.0)
        g -= tl.sum(g * w, axis=0) * w
        tl.store(grad + at, g, mask=inside)
    tl.store(squares + row, tl.sum(g * g, axis=0))


@_jit
@no_type_check
def _adam(
    weight, grad, mean, square, scale, width, n, step_size, beta1, beta2, correction2, eps,
    UNIT_NORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row's step of Adam on the gradient times scale[0], then norm 1."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    at = row * width + column
    inside = (column < width) & (at < n)
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


class _Tile(NamedTuple):
    """What a program handles at a time: entries, columns, and the warps that share the work."""

    entries: int
    columns: int
    warps: int


# The fastest of about fifteen shapes each on an H200, at widths of 768 and 2,304.
CANDIDATES = _Tile(1, 256, 1)
DOTS = _Tile(8, 128, 1)
PAIR_DOTS = _Tile(16, 64, 2)
SUMS = _Tile(4, 256, 1)


class _Table(NamedTuple):
    """Candidates of a block of tokens: the first `counts` of each row of `latents` (rows, capacity) int32."""

    latents: Tensor
    counts: Tensor
    values: Tensor | None = None


def _find(pre_acts: Tensor, k: int, lowest: int, slack: int, out: _Table) -> None:
    """Candidates for the k largest of each row, or all entries with key >= lowest; `counts` may exceed the capacity."""
    n_rows, width = pre_acts.shape
    block = max(CANDIDATES.columns, triton.next_power_of_2(4 * k))
    numbers = (width, k, lowest, slack, out.latents.shape[1])
    _candidates[(n_rows,)](pre_acts, out.latents, out.counts, *numbers, BF16=pre_acts.dtype == torch.bfloat16,
                           TOP=k > 0, BLOCK=block, num_warps=max(1, min(16, block // 1024)))  # fmt: skip


def _keep_largest(found: _Table, values: Tensor, k: int) -> _Table:
    """The k largest positive candidates of each row: latents and values (rows, k), and how many count."""
    n_rows, capacity = found.latents.shape
    latents = torch.empty(n_rows, k, dtype=torch.int32, device=values.device)
    kept = torch.empty(n_rows, k, dtype=torch.float32, device=values.device)
    counts = torch.empty(n_rows, dtype=torch.int32, device=values.device)
    block = triton.next_power_of_2(capacity)
    warps = min(16, max(1, block // 256))
    _prune[(n_rows,)](*(found.latents, values, found.counts, latents, kept, counts), k, capacity, BLOCK=block,
                      num_warps=warps)  # fmt: skip
    return _Table(latents, counts, kept)


def topk(pre_acts: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest positive entries of each row, ascending by column, ties to the lowest column.

    Args:
        pre_acts: (rows, width) float32, contiguous.
    Returns: columns and values, both (rows, k), and how many of each row count; what stands behind them is undefined.
    """
    found = _Table(torch.zeros_like(pre_acts, dtype=torch.int32), torch.empty_like(pre_acts[:, 0], dtype=torch.int32))
    _find(pre_acts, k, 1, 0, found)
    kept = _keep_largest(found, pre_acts.gather(1, found.latents.long()), k)
    assert kept.values is not None
    return kept.latents, kept.values, kept.counts


def search(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, bound: float, lowest: int, *, bf16: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Pre-activations above `bound`, the k largest of each row or (k = 0) all.

    Args:
        x: (rows, d_in) float32, already centred.
        W_enc: (d_in, d_sae), stored latent by latent.
        lowest: least bits of a candidate, of bfloat16 numbers where `bf16`, else of float32 numbers.
        bf16: candidates from a product in bfloat16; their values are computed again in float32.
    Returns: row, latent and value of each entry, in row-major order.
    """
    d_sae, by_latent = W_enc.shape[1], W_enc.t().contiguous()
    capacity = min(d_sae, max(64, 2 * k) if k else 4096)
    while True:
        found = _all_candidates(x, W_enc, b_enc, k, lowest, capacity, bf16)
        kept = _keep_largest(found, _values(found, x, by_latent, b_enc), k) if k else None
        counts = found.counts if kept is None else kept.counts
        # The only place where the host waits: what follows has a length that it must know.
        n_most, n_found = torch.stack([found.counts.max().long(), counts.sum(dtype=torch.int64)]).tolist()
        if n_most <= capacity:
            break
        capacity = min(d_sae, triton.next_power_of_2(n_most))  # many ties: once more, with room for all
    row, latent, value = _flattened(found if kept is None else kept, n_found)
    if kept is None:
        value = pair_dots(row, latent, x, by_latent, b_enc)
    if kept is None or bound > 0:
        index = (value > bound).nonzero().squeeze(1)
        row, latent, value = row[index], latent[index], value[index]
    return row, latent, value


def _all_candidates(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, lowest: int, capacity: int, bf16: bool) -> _Table:
    """`_find` on the encoder's product, over blocks of tokens."""
    n_tokens, d_sae = len(x), len(b_enc)
    dtype = torch.bfloat16 if bf16 else torch.float32
    low_x, low_W_enc, low_b_enc = (tensor.to(dtype) for tensor in (x, W_enc, b_enc))
    n_rows = min(n_tokens, max(1, BLOCK_ELEMENTS // d_sae))
    buffer = torch.empty(n_rows, d_sae, dtype=dtype, device=x.device)
    latents = torch.empty(n_tokens, capacity, dtype=torch.int32, device=x.device)
    counts = torch.empty(n_tokens, dtype=torch.int32, device=x.device)
    for start in range(0, n_tokens, n_rows):
        rows = slice(start, min(start + n_rows, n_tokens))
        block = torch.addmm(low_b_enc, low_x[rows], low_W_enc, out=buffer[: rows.stop - start])
        _find(block, k, lowest, _BF16_SLACK if bf16 else 0, _Table(latents[rows], counts[rows]))
    return _Table(latents, counts)


def _values(found: _Table, x: Tensor, by_latent: Tensor, b_enc: Tensor) -> Tensor:
    """The float32 pre-activations of the candidates, (rows, capacity); what stands behind the counts is undefined."""
    values = torch.empty(found.latents.shape, dtype=torch.float32, device=x.device)
    capacity, width = values.shape[1], x.shape[1]
    arrays = (found.counts, found.latents, x, by_latent, b_enc, values)
    tile = _tile(width, DOTS)
    _table_dots[(len(x),)](*arrays, width, capacity, ENTRIES=tile.entries, BLOCK=tile.columns,
                           num_warps=tile.warps)  # fmt: skip
    return values


def _flattened(found: _Table, n_found: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row, latent and value of each entry of a table; the value is undefined if the table has none."""
    n_rows, capacity = found.latents.shape
    device = found.latents.device
    row, latent = (torch.empty(n_found, dtype=torch.int64, device=device) for _ in range(2))
    value = torch.empty(n_found, dtype=torch.float32, device=device)
    ends = found.counts.cumsum(0)
    values = value if found.values is None else found.values
    arrays = (found.latents, values, found.counts, ends, row, latent, value)
    _flatten[(n_rows,)](*arrays, capacity, HAS_VALUES=found.values is not None, BLOCK=64, num_warps=1)
    return row, latent, value


def _tile(width: int, shape: _Tile) -> _Tile:
    """A tile no wider than a row needs."""
    return shape._replace(columns=int(min(shape.columns, triton.next_power_of_2(width))))


def weighted_sums(
    starts: Tensor, members: Tensor, weights: Tensor, table: Tensor, base: Tensor | None, sums: Tensor | None = None
) -> Tensor:
    """base + Σ weights[e] * table[members[e]] over the entries of each bin (`sae.kernels.cpu._weighted_sums`).

    Args:
        sums: takes Σ weights[e] of each bin.
    """
    n_bins, width = len(starts) - 1, table.shape[1]
    out = torch.empty(n_bins, width, dtype=table.dtype, device=table.device)
    tile = _tile(width, SUMS)
    arrays = (starts, members, weights.contiguous(), table.contiguous())
    _weighted_sums[(n_bins, triton.cdiv(width, tile.columns))](
        *arrays, table if base is None else base, out, out if sums is None else sums, width,
        HAS_BASE=base is not None, HAS_SUMS=sums is not None, ENTRIES=tile.entries, BLOCK=tile.columns,
        num_warps=tile.warps,
    )  # fmt: skip
    return out


def pair_dots(row: Tensor, members: Tensor, left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """left[row[e]] · right[members[e]] for every entry e, plus bias[members[e]]."""
    found = torch.empty(len(members), dtype=left.dtype, device=left.device)
    if len(members) == 0:
        return found
    width = left.shape[1]
    tile = _tile(width, PAIR_DOTS)
    arrays = (row, members, left.contiguous(), right.contiguous(), left if bias is None else bias, found)
    _pair_dots[(triton.cdiv(len(members), tile.entries),)](
        *arrays, width, len(members), HAS_BIAS=bias is not None, ENTRIES=tile.entries, BLOCK=tile.columns,
        num_warps=tile.warps,
    )  # fmt: skip
    return found


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """‖x_b − y_b‖² of each row; y has as many rows as x, or one."""
    squares = torch.empty(len(x), dtype=x.dtype, device=x.device)
    width = x.shape[1]
    block = triton.next_power_of_2(width)
    _squared_distances[(len(x),)](x.contiguous(), y.contiguous(), squares, width, Y_ROWS=len(y) == len(x), BLOCK=block,
                                  num_warps=_warps(block))  # fmt: skip
    return squares


def sort_by_latent(row: Tensor, latent: Tensor, d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where each latent's entries start once sorted by latent, the entries in that order, and their rows."""
    # A radix sort costs as many passes as the keys have bytes.
    offset, dtype = (2**15, torch.int16) if d_sae <= 2**16 else (0, torch.int32)
    ordered, order = (latent - offset).to(dtype).sort(stable=True)
    edges = torch.arange(-offset, d_sae + 1 - offset, dtype=torch.int32, device=latent.device)
    starts = torch.searchsorted(ordered.to(torch.int32), edges)
    return starts, order, row[order]


def project(weight: Tensor, grad: Tensor, *, along_rows: bool) -> Tensor:
    """In place, the gradient without its part along the rows of `weight`; returns the norm² of each row."""
    n_rows, width = _rows(grad, along_rows)
    squares = torch.empty(n_rows, dtype=torch.float32, device=grad.device)
    block = triton.next_power_of_2(width)
    _project[(n_rows,)](weight, grad, squares, width, grad.numel(), PROJECT=along_rows, BLOCK=block,
                        num_warps=_warps(block))  # fmt: skip
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
    """A step of Adam, in place (`sae.kernels.compiled.adam_rows`); `scale` is one number on the device."""
    n_rows, width = _rows(weight, unit_norm)
    numbers = (width, weight.numel(), step_size, *betas, correction2, eps)
    block = triton.next_power_of_2(width)
    _adam[(n_rows,)](weight, grad, mean, square, scale, *numbers, UNIT_NORM=unit_norm, BLOCK=block,
                     num_warps=_warps(block))  # fmt: skip


def _rows(matrix: Tensor, whole: bool) -> tuple[int, int]:
    """Rows and columns; a single row is cut into stretches unless its programs need it whole."""
    if whole or len(matrix) > 1:
        return len(matrix), matrix.shape[1]
    return triton.cdiv(matrix.numel(), _VECTOR), _VECTOR


def _warps(block: int) -> int:
    return int(min(16, max(4, block // 512)))
