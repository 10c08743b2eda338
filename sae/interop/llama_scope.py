"""Llama Scope and its successors (OpenMOSS/Language-Model-SAEs, lm_saes, llamascopium).

Llama Scope            hyperparams.json, checkpoints/final.safetensors
    encoder.weight (d_sae, d_in)  encoder.bias  decoder.weight (d_out, d_sae)  decoder.bias
Llama Scope R1         config.json, sae_weights.safetensors: the same and log_jumprelu_threshold (d_sae)
llamascopium           config.json, sae_weights.safetensors
    W_E (d_in, d_sae)  b_E  W_D (d_sae, d_out)  b_D  activation_function.log_jumprelu_threshold (d_sae)
    dataset_average_activation_norm.HOOK, a scalar for each hook

    x_n     = x · √d / (average norm at hook_point_in)       norm_activation "dataset-wise"; x itself if "inference"
    f       = act(x_n @ W_E + b_E)                           b_D is no part of the encoder
    y_n_hat = f @ W_D + b_D;   y_hat = y_n_hat · (average norm at hook_point_out) / √d

With `sparsity_include_decoder_norm`, which is the default, act sees pre-activations times the norms of the decoder
rows: a threshold is divided by them. TopK then ranks by the product, and its latent activations come out times the norm
here. The scalar `jump_relu_threshold` of Llama Scope is in units of x and is multiplied by √d / norm, as in SAELens.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.base import SAE
from sae.config import JumpReLUConfig, SAEConfig, StandardConfig, TopKConfig, TranscoderConfig
from sae.interop.files import contained, read_json, read_safetensors
from sae.interop.parts import (
    At,
    Foreign,
    decoder_norms,
    filled,
    number,
    rescale_latents,
    scale_input,
    shift_biases,
    take,
    whole_number,
)

NAME = "Llama Scope / llamascopium"
_OLD = ("hyperparams.json", "checkpoints/final.safetensors")
_NEW = ("config.json", "sae_weights.safetensors")
_OLD_NAMES = {
    "W_enc": At("encoder.weight", transposed=True),
    "b_enc": At("encoder.bias"),
    "W_dec": At("decoder.weight", transposed=True),
    "b_dec": At("decoder.bias"),
    "threshold": At("threshold"),
}
_NEW_NAMES = {
    "W_enc": At("W_E"),
    "b_enc": At("b_E"),
    "W_dec": At("W_D"),
    "b_dec": At("b_D"),
    "threshold": At("threshold"),
}
_NORM = "dataset_average_activation_norm"


def claims(folder: Path) -> tuple[str, ...]:
    """See `parts.Format`."""
    if (folder / _OLD[1]).is_file() and (folder / _OLD[0]).is_file():
        return _OLD
    if not (folder / _NEW[0]).is_file() or not (folder / _NEW[1]).is_file():
        return ()
    return _NEW if {"sae_type", "hook_point_in", "hook_points"} & read_json(folder / _NEW[0]).keys() else ()


def read(folder: Path) -> Foreign:
    """See `parts.Format`."""
    files = claims(folder)
    settings = read_json(contained(folder, files[0]))
    tensors: dict[str, Any] = dict(read_safetensors(contained(folder, files[1])))
    if settings.get("sae_type", "sae") not in ("sae", "transcoder"):
        raise ValueError(f"`sae_type` must be 'sae', got {settings['sae_type']!r}: it has no counterpart here.")
    if settings.get("use_glu_encoder", False):
        raise ValueError("`use_glu_encoder` must be false: no architecture here has a gate that multiplies.")
    hooks = [str(settings.get(f"hook_point_{side}") or settings.get("hook_point_in")) for side in ("in", "out")]
    norms = _norms(settings, tensors, hooks)
    config = _config(settings, transcodes=hooks[0] != hooks[1])
    names = _OLD_NAMES if "encoder.weight" in tensors else _NEW_NAMES
    if settings.get("use_decoder_bias", True) is False and names["b_dec"].key not in tensors:
        tensors[names["b_dec"].key] = torch.zeros(whole_number(settings, "d_model"))
    _threshold(settings, tensors, config, norms)
    sae = filled(config, take(tensors, names, config))
    with_norms = bool(settings.get("sparsity_include_decoder_norm", True)) and files == _NEW
    _fold(sae, config, norms if _norm_mode(settings) == "dataset-wise" else None, with_norms, settings)
    return Foreign(sae, tuple(dict.fromkeys(hooks)) if hooks[0] != "None" else (), {"llama_scope": dict(settings)})


def _norm_mode(settings: Mapping[str, Any]) -> str:
    mode = str(settings.get("norm_activation", "dataset-wise"))
    if mode not in ("dataset-wise", "inference", "token-wise"):
        raise ValueError(f"`norm_activation` must be dataset-wise, inference or token-wise, got {mode!r}.")
    return mode


def _norms(settings: Mapping[str, Any], tensors: dict[str, Any], hooks: list[str]) -> tuple[float, float] | None:
    """√d over the average norm at the input and at the output; None where nothing is scaled."""
    stored = {key.removeprefix(f"{_NORM}."): tensors.pop(key) for key in list(tensors) if key.startswith(f"{_NORM}.")}
    if _norm_mode(settings) != "dataset-wise":
        return None
    root = whole_number(settings, "d_model") ** 0.5
    recorded = settings.get(_NORM)
    if isinstance(recorded, Mapping):
        return root / number(recorded, "in"), root / number(recorded, "out")
    values = {hook: float(value) for hook, value in stored.items() if isinstance(value, Tensor) and value.ndim == 0}
    missing = [hook for hook in hooks if hook not in values]
    if missing:
        raise ValueError(
            f"`{_NORM}.{missing[0]}` is missing; without it the scale of the activations is unknown. "
            "Save the dictionary with norm_activation 'inference'."
        )
    return root / number(values, hooks[0]), root / number(values, hooks[1])


def _config(settings: Mapping[str, Any], transcodes: bool) -> SAEConfig:
    d_in, act = whole_number(settings, "d_model"), settings.get("act_fn", "relu")
    d_sae = whole_number(settings, "d_sae") if "d_sae" in settings else int(d_in * number(settings, "expansion_factor"))
    if act not in ("relu", "jumprelu", "topk"):
        raise ValueError(f"`act_fn` must be relu, jumprelu or topk, got {act!r}. Convert it to jumprelu first.")
    if transcodes:
        if act == "topk":
            k = whole_number(settings, "top_k")
            return TranscoderConfig(d_in=d_in, d_out=d_in, d_sae=d_sae, k=k, activation="topk")
        return TranscoderConfig(d_in=d_in, d_out=d_in, d_sae=d_sae, activation="jumprelu")
    if act == "topk":
        return TopKConfig(d_in=d_in, d_sae=d_sae, k=whole_number(settings, "top_k"))
    return JumpReLUConfig(d_in=d_in, d_sae=d_sae) if act == "jumprelu" else StandardConfig(d_in=d_in, d_sae=d_sae)


def _threshold(
    settings: Mapping[str, Any], tensors: dict[str, Any], config: SAEConfig, norms: tuple[float, float] | None
) -> None:
    """Put the thresholds, one a latent, where `take` looks for them."""
    if settings.get("act_fn", "relu") != "jumprelu":
        if isinstance(config, TranscoderConfig) and config.activation == "jumprelu":
            tensors["threshold"] = torch.zeros(config.d_sae)
        return
    for key in ("activation_function.log_jumprelu_threshold", "log_jumprelu_threshold"):
        if isinstance(tensors.get(key), Tensor):
            tensors["threshold"] = tensors.pop(key).float().exp()
            return
    scalar = number(settings, "jump_relu_threshold") * (norms[0] if norms else 1.0)
    tensors["threshold"] = torch.full((config.d_sae,), scalar)


@torch.no_grad()
def _fold(
    sae: SAE, config: SAEConfig, norms: tuple[float, float] | None, with_norms: bool, settings: Mapping[str, Any]
) -> None:
    if with_norms:
        if isinstance(config, TopKConfig) or (isinstance(config, TranscoderConfig) and config.activation == "topk"):
            rescale_latents(sae, decoder_norms(sae))
        elif "threshold" in sae.state_dict():
            sae.state_dict()["threshold"].div_(decoder_norms(sae))
    if norms is not None:
        scale_input(sae, *norms)
    if _norm_mode(settings) == "token-wise":
        if isinstance(config, TranscoderConfig):
            raise ValueError("`norm_activation` of a transcoder must be dataset-wise or inference, got 'token-wise'.")
        sae.token_norm = "constant_norm_rescale"
    if sae.subtracts_b_dec:
        shift_biases(sae, sae.b_dec)
