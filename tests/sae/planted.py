"""Data with a known answer: sums of a few of many directions, and how many of the directions a dictionary found."""

from collections.abc import Iterator

import torch
from torch import Tensor

WIDTH, N_ACTIVE = 64, 3


def directions(n: int, seed: int, width: int = WIDTH) -> Tensor:
    """(n, width): random unit vectors."""
    vectors = torch.randn(n, width, generator=torch.Generator().manual_seed(1000 + seed))
    return torch.nn.functional.normalize(vectors, dim=1)


def sums(*sources: Tensor, n_batches: int, batch_size: int, seed: int) -> Iterator[tuple[Tensor, ...]]:
    """Batches of Σ c_i v_i over N_ACTIVE random rows v_i with c_i from U(0.5, 1.5); each source has its own rows.

    The active rows and coefficients of a sample are the same in all sources.
    """
    generator = torch.Generator().manual_seed(seed)
    n = len(sources[0])
    for _ in range(n_batches):
        active = torch.rand(batch_size, n, generator=generator).topk(N_ACTIVE, dim=1).indices
        coefficients = 0.5 + torch.rand(batch_size, N_ACTIVE, generator=generator)
        dense = torch.zeros(batch_size, n).scatter_(1, active, coefficients)
        yield tuple(dense @ vectors for vectors in sources)


def recall(truth: Tensor, found: Tensor, cosine: float = 0.9) -> float:
    """Share of the true directions that some row of `found` meets with a cosine above `cosine`."""
    similarity = torch.nn.functional.normalize(truth, dim=1) @ torch.nn.functional.normalize(found, dim=1).t()
    return float((similarity.amax(dim=1) > cosine).float().mean())
