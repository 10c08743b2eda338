"""Gemma Scope (google/gemma-scope-*): `params.npz`, or `params.safetensors` with a `config.json` (Gemma Scope 2).

    W_enc (d_in, d_sae)   b_enc   W_dec (d_sae, d_out)   b_dec (d_out)   threshold (d_sae), lower case in Gemma Scope 2
    affine_skip_connection (d_in, d_out), of transcoders with one

    latent_acts = JumpReLU(x @ W_enc + b_enc);  x_hat = latent_acts @ W_dec + b_dec  (+ x @ affine_skip_connection)

Gemma Scope records nothing beside the weights: hook and model are read from the path, `…/layer_12/width_16k/
average_l0_82`, below a folder with the repository's name. Its embedding dictionaries read embeddings that the model has
not scaled by √d_in yet, as in SAELens.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae.base import SAE
from sae.config import JumpReLUConfig, SAEConfig, TranscoderConfig
from sae.interop.files import contained, read_json, read_npz, read_safetensors
from sae.interop.parts import At, Foreign, dimension, filled, shift_biases, take

NAME = "Gemma Scope"
_NPZ, _SAFETENSORS, _CONFIG = "params.npz", "params.safetensors", "config.json"
_SITES = {
    "-res": ("blocks.{}.hook_resid_post",),
    "-mlp": ("blocks.{}.hook_mlp_out",),
    "-att": ("blocks.{}.attn.hook_z",),
    "-transcoders": ("blocks.{}.ln2.hook_normalized", "blocks.{}.hook_mlp_out"),
}


def claims(folder: Path) -> tuple[str, ...]:
    """See `parts.Format`."""
    return tuple(name for name in (_NPZ, _SAFETENSORS) if (folder / name).is_file())


def read(folder: Path) -> Foreign:
    """See `parts.Format`."""
    found = claims(folder)
    if len(found) != 1:
        raise ValueError(f"one of {_NPZ} and {_SAFETENSORS} must be there, got both. Remove one.")
    if found[0] == _NPZ:
        return _first(folder)
    return _second(folder)


def _first(folder: Path) -> Foreign:
    tensors = _lower_case(read_npz(contained(folder, _NPZ)))
    path = "/".join(folder.absolute().parts)
    repository = re.search(r"gemma-scope-([0-9a-z]+-(?:pt|it))(-res|-mlp|-att|-transcoders)", path)
    transcodes = repository is not None and repository[2] == "-transcoders"
    embedding = re.search(r"/embedding(/|$)", path) is not None
    sae = _sae(tensors, _config(tensors, transcodes), embedding)
    layer = re.search(r"/layer_(\d+)(/|$)", path)
    hooks: tuple[str, ...] = ()
    if embedding:
        hooks = ("hook_embed",)
    elif layer is not None and repository is not None:
        hooks = tuple(site.format(layer[1]) for site in _SITES[repository[2]])
    metadata: dict[str, Any] = {"prepend_bos": True, "context_size": 1024}
    if repository is not None:
        metadata["model_name"] = "google/gemma-2-" + repository[1].removesuffix("-pt")
    return Foreign(sae, hooks, metadata)


def _second(folder: Path) -> Foreign:
    tensors = read_safetensors(contained(folder, _SAFETENSORS))
    settings = read_json(contained(folder, _CONFIG)) if (folder / _CONFIG).is_file() else {}
    if settings.get("architecture", "jump_relu") != "jump_relu":
        raise ValueError(f"`architecture` must be 'jump_relu', got {settings['architecture']!r}.")
    if any(getattr(tensor, "ndim", 0) > 2 for tensor in tensors.values()):
        raise ValueError("tensor `w_dec` must be a matrix: cross-layer transcoders and crosscoders are not supported.")
    hooks = [settings.get("hf_hook_point_in"), settings.get("hf_hook_point_out")]
    names = tuple(_module(str(hook)) for hook in hooks if hook)
    transcodes = len(names) > 1 or "affine_skip_connection" in tensors
    sae = _sae(tensors, _config(tensors, transcodes), embedding=False)
    metadata = {
        "prepend_bos": True,
        "context_size": 1024,
        "model_name": settings.get("model_name"),
        "gemma_scope": settings,
    }
    return Foreign(sae, names, metadata)


def _lower_case(tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {name.lower(): tensor for name, tensor in tensors.items()}


def _config(tensors: Mapping[str, Any], transcodes: bool) -> SAEConfig:
    d_in, d_sae = dimension(tensors, "w_enc", 0), dimension(tensors, "w_enc", 1)
    if not transcodes:
        return JumpReLUConfig(d_in=d_in, d_sae=d_sae)
    skip = "affine_skip_connection" in tensors
    d_out = dimension(tensors, "w_dec", 1)
    return TranscoderConfig(d_in=d_in, d_out=d_out, d_sae=d_sae, activation="jumprelu", skip=skip)


def _sae(tensors: Mapping[str, Any], config: SAEConfig, embedding: bool) -> SAE:
    where = {name: At(name.lower()) for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
    where["W_skip"] = At("affine_skip_connection", transposed=True)
    sae = filled(config, take(tensors, where, config))
    if embedding:
        sae.W_enc.div_(config.d_in**0.5)
        sae.W_dec.mul_(config.d_in**0.5)
    if sae.subtracts_b_dec:
        shift_biases(sae, sae.b_dec)
    return sae


def _module(hook: str) -> str:
    """`model.layers.9.output` is the output of the module `model.layers.9`."""
    path, _, side = hook.rpartition(".")
    if side == "output":
        return path
    return f"{path}:input" if side == "input" else hook
