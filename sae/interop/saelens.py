"""SAELens 6: `cfg.json` and `sae_weights.safetensors`, the layout that our own dictionary folders carry too.

    W_enc (d_in, d_sae)   b_enc   W_dec (d_sae, d_out)   b_dec
    jumprelu              and threshold (d_sae); log_threshold in old training files
    gated                 b_gate, b_mag, r_mag in place of b_enc
    batchtopk, matryoshka_batchtopk      and topk_threshold, a scalar; these are training checkpoints, because
    transcoder, skip_transcoder, jumprelu_transcoder, jumprelu_skip_transcoder      W_skip (d_out, d_in), threshold

SAELens has no BatchTopK for inference; it writes one as a `jumprelu` whose thresholds are all the same, and so do we,
for Matryoshka and for BatchTopK transcoders too. It knows neither crosscoders nor TopK transcoders: those folders have
the same layout under names that it refuses. Its abstopk has negative latent activations, temporal reads whole contexts,
and matching_pursuit encodes step by step: no architecture here computes them, so they are refused.

Its encoder may leave `b_dec` out; ours never does, so such a file gets `b_enc` shifted by `b_dec @ W_enc`, which is the
same function. Files from before version 6 keep everything at the top level of cfg.json under other names.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, assert_never, cast

import torch
from torch import Tensor

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
from sae.interop.files import contained, read_json, read_safetensors, safetensors_header
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
from sae.naming import to_transformer_lens
from sae.threshold import thresholded
from sae.tokennorm import TOKEN_NORMS, TokenNorm

NAME = "SAELens"
SAE_LENS_VERSION = "6.54.12"
"""The version whose layout is written. Readers of older layouts rebuild the metadata unless it is at least 6.0.0."""

CFG, WEIGHTS, SPARSITY, SCALER = (
    "cfg.json",
    "sae_weights.safetensors",
    "sparsity.safetensors",
    "activation_scaler.json",
)
_READABLE = ("topk", "jumprelu", "standard", "gated", "batchtopk", "matryoshka_batchtopk")
_TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
_DTYPES = {"F32": "float32", "F64": "float64", "F16": "float16", "BF16": "bfloat16"}
_EXACT = ("threshold", "log_threshold", "topk_threshold")
"""Tensors that SAELens keeps in a dtype of their own."""


# ---- writing ---------------------------------------------------------------------------------------------------------


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
        "normalize_activations": sae.token_norm,
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
            rule = "topk" if config.activation == "topk" else "jumprelu"
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


# ---- reading ---------------------------------------------------------------------------------------------------------


def claims(folder: Path) -> tuple[str, ...]:
    """See `parts.Format`."""
    return (CFG, WEIGHTS) if (folder / WEIGHTS).is_file() and not (folder / "config.json").is_file() else ()


def read(folder: Path) -> Foreign:
    """See `parts.Format`."""
    cfg = read_json(contained(folder, CFG))
    file = contained(folder, WEIGHTS)
    tensors = read_safetensors(file)
    cfg = current(cfg, tensors)
    _check_dtypes(cfg, file)
    sae = from_saelens(cfg, tensors, None, _scaling_factor(folder, cfg))
    metadata = cfg["metadata"]
    hook = metadata.get("hf_hook_name") or metadata.get("hook_name")
    out = metadata.get("hf_hook_name_out") or metadata.get("hook_name_out")
    return Foreign(sae, tuple(str(name) for name in (hook, out) if name), metadata)


def hook_metadata(suffix: str, hook_name: str) -> dict[str, str]:
    """A hook under the names that SAELens looks for: TransformerLens' own, and the path in the Hugging Face model.

    A place that TransformerLens has no name for goes by its path in both.
    """
    try:
        lens = to_transformer_lens(hook_name)
    except ValueError:
        lens = hook_name
    return {f"hook_name{suffix}": lens, f"hf_hook_name{suffix}": hook_name}


def from_saelens(
    cfg: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    trained: SAEConfig | None,
    scaling_factor: float | None = None,
) -> SAE:
    """The SAE of a folder in this layout.

    Args:
        cfg: the parsed cfg.json, in the form of SAELens 6.
        trained: the configuration in our dictionary.json; None for a folder that SAELens wrote.
        scaling_factor: what activations are multiplied by before the encoder, where cfg.json says that they are.
    Raises: ValueError naming the key or tensor that is missing, unexpected, misshapen, not finite or not supported.
    """
    normalisation = cfg.get("normalize_activations") or "none"
    if normalisation not in (*TOKEN_NORMS, "expected_average_only_in"):
        raise ValueError(
            f"`normalize_activations` must be one of {', '.join(TOKEN_NORMS)}, expected_average_only_in, got "
            f"{normalisation!r}. Fold it into the weights with SAELens first."
        )
    if cfg.get("reshape_activations", "none") not in ("none", "hook_z"):
        raise ValueError(f"`reshape_activations` must be none or hook_z, got {cfg['reshape_activations']!r}.")
    config = trained or _config(cfg)
    tensors = dict(tensors)
    _normalise_thresholds(tensors, config, trained)
    names = {name: At(name) for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "r_mag", "b_mag", "W_skip")}
    if isinstance(config, GatedConfig):
        names["b_enc"] = At("b_gate")
    sae = filled(config, take(tensors, names, config))
    if normalisation == "expected_average_only_in":
        if scaling_factor is None:
            raise ValueError(
                "`normalize_activations` is 'expected_average_only_in', but the factor is not known: "
                f"{SCALER} must hold `scaling_factor`. Fold it into the weights with SAELens, or write that file."
            )
        scale_input(sae, scaling_factor)
        if _rescales(cfg) and thresholded(sae) is not None:
            sae.state_dict()["threshold"].div_(scaling_factor)  # it is compared with activations times decoder norms
    else:
        sae.token_norm = cast(TokenNorm, normalisation)
    if sae.subtracts_b_dec and not cfg.get("apply_b_dec_to_input", True):
        shift_biases(sae, sae.b_dec)
    if _rescales(cfg):
        rescale_latents(sae, decoder_norms(sae))
    return sae


def current(cfg: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """cfg.json in the form of SAELens 6, whichever version wrote it; drops a scaling factor of ones from the tensors.

    Raises: ValueError for a scaling factor that is not folded.
    """
    cfg = {key: value for key, value in cfg.items() if value is not None}
    metadata = dict(cfg.get("metadata") or {})
    version = str(cfg.get("sae_lens_version") or metadata.get("sae_lens_version") or "")
    if version.partition(".")[0].isdigit() and int(version.partition(".")[0]) >= 6:
        return cfg | {"metadata": metadata}
    scaling = tensors.pop("scaling_factor", None)
    if scaling is not None and not torch.allclose(scaling, torch.ones_like(scaling)):
        raise ValueError(
            "tensor `scaling_factor` must be 1 for all latents: fold it into the weights with SAELens first."
        )
    renamed = {
        "hook_point": "hook_name",
        "hook_point_head_index": "hook_head_index",
        "activation_fn_str": "activation_fn",
    }
    cfg = {renamed.get(key, key): value for key, value in cfg.items()}
    cfg.setdefault("architecture", "standard")
    settings = cfg.get("activation_fn_kwargs") or {}
    if cfg.get("activation_fn") == "topk":
        cfg |= {"architecture": "topk"} | ({"k": settings["k"]} if "k" in settings else {})
    if isinstance(cfg.get("normalize_activations"), bool):
        cfg["normalize_activations"] = "expected_average_only_in" if cfg["normalize_activations"] else "none"
    kept = ("model_name", "hook_name", "hook_name_out", "context_size", "dataset_path", "prepend_bos", "neuronpedia_id")
    return cfg | {"metadata": metadata | {key: cfg[key] for key in kept if key in cfg}}


def _check_dtypes(cfg: Mapping[str, Any], file: Path) -> None:
    said = str(cfg.get("dtype", "")).removeprefix("torch.")
    for name, entry in safetensors_header(file).items():
        if said and name not in _EXACT and _DTYPES.get(entry.dtype) != said:
            raise ValueError(f"`dtype` is {said!r}, but tensor `{name}` holds {_DTYPES.get(entry.dtype, entry.dtype)}.")


def _scaling_factor(folder: Path, cfg: Mapping[str, Any]) -> float | None:
    if cfg.get("normalize_activations") != "expected_average_only_in" or not (folder / SCALER).is_file():
        return None
    return number(read_json(contained(folder, SCALER)), "scaling_factor")


def _rescales(cfg: Mapping[str, Any]) -> bool:
    """Whether latents are chosen by, and come out as, activations times decoder norms."""
    trains = cfg.get("architecture") in ("batchtopk", "matryoshka_batchtopk")
    return bool(cfg.get("rescale_acts_by_decoder_norm", trains))


def _normalise_thresholds(tensors: dict[str, Any], config: SAEConfig, trained: SAEConfig | None) -> None:
    """Bring the thresholds, in place, to the name, number and form that our SAE of this configuration has."""
    if isinstance(config, TranscoderConfig) and config.activation == "jumprelu" and "threshold" not in tensors:
        tensors["threshold"] = torch.zeros(config.d_sae)  # a plain ReLU
    if "log_threshold" in tensors and "threshold" not in tensors:
        tensors["threshold"] = tensors.pop("log_threshold").float().exp()
    if isinstance(config, BatchTopKConfig | MatryoshkaBatchTopKConfig) and trained is None:
        if "topk_threshold" in tensors:
            tensors["threshold"] = tensors.pop("topk_threshold")
        return
    rule = getattr(config, "activation", getattr(config, "sparsity", config.architecture))
    if rule not in ("batchtopk", "matryoshka_batchtopk") or "threshold" not in tensors:
        return
    threshold = tensors["threshold"]
    if tuple(threshold.shape) != (config.d_sae,):
        raise ValueError(f"tensor `threshold` must have shape {(config.d_sae,)}, got {tuple(threshold.shape)}.")
    if not bool((threshold == threshold[0]).all()):
        raise ValueError(
            f"tensor `threshold` of a {config.architecture} must hold one value for all latents, got several."
        )
    tensors["threshold"] = threshold[0]


def _config(cfg: Mapping[str, Any]) -> SAEConfig:
    architecture = cfg.get("architecture")
    if architecture not in _READABLE + _TRANSCODERS:
        raise ValueError(f"`architecture` must be one of {', '.join(_READABLE + _TRANSCODERS)}, got {architecture!r}.")
    needed = ["d_in", "d_sae"]
    needed += ["k"] if architecture in ("topk", "batchtopk", "matryoshka_batchtopk") else []
    needed += ["d_out"] if architecture in _TRANSCODERS else []
    missing = [key for key in needed if key not in cfg]
    if missing:
        raise ValueError(f"keys {', '.join(missing)} are missing.")
    widths: dict[str, Any] = {"d_in": whole_number(cfg, "d_in"), "d_sae": whole_number(cfg, "d_sae")}
    match architecture:
        case "topk":
            return TopKConfig(**widths, k=whole_number(cfg, "k"))
        case "batchtopk" | "matryoshka_batchtopk":
            # k may be a float there, a mean over tokens; it says nothing once the threshold is known.
            k = max(1, round(number(cfg, "k")))
            if architecture == "batchtopk":
                return BatchTopKConfig(**widths, k=k)
            sizes = tuple(sorted({*(cfg.get("matryoshka_widths") or ()), widths["d_sae"]}))
            return MatryoshkaBatchTopKConfig(**widths, k=k, prefix_sizes=sizes)
        case "standard":
            return StandardConfig(**widths)
        case "gated":
            return GatedConfig(**widths)
        case "jumprelu":
            return JumpReLUConfig(**widths)
        case _:
            skip = "skip" in str(architecture)
            return TranscoderConfig(**widths, d_out=whole_number(cfg, "d_out"), activation="jumprelu", skip=skip)
