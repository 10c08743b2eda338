"""Warm start: an SAE begins with the weights of a trained dictionary (`train.init_from`)."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sae import SAE, Dictionary, Normaliser

UNIT_NORM_TOLERANCE = 0.01
"""Most by which a decoder row may miss norm 1: the first step of training would bring it there, and change the SAE."""


@torch.no_grad()
def start_from(sae: SAE, dictionary: Dictionary, normalisers: Sequence[Normaliser]) -> None:
    """Give `sae` the dictionary's weights, in place, in the units of the normalised activations.

    A dictionary maps raw activations, x = x_trained / scale + shift: folding in that map, the inverse of the
    normalisation, makes it the same function of normalised ones.

    Raises:
        ValueError: another architecture or shape, or decoder rows that training would have to bring to norm 1.
    """
    ours, theirs = sae.config, dictionary.config
    if ours.architecture != theirs.architecture:
        raise ValueError(
            f"the dictionary must be of the architecture {ours.architecture}, got {theirs.architecture}: choose "
            "another dictionary, or change `architecture`"
        )
    shapes = {name: tuple(tensor.shape) for name, tensor in sae.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in dictionary.sae.state_dict().items()}
    if shapes != given:
        differing = [name for name in sorted({*shapes, *given}) if shapes.get(name) != given.get(name)]
        told = ", ".join(f"{name} {shapes.get(name)} here, {given.get(name)} there" for name in differing)
        raise ValueError(
            f"the dictionary must have the shapes of the SAE ({told}): set d_sae, hooks and settings alike"
        )
    sae.load_state_dict(dictionary.sae.state_dict())
    inverse = [Normaliser(-n.shift * n.scale, 1 / n.scale) for n in normalisers]
    if not all(n.is_identity for n in inverse):
        sae.fold(inverse)
    furthest = float((sae.W_dec.norm(dim=1) - 1).abs().max())
    if sae.unit_norm_decoder and furthest > UNIT_NORM_TOLERANCE:
        raise ValueError(
            f"the decoder rows must have norm 1 within {UNIT_NORM_TOLERANCE}, one misses it by {furthest:.3g}: "
            "training would change what the dictionary computes; rescale its latents first"
        )


def identity_of(dictionary: Dictionary, path: str) -> dict[str, Any]:
    """What the provenance says about where the weights came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(dictionary.sae.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return {
        "path": path,
        "sha256_of_tensors": digest.hexdigest(),
        "model_name": dictionary.provenance.get("model_name"),
        "hook_names": list(dictionary.hook_names),
    }


def absolute_if_here(path: str) -> str:
    """A folder's absolute path, so that other processes find it; other names as they are."""
    return str(Path(path).resolve()) if Path(path).is_dir() else path
