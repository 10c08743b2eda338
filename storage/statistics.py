"""Statistics of activations that merge exactly: shard by shard they give what one pass over all rows would.

A row is *padding* if its token is, *first* if its position is 0, *not finite* if its norm is neither of these and not
finite; all others are in the histogram of norms. Of those, rows whose norm reaches `ORDINARY_MULTIPLE` times the median
of their own shard are set aside as attention sinks too; what remains is *ordinary*, and over ordinary rows (float64):

    mean = sum_i x_i / n            m2 = sum_i (x_i - mean)^2

Two sets a, b merge with delta = mean_b - mean_a as

    n = n_a + n_b      mean = mean_a + delta * n_b / n      m2 = m2_a + m2_b + delta^2 * n_a * n_b / n

Reference: Chan, Golub, LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances",
equation 2.1.

The histogram's bins are the upper 16 bits of each float32 norm (the bits of a bfloat16: order is kept, a bin is at most
2^-7 of its value wide). The median is interpolated linearly inside its bin. A threshold on norms is always the upper
edge of the bin that it falls into, so that merged histograms say exactly how many rows reach it.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from storage.encoding import to_float32

BLOCK_ROWS = 256  # the float32 work of one block stays in the second-level cache
ORDINARY_MULTIPLE = 3.0
"""Multiple of the shard's median norm from which on a row counts in neither mean nor m2."""
INFINITE_BIN = 0x7F80
"""Bin of infinity; finite norms lie below."""


@dataclass(frozen=True, eq=False)
class Statistics:
    """Summary of the rows of one hook."""

    count: int
    """Ordinary rows; `mean`, `m2`, `norm_sum` and the squares are over these."""
    mean: NDArray[np.float64]
    m2: NDArray[np.float64]
    """Sum of squared deviations from the mean per dimension; the variance is m2 / count."""
    norm_sum: float
    norm_histogram: Mapping[int, int] = field(default_factory=dict)
    """Rows per upper 16 bits of the float32 norm, without padding and first rows."""
    n_first: int = 0
    """Rows with position 0, finite or not."""
    n_padding: int = 0
    n_not_finite: int = 0
    """Rows without a finite norm, neither padding nor first."""
    n_nan: int = 0
    """NaN elements of the rows as they were given, over all but padding."""
    n_inf: int = 0
    """Infinite elements, likewise."""
    squared_error: float = 0.0
    """Sum of (x' - x)^2, x' being the row as it is read: what quantisation costs."""
    squared_sum: float = 0.0
    """Sum of x^2; both are 0 where nothing is quantised."""

    @property
    def mean_norm(self) -> float:
        """Mean L2 norm of an ordinary row, NaN if there is none."""
        return self.norm_sum / self.count if self.count else float("nan")

    @property
    def relative_error(self) -> float:
        """Share of the energy of the ordinary rows that quantisation lost: sum of (x' - x)^2 over sum of x^2."""
        return self.squared_error / self.squared_sum if self.squared_sum else 0.0

    @cached_property
    def median_norm(self) -> float:
        """Median L2 norm of the rows in the histogram to within one bin, NaN if there is none."""
        target, below = sum(self.norm_histogram.values()) / 2, 0
        for key, n in sorted(self.norm_histogram.items()):
            if below + n >= target:
                low, high = (float(_lower_edge(edge)) for edge in (key, key + 1))
                return low + (min(high, float(np.finfo(np.float32).max)) - low) * (target - below) / n
            below += n
        return float("nan")

    def sink_threshold(self, multiple: float) -> np.float32:
        """Norm from which on a row is an attention sink: the upper edge of the bin of multiple * median norm."""
        if np.isnan(self.median_norm):
            return np.float32("inf")
        greatest = float(np.finfo(np.float32).max)
        return _lower_edge(_bin(np.float32(min(max(multiple * self.median_norm, 0.0), greatest))) + 1)

    def n_sinks(self, multiple: float) -> int:
        """Attention sinks: first rows, and others whose norm reaches `sink_threshold` or is not finite."""
        edge = _bin(self.sink_threshold(multiple))
        return self.n_first + self.n_not_finite + sum(n for key, n in self.norm_histogram.items() if key >= edge)

    def to_json(self) -> dict[str, Any]:
        """JSON form; vectors are base64 of little-endian float64, so that nothing is rounded."""
        value = {item.name: getattr(self, item.name) for item in fields(self)}
        histogram = {str(key): n for key, n in sorted(self.norm_histogram.items())}
        return value | {"mean": _encode(self.mean), "m2": _encode(self.m2), "norm_histogram": histogram}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Statistics:
        """Reads `to_json`."""
        histogram = {int(key): int(n) for key, n in value["norm_histogram"].items()}
        vectors = {"mean": _decode(value["mean"]), "m2": _decode(value["m2"])}
        return cls(**{**value, **vectors, "norm_histogram": histogram})


class Summary(NamedTuple):
    """What one pass over rows gives."""

    statistics: Statistics
    norms: NDArray[np.float32]
    """L2 norm of each row; not finite where the row is not."""
    ordinary: NDArray[np.bool_]
    """Rows that count in mean and m2."""


class _Moments:
    """Sums of rows and of their squares, shifted to near the mean so that squares do not cancel."""

    def __init__(self, d_in: int) -> None:
        self.count = 0
        self._shift: NDArray[np.float32] | None = None
        self._total, self._squares = np.zeros(d_in), np.zeros(d_in)

    def add(self, x: NDArray[np.float32], chosen: NDArray[np.bool_], sign: int = 1) -> None:
        """Adds the chosen rows of x [n, d_in], or takes them away again; overwrites x."""
        n = int(chosen.sum())
        if not n:
            return
        if self._shift is None:
            self._shift = x[chosen].mean(axis=0, dtype=np.float64).astype(np.float32)
        x -= self._shift
        if n < len(x):
            x[~chosen] = 0
        # Not as products with a vector of ones: BLAS would take every core for them, and wait for the busy ones.
        self._total += sign * np.add.reduce(x, axis=0)
        np.multiply(x, x, out=x)
        self._squares += sign * np.add.reduce(x, axis=0)
        self.count += sign * n

    def result(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and m2."""
        offset = self._total / max(self.count, 1)
        mean = offset + (0.0 if self._shift is None else self._shift)
        return mean, np.maximum(self._squares - self.count * offset**2, 0.0)


def summarise(
    rows: NDArray[Any],
    *,
    first: NDArray[np.bool_] | None = None,
    padding: NDArray[np.bool_] | None = None,
    decode: Callable[[Any], NDArray[np.float32]] | None = None,
) -> Summary:
    """Statistics of stored rows [n, d_in].

    Args:
        first, padding: bool [n], which rows have position 0 and which are padding; none by default.
        decode: gives rows as a new float32 array for a slice or an array of row numbers; by default those in `rows`.
    """
    n_rows, d_in = rows.shape
    norms, moments = np.empty(n_rows, np.float32), _Moments(d_in)
    padding = np.zeros(n_rows, bool) if padding is None else padding
    set_aside = np.zeros(n_rows, bool) if first is None else first | padding
    set_aside = set_aside | padding
    guess: np.float32 | None = None  # of the threshold: what it gets wrong is put right below
    added = np.zeros(n_rows, bool)
    n_nan = n_inf = 0
    decode = decode or (lambda chosen: to_float32(rows[chosen]))
    for start in range(0, n_rows, BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        x = decode(block)
        with np.errstate(over="ignore", invalid="ignore"):
            block_norms = np.sqrt(np.einsum("ij,ij->i", x, x))
        norms[block] = block_norms
        finite = np.isfinite(block_norms)
        if not finite.all():
            bad = x[~finite & ~padding[block]]
            n_nan += int(np.isnan(bad).sum())
            n_inf += int(np.isinf(bad).sum())
            x[~finite] = 0
        usable = finite & ~set_aside[block]
        if guess is None and usable.any():
            guess = np.float32(min(ORDINARY_MULTIPLE * float(np.median(block_norms[usable])), 3e38))
        if guess is not None:
            added[block] = usable & (block_norms <= guess)
            moments.add(x, added[block])
    usable = np.isfinite(norms) & ~set_aside
    histogram = _histogram(norms[usable])
    threshold = Statistics(0, np.zeros(0), np.zeros(0), 0.0, histogram).sink_threshold(ORDINARY_MULTIPLE)
    ordinary = usable & (norms < threshold)
    for wrong, sign in ((ordinary & ~added, 1), (added & ~ordinary, -1)):
        numbers = np.flatnonzero(wrong)
        for start in range(0, len(numbers), BLOCK_ROWS):
            x = decode(numbers[start : start + BLOCK_ROWS])
            moments.add(x, np.ones(len(x), bool), sign)
    mean, m2 = moments.result()
    statistics = Statistics(
        count=moments.count,
        mean=mean,
        m2=m2,
        norm_sum=float(norms[ordinary].sum(dtype=np.float64)),
        norm_histogram=histogram,
        n_first=0 if first is None else int((first & ~padding).sum()),
        n_padding=int(padding.sum()),
        n_not_finite=int((~np.isfinite(norms) & ~set_aside).sum()),
        n_nan=n_nan,
        n_inf=n_inf,
    )
    return Summary(statistics, norms, ordinary)


def merge(parts: Iterable[Statistics]) -> Statistics:
    """Statistics of all rows together.

    Raises: ValueError if there are no parts.
    """
    sums: dict[str, Any] = {}
    mean = m2 = None
    histogram: dict[int, int] = {}
    for part in parts:
        if mean is None or m2 is None:
            mean, m2 = np.zeros_like(part.mean), np.zeros_like(part.m2)
        before = sums.get("count", 0)
        if part.count:
            delta, n = part.mean - mean, before + part.count
            mean = mean + delta * (part.count / n)
            m2 = m2 + part.m2 + delta**2 * (before * part.count / n)
        for name in _SUMS:
            sums[name] = sums.get(name, 0) + getattr(part, name)
        for key, rows in part.norm_histogram.items():
            histogram[key] = histogram.get(key, 0) + rows
    if mean is None or m2 is None:
        raise ValueError("Statistics need at least one shard, got none: write a shard first.")
    return Statistics(mean=mean, m2=m2, norm_histogram=histogram, **sums)


_SUMS = [item.name for item in fields(Statistics) if item.name not in ("mean", "m2", "norm_histogram")]


def _histogram(norms: NDArray[np.float32]) -> dict[int, int]:
    """Rows per bin of finite norms."""
    counts = np.bincount(norms.view(np.uint32) >> 16, minlength=1)
    return {int(key): int(counts[key]) for key in np.flatnonzero(counts)}


def _bin(norm: np.float32) -> int:
    return int(np.float32(norm).view(np.uint32)) >> 16


def _lower_edge(key: int) -> np.float32:
    return np.uint32(min(key, INFINITE_BIN) << 16).view(np.float32)


def _encode(vector: NDArray[np.float64]) -> str:
    return base64.b64encode(vector.astype("<f8").tobytes()).decode()


def _decode(text: str) -> NDArray[np.float64]:
    return np.frombuffer(base64.b64decode(text), "<f8").astype(np.float64)
