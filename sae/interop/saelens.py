"""SAELens 6: the layout of `cfg.json` and `sae_weights.safetensors` that our dictionary folders carry.

SAELens has no BatchTopK for inference; it writes one as a `jumprelu` whose thresholds are all the same, and so do we,
for Matryoshka and for BatchTopK transcoders (`jumprelu_transcoder`, `jumprelu_skip_transcoder`) too. It knows neither
crosscoders nor TopK transcoders: those folders have the same layout under names that it refuses.
Its encoder may leave `b_dec` out; ours never does, so such a file gets `b_enc` shifted by `b_dec @ W_enc`, which is the
same function.
"""

from collections.abc import Mapping
from typing import Any, assert_never

import torch
from torch import Tensor

from sae.architectures import empty
from sae.base import SAE
from sae.config import (
    BatchTopKConfig,
    CrosscoderConfig,
    GatedConfig,
    JumpReLUConfig,
    MatryoshkaBatchTopKConfig,
    SAEConfig,
    StandardConfig,
    TopKConfig,
    TranscoderConfig,
)
from sae.gated import GatedSAE
from sae.threshold import thresholded

SAE_LENS_VERSION = "6.54.12"
"""The version whose layout is written. Readers of older layouts rebuild the metadata unless it is at least 6.0.0."""

_READABLE = ("topk", "jumprelu", "standard", "gated")


def to_saelens(sae: SAE, metadata: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The contents of cfg.json and of sae_weights.safetensors."""
    config = sae.config
    cfg: dict[str, Any] = {
        "architecture": "jumprelu",
        "d_in": config.d_in,
        "d_sae": config.d_sae,
        "dtype": str(sae.W_dec.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": SAE_LENS_VERSION, "training_architecture": config.architecture, **metadata},
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sae.state_dict().items()}
    if thresholded(sae) is not None:
        tensors["threshold"] = tensors["threshold"].expand(config.d_sae).contiguous()
    match config:
        case TopKConfig():
            cfg |= {"architecture": "topk", "k": config.k, "rescale_acts_by_decoder_norm": False}
        case BatchTopKConfig() | MatryoshkaBatchTopKConfig() | JumpReLUConfig():
            pass
        case StandardConfig():
            cfg |= {"architecture": "standard"}
        case GatedConfig():
            cfg |= {"architecture": "gated"}
            tensors["b_gate"] = tensors.pop("b_enc")
        case TranscoderConfig():
            rule = "jumprelu" if config.activation == "batchtopk" else "topk"
            name = f"{rule}_skip_transcoder" if config.skip else f"{rule}_transcoder"
            cfg |= {"architecture": name, "d_out": config.d_out, "apply_b_dec_to_input": False}
        case CrosscoderConfig():
            cfg |= {"architecture": "crosscoder"}
        case _:
            assert_never(config)
    return cfg, tensors


def saelens_reads(config: SAEConfig) -> bool:
    """Whether SAELens has a class for what `to_saelens` writes."""
    topk_transcoder = isinstance(config, TranscoderConfig) and config.activation == "topk"
    return not topk_transcoder and not isinstance(config, CrosscoderConfig)


def from_saelens(cfg: Mapping[str, Any], tensors: Mapping[str, Tensor], trained: SAEConfig | None) -> SAE:
    """The SAE of a SAELens folder.

    Args:
        cfg: the parsed cfg.json.
        trained: the configuration in our dictionary.json; None for a folder that SAELens wrote.
    Raises: ValueError naming the key or tensor that is missing, unexpected, misshapen, not finite or not supported.
    """
    architecture = cfg.get("architecture")
    if trained is None and architecture not in _READABLE:
        raise ValueError(f"`architecture` must be one of {', '.join(_READABLE)}, got {architecture!r}.")
    for key, supported in (("normalize_activations", "none"), ("reshape_activations", "none")):
        if cfg.get(key, supported) != supported:
            raise ValueError(
                f"`{key}` must be {supported!r}, got {cfg[key]!r}. Fold it into the weights with SAELens first."
            )
    config = trained or _config(cfg)
    tensors = dict(tensors)
    _check(tensors, config)
    sae = empty(config)
    if isinstance(config, GatedConfig):
        tensors["b_enc"] = tensors.pop("b_gate")
    if thresholded(sae) is not None:
        threshold = tensors["threshold"]
        if not bool((threshold == threshold[0]).all()):
            raise ValueError(
                f"tensor `threshold` of a {config.architecture} must hold one value for all latents, got several."
            )
        tensors["threshold"] = threshold[0]
    sae.load_state_dict(tensors)
    with torch.no_grad():
        if sae.subtracts_b_dec and not cfg.get("apply_b_dec_to_input", True):
            shift = sae.b_dec @ sae.W_enc
            sae.b_enc.add_(shift)
            if isinstance(sae, GatedSAE):
                sae.b_mag.add_(shift * sae.r_mag.exp())
        if cfg.get("rescale_acts_by_decoder_norm", False):
            norm = sae.W_dec.norm(dim=1).clamp_min(1e-8)
            sae.W_enc.mul_(norm)
            sae.b_enc.mul_(norm)
            sae.W_dec.div_(norm.unsqueeze(1))
    return sae


def _config(cfg: Mapping[str, Any]) -> SAEConfig:
    missing = [key for key in ("d_in", "d_sae") if key not in cfg]
    if cfg["architecture"] == "topk" and "k" not in cfg:
        missing.append("k")
    if missing:
        raise ValueError(f"keys {', '.join(missing)} are missing.")
    d_in, d_sae = cfg["d_in"], cfg["d_sae"]
    match cfg["architecture"]:
        case "topk":
            return TopKConfig(d_in=d_in, d_sae=d_sae, k=cfg["k"])
        case "standard":
            return StandardConfig(d_in=d_in, d_sae=d_sae)
        case "gated":
            return GatedConfig(d_in=d_in, d_sae=d_sae)
        case _:
            return JumpReLUConfig(d_in=d_in, d_sae=d_sae)


def _shapes(config: SAEConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in the file."""
    d_out = config.d_out if isinstance(config, TranscoderConfig) else config.d_in
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (config.d_in, config.d_sae),
        "b_enc": (config.d_sae,),
        "W_dec": (config.d_sae, d_out),
        "b_dec": (d_out,),
    }
    match config:
        case TopKConfig() | StandardConfig():
            return shapes
        case BatchTopKConfig() | MatryoshkaBatchTopKConfig() | JumpReLUConfig():
            return shapes | {"threshold": (config.d_sae,)}
        case GatedConfig():
            del shapes["b_enc"]
            return shapes | dict.fromkeys(("b_gate", "b_mag", "r_mag"), (config.d_sae,))
        case TranscoderConfig():
            skip = {"W_skip": (config.d_out, config.d_in)} if config.skip else {}
            return shapes | skip | ({"threshold": (config.d_sae,)} if config.activation == "batchtopk" else {})
        case CrosscoderConfig():
            return shapes | ({"threshold": (config.d_sae,)} if config.sparsity == "batchtopk" else {})
        case _:
            assert_never(config)


def _check(tensors: Mapping[str, Tensor], config: SAEConfig) -> None:
    shapes = _shapes(config)
    problems = [f"tensor `{name}` is missing" for name in shapes if name not in tensors]
    problems += [f"tensor `{name}` is not part of a {config.architecture}" for name in tensors if name not in shapes]
    for name in shapes.keys() & tensors.keys():
        if tuple(tensors[name].shape) != shapes[name]:
            problems.append(f"tensor `{name}` must have shape {shapes[name]}, got {tuple(tensors[name].shape)}")
        elif not bool(torch.isfinite(tensors[name].sum())) and not bool(torch.isfinite(tensors[name]).all()):
            problems.append(f"tensor `{name}` holds NaN or infinity")
    if problems:
        raise ValueError("; ".join(sorted(problems)) + ".")
