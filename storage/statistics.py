"""Statistics of activations that merge exactly: shard by shard they give what one pass over all rows would.

Per dimension, over rows whose norm is finite:

    mean = sum_i x_i / n            m2 = sum_i (x_i - mean)^2           (float64)

Two sets a, b merge with delta = mean_b - mean_a as

    n = n_a + n_b      mean = mean_a + delta * n_b / n      m2 = m2_a + m2_b + delta^2 * n_a * n_b / n

Reference: Chan, Golub, LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances",
equation 2.1.

The median norm comes from a histogram whose bins are the upper 16 bits of each float32 norm (the bits of a bfloat16:
order is kept, a bin is at most 2^-7 of its value wide), interpolated linearly inside the bin.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from storage.encoding import to_float32

BLOCK_ROWS = 256  # the float32 work of one block stays in the second-level cache


@dataclass(frozen=True, eq=False)
class Statistics:
    """Summary of the rows of one hook."""

    count: int
    """Rows with a finite norm; `mean`, `m2` and the norms are over these."""
    mean: NDArray[np.float64]
    m2: NDArray[np.float64]
    """Sum of squared deviations from the mean per dimension; the variance is m2 / count."""
    norm_sum: float
    norm_histogram: Mapping[int, int]
    """Rows per upper 16 bits of the float32 norm."""
    n_nan: int
    """NaN elements, over all rows."""
    n_inf: int
    """Infinite elements, over all rows."""

    @property
    def mean_norm(self) -> float:
        """Mean L2 norm of a row, NaN if there is none."""
        return self.norm_sum / self.count if self.count else float("nan")

    @cached_property
    def median_norm(self) -> float:
        """Median L2 norm of a row to within one bin of the histogram, NaN if there is none."""
        target, below = self.count / 2, 0
        for key, n in sorted(self.norm_histogram.items()):
            if below + n >= target:
                low, high = np.array([key << 16, (key + 1) << 16], np.uint32).view(np.float32).astype(float)
                return float(low + (high - low) * (target - below) / n)
            below += n
        return float("nan")

    def to_json(self) -> dict[str, Any]:
        """JSON form; vectors are base64 of little-endian float64, so that nothing is rounded."""
        return {
            "count": self.count,
            "mean": _encode(self.mean),
            "m2": _encode(self.m2),
            "norm_sum": self.norm_sum,
            "norm_histogram": {str(key): n for key, n in sorted(self.norm_histogram.items())},
            "n_nan": self.n_nan,
            "n_inf": self.n_inf,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Statistics:
        """Reads `to_json`."""
        histogram = {int(key): int(n) for key, n in value["norm_histogram"].items()}
        vectors = {"mean": _decode(value["mean"]), "m2": _decode(value["m2"])}
        return cls(**{**value, **vectors, "norm_histogram": histogram})


def summarise(stored: NDArray[Any]) -> tuple[Statistics, NDArray[np.float32]]:
    """Statistics of stored rows [n, d_in], and the L2 norm of each row (not finite where the row is not)."""
    n_rows, d_in = stored.shape
    norms = np.empty(n_rows, np.float32)
    shift: NDArray[np.float32] | None = None  # near the mean, so that squares do not cancel
    total, squares = np.zeros(d_in), np.zeros(d_in)
    count = n_nan = n_inf = 0
    for start in range(0, n_rows, BLOCK_ROWS):
        x = to_float32(stored[start : start + BLOCK_ROWS])
        with np.errstate(over="ignore", invalid="ignore"):
            block_norms = np.sqrt(np.einsum("ij,ij->i", x, x))
        norms[start : start + BLOCK_ROWS] = block_norms
        finite = np.isfinite(block_norms)
        if not finite.all():
            n_nan += int(np.isnan(x).sum())
            n_inf += int(np.isinf(x).sum())
            x = x[finite]
        if not len(x):
            continue
        if shift is None:
            shift = x.mean(axis=0, dtype=np.float64).astype(np.float32)
        ones = np.ones(len(x), np.float32)
        x -= shift
        total += ones @ x
        np.multiply(x, x, out=x)
        squares += ones @ x
        count += len(x)
    finite_norms = norms[np.isfinite(norms)]
    offset = total / max(count, 1)
    keys, counts = np.unique(finite_norms.view(np.uint32) >> 16, return_counts=True)
    statistics = Statistics(
        count=count,
        mean=offset + (0.0 if shift is None else shift),
        m2=np.maximum(squares - count * offset**2, 0.0),
        norm_sum=float(finite_norms.sum(dtype=np.float64)),
        norm_histogram=dict(zip(keys.tolist(), counts.tolist(), strict=True)),
        n_nan=n_nan,
        n_inf=n_inf,
    )
    return statistics, norms


def merge(parts: Iterable[Statistics]) -> Statistics:
    """Statistics of all rows together.

    Raises: ValueError if there are no parts.
    """
    count, norm_sum, n_nan, n_inf = 0, 0.0, 0, 0
    mean = m2 = None
    histogram: dict[int, int] = {}
    for part in parts:
        if mean is None or m2 is None:
            mean, m2 = np.zeros_like(part.mean), np.zeros_like(part.m2)
        n = count + part.count
        if part.count:
            delta = part.mean - mean
            mean = mean + delta * (part.count / n)
            m2 = m2 + part.m2 + delta**2 * (count * part.count / n)
        count, norm_sum = n, norm_sum + part.norm_sum
        n_nan, n_inf = n_nan + part.n_nan, n_inf + part.n_inf
        for key, rows in part.norm_histogram.items():
            histogram[key] = histogram.get(key, 0) + rows
    if mean is None or m2 is None:
        raise ValueError("Statistics need at least one shard, got none: write a shard first.")
    return Statistics(count, mean, m2, norm_sum, histogram, n_nan, n_inf)


def _encode(vector: NDArray[np.float64]) -> str:
    return base64.b64encode(vector.astype("<f8").tobytes()).decode()


def _decode(text: str) -> NDArray[np.float64]:
    return np.frombuffer(base64.b64decode(text), "<f8").astype(np.float64)
