"""Activations as int8 with one float32 scale per token: half the bytes of bfloat16.

    scale = max_j |x_j| / 127       q_j = round(x_j / scale), ties to even, in [-127, 127]       x'_j = q_j * scale

A row of zeros has scale 0. A row with a NaN or infinite element cannot be scaled: its scale is NaN, so that it reads as
NaN and is never taken for data. The error of an element is at most scale / 2 before x' is rounded to the hook's type.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from storage.encoding import stored_as, to_float32

LEVELS = 127
BLOCK_ROWS = 256  # the float32 work of one block stays in the second-level cache


class Quantised(NamedTuple):
    """Rows as they are stored, and what that cost."""

    values: NDArray[np.int8]
    """[n, d_in]"""
    scales: NDArray[np.float32]
    """[n]; NaN where the row has an element that is not finite."""
    squared_error: NDArray[np.float64]
    """[n], sum over a row of (x' - x)^2, x' as readers give it; 0 where the scale is NaN."""
    squared_sum: NDArray[np.float64]
    """[n], sum over a row of x^2; 0 where the scale is NaN."""


def quantise(rows: NDArray[Any], dtype: str) -> Quantised:
    """Rows [n, d_in] (floats, or the bits of bfloat16 as uint16) in int8.

    Args:
        dtype: type in which readers give the rows, for the error.
    """
    n_rows = len(rows)
    result = Quantised(np.empty(rows.shape, np.int8), np.empty(n_rows, np.float32), np.zeros(n_rows), np.zeros(n_rows))
    for start in range(0, n_rows, BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        x = to_float32(rows[block])
        scales = np.abs(x).max(axis=1) / np.float32(LEVELS)  # NaN or infinite if any element is
        scales[~np.isfinite(scales)] = np.nan
        with np.errstate(over="ignore"):  # next to the greatest float32, 127 scales may round to more than it
            scales[np.isinf(scales * np.float32(LEVELS))] = np.finfo(np.float32).max / np.float32(LEVELS + 1)
        usable = scales > 0
        if not usable.all():
            x[~usable] = 0
        scaled = x / np.where(usable, scales, np.float32(1))[:, None]
        np.rint(scaled, out=scaled)
        np.clip(scaled, -LEVELS, LEVELS, out=scaled)  # a subnormal scale is itself rounded
        result.values[block] = scaled
        result.scales[block] = scales
        error = to_float32(dequantise(result.values[block], scales, dtype))
        error[~usable] = 0
        error -= x
        result.squared_error[block] = np.einsum("ij,ij->i", error, error)
        result.squared_sum[block] = np.einsum("ij,ij->i", x, x)
    return result


def dequantise(
    values: NDArray[np.int8], scales: NDArray[np.float32], dtype: str, out: NDArray[Any] | None = None
) -> NDArray[Any]:
    """Rows [n, d_in] in the stored form of `dtype` (uint16 bits for bfloat16), written into `out` if it is given."""
    if out is None:
        out = np.empty(values.shape, np.uint16 if dtype == "bfloat16" else dtype)
    for start in range(0, len(values), BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        out[block] = stored_as(values[block] * scales[block, None], dtype)
    return out
