"""Training by several processes: the few places where they must agree, as methods of one object.

A layout says what each process has. Under either one the processes take the step that one process takes with the whole
batch:

    "data"       its share of the rows of the batch, and a full copy of the SAE
    "features"   its share of the latents with all that belongs to them (`sae.features`), and the whole batch

What a process sends in a step, with B tokens of width d, L latents, k of them a token and n processes; a sum over
processes of s bytes costs each of them 2 s (n − 1) / n:

    "data"       the gradients, a sum of 8 d L bytes; BatchTopK's candidates, about 6 B k / n bytes to each other
                 process
    "features"   the reconstruction, a sum of 4 B d bytes, for Matryoshka one of each prefix; candidates, 4 B k bytes
                 (TopK) or about 6 B k / n (BatchTopK) to each other process; the same for AuxK while it runs, with
                 up to k_aux candidates a token

so "features" sends less when B < 2 L, and its weights and moments take the n-th part of the memory. Every process reads
the whole batch: the alternative, to read a share and pass it on, brings the same B d numbers to each process, and puts
(n − 1) / n of them on the wire between processes as well. What reading it whole costs is the reader's window in the
memory of each process, and n times the reading from the store.

With `world_size` 1 every method returns its input, so the trainer has one code path.

Reference: Gao et al. 2024, arXiv:2406.04093, appendix on systems, for the exchange of candidates.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float, Shaped
from torch import Tensor

from sae.losses import total_variance

LayoutName = Literal["data", "features", "alone"]
"""See the module; "alone" is for a process that trains an SAE by itself, whatever others do."""


_LARGE = 2**16
"""Elements from which a gradient is worth a collective of its own: copying it would take longer."""


class Group:
    """The processes that share something: the default torch.distributed group when one is initialised.

    Args:
        alone: this process by itself, whatever else there is.
    """

    def __init__(self, *, alone: bool = False) -> None:
        self.distributed = not alone and dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if self.distributed else 0
        self.world_size = dist.get_world_size() if self.distributed else 1
        self.bytes_sent = 0
        """Bytes that this process sent so far, by collectives that move no more than they must."""

    def share(self, n: int, rank: int | None = None) -> slice:
        """Which of n things in a row are this process's, or another's: as many for each, up to one."""
        rank = self.rank if rank is None else rank
        return slice(rank * n // self.world_size, (rank + 1) * n // self.world_size)

    def sum(self, tensor: Tensor) -> Tensor:
        """Elementwise sum over processes, the same bits in each."""
        if self.world_size == 1:
            return tensor
        return self._sum_in_place(tensor.clone())

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
                self.bytes_sent += _n_bytes(tensor) * (self.world_size - 1) // self.world_size

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all processes, which have one shape, in order of rank."""
        if self.world_size == 1:
            return [tensor]
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor)
        self.bytes_sent += (self.world_size - 1) * _n_bytes(tensor)
        return parts

    def gather_values(self, values: Shaped[Tensor, " n_own"]) -> tuple[Shaped[Tensor, " n_all"], slice]:
        """The values of all processes in order of rank, and where this process's own lie among them."""
        if self.world_size == 1:
            return values, slice(0, len(values))
        lengths = [int(count) for count in self.gather(torch.tensor([len(values)], device=values.device))]
        padded = torch.zeros(max(lengths), dtype=values.dtype, device=values.device)
        padded[: len(values)] = values
        parts = self.gather(padded)
        everywhere = torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])
        start = sum(lengths[: self.rank])
        return everywhere, slice(start, start + len(values))

    def collect(self, rows: Shaped[Tensor, "n_own *rest"], n: int) -> Shaped[Tensor, "n_all *rest"] | None:
        """In the first process the `share`s of n rows of all processes, on the CPU; None in the others."""
        if self.world_size == 1:
            return rows.cpu()
        if self.rank > 0:
            dist.send(rows, dst=0)
            self.bytes_sent += _n_bytes(rows)
            return None
        everyone = torch.empty(n, *rows.shape[1:], dtype=rows.dtype)
        everyone[: len(rows)] = rows
        for source in range(1, self.world_size):
            part = self.share(n, source)
            arriving = torch.empty(part.stop - part.start, *rows.shape[1:], dtype=rows.dtype, device=rows.device)
            dist.recv(arriving, src=source)
            everyone[part] = arriving
        return everyone

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Sum the gradients over processes; the losses, normalised over the global batch, add up.

        Large ones are summed in place, the others together.
        """
        if self.world_size == 1:
            return
        small: list[Tensor] = []
        for gradient in (parameter.grad for parameter in parameters if parameter.grad is not None):
            stored = gradient if gradient.is_contiguous() or gradient.ndim != 2 else gradient.t()
            if stored.numel() >= _LARGE and stored.is_contiguous():
                self._sum_in_place(stored)
            else:
                small.append(gradient)
        if not small:
            return
        bucket = self._sum_in_place(torch.cat([gradient.reshape(-1) for gradient in small]))
        for gradient, total in zip(small, torch.split(bucket, [g.numel() for g in small]), strict=True):
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

    # ---- sums with gradients, where every process has the whole batch ---------------------------------------------

    def combine(self, part: Float[Tensor, "batch width"]) -> Float[Tensor, "batch width"]:
        """Sum over processes of what each one's latents give, in place. The gradient is the same for all parts."""
        if self.world_size == 1:
            return part
        combined: Tensor = _Combine.apply(part, self)  # type: ignore[no-untyped-call]
        return combined

    def shared(self, parameter: Float[Tensor, " width"]) -> Float[Tensor, " width"]:
        """A parameter that is the same everywhere, as an input to each process's latents: their gradients add up."""
        if self.world_size == 1:
            return parameter
        shared: Tensor = _Shared.apply(parameter, self)  # type: ignore[no-untyped-call]
        return shared

    def _sum_in_place(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor)
        self.bytes_sent += 2 * (self.world_size - 1) * _n_bytes(tensor) // self.world_size
        return tensor


class _Combine(torch.autograd.Function):
    """y = Σ_r part_r; with the loss computed from y in every process, d loss / d part_r = d loss / d y."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Group) -> Tensor:
        ctx.mark_dirty(part)
        return group._sum_in_place(part)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return grads[0], None


class _Shared(torch.autograd.Function):
    """The opposite of `_Combine`: forward nothing happens, backward the gradients of all processes are summed."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return ctx.group.sum(grads[0]), None


def _n_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class Layout(NamedTuple):
    """Who holds what: every row of the batch is in one process of `rows`, every latent in one of `latents`."""

    rows: Group
    latents: Group

    @classmethod
    def of(cls, name: LayoutName) -> "Layout":
        """The layout of this name over the default group."""
        everyone, alone = Group(), Group(alone=True)
        return cls(everyone if name == "data" else alone, everyone if name == "features" else alone)
