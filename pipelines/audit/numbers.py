"""Numbers as they are written: figures in six decimals, scores so that their order and their ties stay."""

from typing import Any

import numpy as np


def figure(value: Any) -> float:
    """Six decimals."""
    return round(float(value), 6)


def figures(values: np.ndarray) -> list[float]:
    """Six decimals each."""
    return [round(v, 6) for v in values.astype(np.float64).tolist()]


def as_scores(values: np.ndarray) -> list[float]:
    """float32 values in nine digits, which no two of them share: ranks computed from what is written are the same."""
    return [float(f"{v:.9g}") for v in values.astype(np.float32).tolist()]
