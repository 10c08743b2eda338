"""Feature-sharded training: an SAE whose latents are spread over processes, and the way back to one SAE.

A process owns consecutive latents: their columns of `W_enc`, rows of `W_dec`, entries of `b_enc`, their moments in Adam
and their counters of silence. All else is the same in every process. In a step (`sae.sparse_objective`)

    selection        exact over all latents, from candidates                                    `kernels.sharded`
    reconstruction   Σ over processes of what the own latents decode to, + b_dec                `Group.combine`
    loss             computed by every process from the whole reconstruction
    gradients        of own latents: nothing to exchange; of b_dec through the encoder: summed  `Group.shared`
    clipping         one norm over all latents' gradients                                       `kernels.update`

A saved state is that of the whole SAE, put together by the first process, so that a run goes on under any layout and
any number of processes.

Reference: Gao et al. 2024, arXiv:2406.04093, appendix on systems; Lieberum et al. 2024, arXiv:2408.05147, section 3.3.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sae.base import SAE
from sae.config import (
    BatchTopKConfig,
    CrosscoderConfig,
    MatryoshkaBatchTopKConfig,
    SAEConfig,
    TopKConfig,
    TranscoderConfig,
)
from sae.parallel import Group

SPLIT_DIMS = {"W_enc": 1, "b_enc": 0, "W_dec": 0}
"""Parameters that latents own, and the dimension that counts latents."""


def can_split(config: SAEConfig) -> bool:
    """Whether SAEs of this configuration can be trained with their latents spread over processes."""
    match config:
        case TopKConfig() | BatchTopKConfig() | MatryoshkaBatchTopKConfig() | TranscoderConfig():
            return True
        case CrosscoderConfig():
            return config.sparsity == "batchtopk"
        case _:
            return False


def require_splittable(config: SAEConfig, n_processes: int) -> None:
    """Refuse what `can_split` denies, and more processes than latents. Raises: ValueError."""
    if not can_split(config):
        raise ValueError(
            "Latents can be spread over processes where training selects k of them (topk, batchtopk, "
            f"matryoshka_batchtopk, transcoder, crosscoder with batchtopk), got {config}. Choose the layout 'data'."
        )
    if n_processes > config.d_sae:
        raise ValueError(
            f"Every process needs at least one latent, got {n_processes} processes for d_sae={config.d_sae}. "
            "Start fewer."
        )


@torch.no_grad()
def split_latents(sae: SAE, latents: Group) -> None:
    """Leave this process's latents in `sae`, in place. Its configuration stays that of the whole SAE."""
    for name in SPLIT_DIMS:
        setattr(sae, name, nn.Parameter(own_part(name, getattr(sae, name), latents)))


def own_part(key: str, tensor: Tensor, latents: Group) -> Tensor:
    """This process's part of a whole state's tensor: a copy with latents side by side, or all of what is not split."""
    dim = _split_dim(key)
    if latents.world_size == 1 or dim is None:
        return tensor
    by_latent = tensor.transpose(0, dim)
    return by_latent[latents.share(len(by_latent))].contiguous().clone().transpose(0, dim)


def whole_state(state: Mapping[str, Any], latents: Group) -> dict[str, Any]:
    """The state of the whole SAE on the CPU of the first process, from each one's own; empty in the others."""
    if latents.world_size == 1:
        return dict(state)
    d_sae = latents.sum_int(len(state["sae.b_enc"]))
    whole: dict[str, Any] = {}
    for key, value in state.items():
        dim = _split_dim(key) if isinstance(value, Tensor) else None
        if dim is None:
            whole[key] = value
        else:
            parts = latents.collect(value.transpose(0, dim).contiguous(), d_sae)
            whole[key] = None if parts is None else parts.transpose(0, dim)
    return whole if latents.rank == 0 else {}


def _split_dim(key: str) -> int | None:
    """The dimension of latents in an entry of `Trainer.state_dict`, or a parameter; None where there is none."""
    if key == "tokens_since_fired":
        return 0
    parts = key.split(".")
    if parts[-1] == "step":
        return None
    return SPLIT_DIMS.get(parts[1] if parts[0] in ("sae", "adam") else parts[0])
