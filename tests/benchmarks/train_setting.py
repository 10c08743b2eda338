"""The batches of `bench-train`: the same numbers in our process and in the peers', from a seed. Needs only torch."""

from typing import Any

D_IN, K, BATCH, N_BATCHES = 576, 32, 4096, 4


def batches(torch: Any) -> list[Any]:
    """Sums of a few of 2,000 directions on a common mean, unit variance: (4096, 576) float32."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(2000, D_IN, generator=generator)
    mean = 2 * torch.randn(D_IN, generator=generator)
    found = []
    for _ in range(N_BATCHES):
        x = torch.rand(BATCH, 2000, generator=generator).pow(40) @ directions
        found.append(x / x.std() + mean)
    return found
