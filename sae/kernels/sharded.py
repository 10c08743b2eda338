"""Selection among latents that are spread over processes: exact, from the candidates that each process sends.

A process's own latents are neighbours, and those of a higher rank come later. So candidates in order of row, rank and
own latent are in order of row and latent, and only values need to be sent: the place of a value says whose it is, and
ties go to the lowest flat index as in `sae.kernels.select`.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae.base import SparseLatents
from sae.kernels.select import BatchSelection, Encoder, batch_candidates, largest
from sae.kernels.select import select_topk as select_own_topk
from sae.parallel import Group


def largest_of_rows(values: Float[Tensor, "rows width"], k: int) -> Bool[Tensor, "rows width"]:
    """Mask of the k largest values of each row where positive; of equal ones those of the lowest column."""
    if k >= values.shape[1]:
        return values > 0
    kth = values.topk(k, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    above, tied = values > kth, values == kth
    n_free = k - above.sum(dim=1, keepdim=True)
    return (above | (tied & (tied.cumsum(dim=1) <= n_free))) & (values > 0)


def select_topk(encoder: Encoder, k: int, latents: Group, *, bf16: bool = False) -> SparseLatents:
    """Those of the k largest pre-activations of each row, where positive, that are this process's own latents.

    A latent among the k largest of all is among the k largest of its process: B · k values are sent to each other one.

    Args:
        encoder: the own latents' part, and the whole batch.
    """
    found = select_own_topk(encoder, min(k, encoder.W_enc.shape[1]), bf16=bf16)
    n_rows = len(encoder.x_centred)
    starts = torch.searchsorted(found.row, torch.arange(n_rows, device=found.row.device))
    slot = torch.arange(len(found.row), device=found.row.device) - starts[found.row]
    table = found.value.new_zeros(n_rows, k)
    table[found.row, slot] = found.value
    keep = largest_of_rows(torch.cat(latents.gather(table), dim=1), k)
    index = keep[found.row, latents.rank * k + slot].nonzero().squeeze(1)
    return SparseLatents(*(tensor[index] for tensor in found))


def select_batchtopk(
    encoder: Encoder, n_keep: int, last_smallest: float, latents: Group, *, bf16: bool = False
) -> BatchSelection:
    """Those of the `n_keep` largest positive pre-activations of the batch that are this process's own latents.

    Args:
        encoder: the own latents' part, and the whole batch.
        last_smallest: see `sae.kernels.select.select_batchtopk`.
    """
    found = batch_candidates(encoder, n_keep, last_smallest, latents, bf16=bf16)
    everywhere, own = latents.gather_values(found.value)
    if not len(everywhere):
        return BatchSelection(found, 0.0)
    keep = largest(everywhere, n_keep)
    smallest = everywhere[keep].min()
    kept = keep[own]
    n_tied, n_tied_kept = (everywhere == smallest).sum(), (everywhere[keep] == smallest).sum()
    if n_tied > n_tied_kept:  # `largest` took the lowest rank's, the rule is the lowest row's
        tied = found.value == smallest
        place = found.row[tied] * latents.world_size + latents.rank
        place = (place << 32) + found.latent[tied]
        last = latents.gather_values(place)[0].sort().values[n_tied_kept - 1]
        kept = found.value > smallest
        kept[tied] = place <= last
    index = kept.nonzero().squeeze(1)
    return BatchSelection(SparseLatents(*(tensor[index] for tensor in found)), float(smallest))


def keep_largest(pre_acts: Float[Tensor, "batch n_own"], k: int, latents: Group) -> Float[Tensor, "batch n_own"]:
    """The own ones of the k largest positive entries of each row, zero elsewhere, differentiable.

    Processes may have different numbers of columns. Nothing is sent but these numbers when all of them together have
    no more than k columns: then negative entries are left in place, as all others.
    """
    n_own = pre_acts.shape[1]
    widths = [int(width) for width in latents.gather(torch.tensor([n_own], device=pre_acts.device))]
    if sum(widths) <= k:
        return pre_acts
    n_slots = min(k, max(widths))
    values, column = pre_acts.topk(min(n_slots, n_own), dim=1, sorted=False)
    column, order = column.sort(dim=1)
    values = values.gather(1, order)
    table = pre_acts.new_zeros(len(pre_acts), n_slots)
    table[:, : values.shape[1]] = values.detach()
    keep = largest_of_rows(torch.cat(latents.gather(table), dim=1), k)
    first = latents.rank * n_slots
    kept = torch.where(keep[:, first : first + values.shape[1]], values, 0)
    return torch.zeros_like(pre_acts).scatter(1, column, kept)
