"""Random numbers that belong to a question, not to the order in which questions are asked.

Every number is a hash of (seed, stream, latent, index): a latent gets the same test whether it is tested alone, in a
block or in a whole dictionary. The hash is the finalizer of SplitMix64 (Steele, Lea and Flood 2014, OOPSLA, figure 13).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniforms(
    seed: int, stream: int, latent: NDArray[np.integer[Any]], index: NDArray[np.integer[Any]]
) -> NDArray[np.float64]:
    """A number in [0, 1) for each (latent, index), which broadcast; `stream` tells the uses of one pair apart."""
    with np.errstate(over="ignore"):
        state = _mix(np.asarray([seed, stream], np.int64).astype(np.uint64))
        state = _mix(state[0] + _GOLDEN * (state[1] + np.asarray(latent, np.int64).astype(np.uint64)))
        state = _mix(state + _GOLDEN * np.asarray(index, np.int64).astype(np.uint64))
    return np.asarray((state >> np.uint64(11)) * 2.0**-53, np.float64)


def integers_below(
    bound: NDArray[np.int64], seed: int, stream: int, latent: NDArray[np.integer[Any]], index: NDArray[np.integer[Any]]
) -> NDArray[np.int64]:
    """An integer in [0, bound) for each (latent, index); 0 where bound is 0."""
    drawn = (uniforms(seed, stream, latent, index) * bound).astype(np.int64)
    return np.asarray(np.minimum(drawn, np.maximum(bound - 1, 0)), np.int64)


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z + _GOLDEN).astype(np.uint64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)), np.uint64)
