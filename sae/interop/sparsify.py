"""sparsify (EleutherAI/sparsify, PyPI eai-sparsify): `sae.safetensors` and `cfg.json` in a folder named after the hook.

    encoder.weight (d_sae, d_in)   encoder.bias   W_dec (d_sae, d_in)   b_dec   W_skip (d_in, d_in), optional

    pre_acts    = relu((x − b_dec) @ encoder.weight.T + encoder.bias)           a transcoder leaves b_dec out
    latent_acts = the k largest;  x_hat = latent_acts @ W_dec + b_dec  (+ x @ W_skip.T)

`W_dec` has one row per latent, as here. A skip connection makes it a `transcoder` for us, whatever it reconstructs.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae.config import SAEConfig, TopKConfig, TranscoderConfig
from sae.interop.files import contained, read_json, read_safetensors
from sae.interop.parts import At, Foreign, filled, shift_biases, take, whole_number

NAME = "sparsify"
_WEIGHTS, _CONFIG = "sae.safetensors", "cfg.json"
_WHERE = {
    "W_enc": At("encoder.weight", transposed=True),
    "b_enc": At("encoder.bias"),
    "W_dec": At("W_dec"),
    "b_dec": At("b_dec"),
    "W_skip": At("W_skip"),
}


def claims(folder: Path) -> tuple[str, ...]:
    """See `parts.Format`."""
    return (_WEIGHTS, _CONFIG) if (folder / _WEIGHTS).is_file() else ()


def read(folder: Path) -> Foreign:
    """See `parts.Format`."""
    if not (folder / _CONFIG).is_file():
        raise ValueError(f"`{_CONFIG}` is missing; without its `k` the rule of the encoder is unknown.")
    cfg = read_json(contained(folder, _CONFIG))
    for key, supported in (("activation", "topk"), ("signed", False)):
        if cfg.get(key, supported) != supported:
            raise ValueError(f"`{key}` must be {supported!r}, got {cfg[key]!r}: no architecture here chooses so.")
    d_in, k = whole_number(cfg, "d_in"), whole_number(cfg, "k")
    d_sae = whole_number(cfg, "num_latents") if cfg.get("num_latents") else d_in * whole_number(cfg, "expansion_factor")
    transcodes, skips = bool(cfg.get("transcode", False)), bool(cfg.get("skip_connection", False))
    config: SAEConfig = TopKConfig(d_in=d_in, d_sae=d_sae, k=k)
    if transcodes or skips:
        config = TranscoderConfig(d_in=d_in, d_out=d_in, d_sae=d_sae, k=k, activation="topk", skip=skips)
    sae = filled(config, take(read_safetensors(contained(folder, _WEIGHTS)), _WHERE, config))
    if skips and not transcodes:
        shift_biases(sae, -sae.b_dec)
    return Foreign(sae, _hooks(folder.absolute().name, transcodes), _metadata(folder, cfg))


def _hooks(name: str, transcodes: bool) -> tuple[str, ...]:
    """The hook that the folder is named after: a module path below the base model, `layers.10` or `h.3.mlp`."""
    found = re.fullmatch(r"(?:layers|h)[._](\d+)(?:[._](mlp|attn|attention|self_attn))?", name)
    if found is None:
        return ()
    layer, part = found.groups()
    if transcodes:
        return (f"blocks.{layer}.mlp.hook_in", f"blocks.{layer}.hook_mlp_out") if part == "mlp" else ()
    site = {None: "hook_resid_post", "mlp": "hook_mlp_out"}.get(part, "hook_attn_out")
    return (f"blocks.{layer}.{site}",)


def _metadata(folder: Path, cfg: Mapping[str, Any]) -> dict[str, Any]:
    metadata: dict[str, Any] = {"sparsify": {"hookpoint": folder.absolute().name, **cfg}}
    run = folder.absolute().parent / "config.json"
    if run.is_file():
        settings = read_json(run)
        known = {"model_name": settings.get("model"), "dataset_path": settings.get("dataset")}
        metadata |= {key: value for key, value in known.items() if value is not None}
        if "ctx_len" in settings:
            metadata["context_size"] = settings["ctx_len"]
    return metadata
