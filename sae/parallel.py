"""Data-parallel training: the few places where processes must agree, as methods of one object.

Each process holds its share of the rows of a global batch and a full copy of the SAE. With `world_size` 1 every method
returns its input, so the trainer has one code path. What is exchanged in a step: the batch's sums, the candidates of
the BatchTopK selection, which latents fired, and one flat bucket of gradients.

Reference for the exchange of selection candidates: Gao et al. 2024, arXiv:2406.04093, appendix on systems.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from sae.losses import total_variance


class Group:
    """The processes that train one SAE together. Uses the default torch.distributed group when one is initialised."""

    def __init__(self) -> None:
        self.distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if self.distributed else 0
        self.world_size = dist.get_world_size() if self.distributed else 1

    def sum(self, tensor: Tensor) -> Tensor:
        """Elementwise sum over processes."""
        if self.world_size == 1:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    def sum_int(self, number: int) -> int:
        """Sum of one whole number over processes."""
        return number if self.world_size == 1 else int(self.sum(torch.tensor(number)))

    def mean_float(self, number: float) -> float:
        """Mean of one number over processes."""
        if self.world_size == 1:
            return number
        return float(self.sum(torch.tensor(number, dtype=torch.float64))) / self.world_size

    def any(self, mask: Tensor) -> Tensor:
        """Elementwise "true in some process"."""
        return mask if self.world_size == 1 else self.sum(mask.to(torch.int32)) > 0

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite the tensors with those of the first process."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def gather_values(self, values: Float[Tensor, " n_own"]) -> tuple[Float[Tensor, " n_all"], slice]:
        """The values of all processes in order of rank, and where this process's own lie among them."""
        if self.world_size == 1:
            return values, slice(0, len(values))
        counts = [torch.zeros(1, dtype=torch.int64, device=values.device) for _ in range(self.world_size)]
        dist.all_gather(counts, torch.tensor([len(values)], device=values.device))
        lengths = [int(count) for count in counts]
        padded = torch.zeros(max(lengths), dtype=values.dtype, device=values.device)
        padded[: len(values)] = values
        parts = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(parts, padded)
        everywhere = torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])
        start = sum(lengths[: self.rank])
        return everywhere, slice(start, start + len(values))

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Sum the gradients over processes in one bucket; the losses, normalised over the global batch, add up."""
        if self.world_size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        bucket = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(bucket)
        for gradient, total in zip(gradients, torch.split(bucket, [g.numel() for g in gradients]), strict=True):
            gradient.copy_(total.view_as(gradient))

    def total_variance(self, x: Float[Tensor, "batch d_in"]) -> tuple[Float[Tensor, ""], int]:
        """Variance summed over dimensions of the global batch, and its number of tokens.

        Two passes, mean then squares, so that a large mean costs no digits.
        """
        if self.world_size == 1:
            return total_variance(x), len(x)
        sums = self.sum(torch.cat([x.sum(dim=0, dtype=torch.float64), x.new_tensor([len(x)], dtype=torch.float64)]))
        n_tokens = int(sums[-1])
        mean = (sums[:-1] / n_tokens).to(x.dtype)
        return self.sum((x - mean).square().sum()) / n_tokens, n_tokens
