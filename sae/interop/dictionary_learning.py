"""dictionary_learning (saprmarks/dictionary_learning, 0.1): `ae.pt` beside a `config.json` with `trainer.dict_class`.

    AutoEncoder              encoder.weight (d_sae, d_in), encoder.bias, decoder.weight (d_in, d_sae), bias
    AutoEncoderNew           the same with decoder.bias for bias, which its encoder does not subtract
    GatedAutoEncoder         encoder.weight, decoder.weight, decoder_bias, gate_bias, mag_bias, r_mag
    AutoEncoderTopK          encoder.*, decoder.weight, b_dec, k, threshold (not used unless asked for)
    BatchTopKSAE             the same; threshold −1 is one that was never set, and acts as 0
    MatryoshkaBatchTopKSAE   W_enc, b_enc, W_dec, b_dec, k, threshold, group_sizes
    JumpReluAutoEncoder      W_enc, b_enc, W_dec, b_dec, threshold; its encoder does not subtract b_dec

`AutoEncoder.from_pretrained` makes decoder rows norm 1 by default, and so does this. A file of a training backup holds
the state under `ae`, with biases that still want `norm_factor`.
"""

from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.base import SAE
from sae.config import (
    BatchTopKConfig,
    GatedConfig,
    JumpReLUConfig,
    MatryoshkaBatchTopKConfig,
    SAEConfig,
    StandardConfig,
    TopKConfig,
)
from sae.interop.files import contained, read_json, read_pt
from sae.interop.parts import (
    At,
    Foreign,
    decoder_norms,
    dimension,
    filled,
    rescale_latents,
    shift_biases,
    take,
    whole_number,
)

NAME = "dictionary_learning"
_WEIGHTS, _CONFIG = "ae.pt", "config.json"

_LINEAR = {
    "W_enc": At("encoder.weight", transposed=True),
    "b_enc": At("encoder.bias"),
    "W_dec": At("decoder.weight", transposed=True),
}
_PLAIN = {name: At(name) for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
_CLASSES = (
    "AutoEncoder",
    "AutoEncoderNew",
    "GatedAutoEncoder",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
    "JumpReluAutoEncoder",
)


def claims(folder: Path) -> tuple[str, ...]:
    """See `parts.Format`."""
    if not (folder / _WEIGHTS).is_file():
        return ()
    if not (folder / _CONFIG).is_file():
        return (_WEIGHTS,)
    return () if "num_layers" in read_json(folder / _CONFIG).get("trainer", {}) else (_WEIGHTS, _CONFIG)


def read(folder: Path) -> Foreign:
    """See `parts.Format`."""
    if not (folder / _CONFIG).is_file():
        raise ValueError(
            f"`{_CONFIG}` is missing; without its `trainer.dict_class` the rule of the encoder is unknown."
        )
    trainer = read_json(contained(folder, _CONFIG)).get("trainer")
    if not isinstance(trainer, dict):
        raise ValueError("`trainer` must be an object with `dict_class`.")
    state = read_pt(contained(folder, _WEIGHTS))
    sae = _sae(str(trainer.get("dict_class")), _trained(state))
    return Foreign(sae, _hook(trainer), {"model_name": trainer.get("lm_name"), "dictionary_learning": trainer})


def _trained(state: dict[str, Any]) -> dict[str, Any]:
    """The weights of a state, with the biases of a training backup scaled as the library scales them at its end."""
    if not isinstance(state.get("ae"), dict):
        return state
    weights, factor = dict(state["ae"]), state.get("norm_factor")
    if factor is None:
        return weights
    biases = ("encoder.bias", "bias", "decoder.bias", "b_enc", "b_dec", "decoder_bias", "gate_bias", "mag_bias")
    for name in biases:
        if name in weights:
            weights[name] = weights[name] * float(factor)
    if "threshold" in weights and bool((weights["threshold"] >= 0).all()):
        weights["threshold"] = weights["threshold"] * float(factor)
    return weights


def _sae(kind: str, state: Mapping[str, Any]) -> SAE:
    match kind:
        case "AutoEncoder":
            where = _LINEAR | {"b_dec": At("bias")}
            sae = _of(StandardConfig(**_linear_widths(state)), state, where)
            norms = decoder_norms(sae)
            if not torch.allclose(norms, torch.ones_like(norms)):
                rescale_latents(sae, norms)
            return sae
        case "AutoEncoderNew":
            return _unshifted(
                _of(StandardConfig(**_linear_widths(state)), state, _LINEAR | {"b_dec": At("decoder.bias")})
            )
        case "GatedAutoEncoder":
            where = _LINEAR | {
                "b_enc": At("gate_bias"),
                "b_mag": At("mag_bias"),
                "r_mag": At("r_mag"),
                "b_dec": At("decoder_bias"),
            }
            return _of(GatedConfig(**_linear_widths(state)), state, where)
        case "AutoEncoderTopK":
            config: SAEConfig = TopKConfig(**_linear_widths(state), k=whole_number(state, "k"))
            return _of(config, state, _LINEAR | {"b_dec": At("b_dec")}, unused=("k", "threshold"))
        case "BatchTopKSAE":
            config = BatchTopKConfig(**_linear_widths(state), k=whole_number(state, "k"))
            where = _LINEAR | {"b_dec": At("b_dec"), "threshold": At("threshold")}
            return _unset(_of(config, state, where, unused=("k",)))
        case "MatryoshkaBatchTopKSAE":
            sizes = state.get("group_sizes")
            if not isinstance(sizes, Tensor) or sizes.ndim != 1 or sizes.is_floating_point():
                raise ValueError("tensor `group_sizes` must list the sizes of the groups.")
            config = MatryoshkaBatchTopKConfig(
                **_plain_widths(state), k=whole_number(state, "k"), prefix_sizes=tuple(accumulate(sizes.tolist()))
            )
            return _unset(_of(config, state, _PLAIN, unused=("k", "group_sizes")))
        case "JumpReluAutoEncoder":
            return _unshifted(_of(JumpReLUConfig(**_plain_widths(state)), state, _PLAIN))
    raise ValueError(f"`trainer.dict_class` must be one of {', '.join(_CLASSES)}, got {kind!r}.")


def _of(config: SAEConfig, state: Mapping[str, Any], where: Mapping[str, At], unused: tuple[str, ...] = ()) -> SAE:
    return filled(config, take(state, where, config, unused=unused))


def _linear_widths(state: Mapping[str, Any]) -> dict[str, Any]:
    return {"d_in": dimension(state, "encoder.weight", 1), "d_sae": dimension(state, "encoder.weight", 0)}


def _plain_widths(state: Mapping[str, Any]) -> dict[str, Any]:
    return {"d_in": dimension(state, "W_enc", 0), "d_sae": dimension(state, "W_enc", 1)}


def _unshifted(sae: SAE) -> SAE:
    shift_biases(sae, sae.b_dec)
    return sae


def _unset(sae: SAE) -> SAE:
    """Our thresholds are never negative; theirs act on what a ReLU left, so that one below 0 acts as 0."""
    sae.state_dict()["threshold"].clamp_(min=0.0)
    return sae


def _hook(trainer: Mapping[str, Any]) -> tuple[str, ...]:
    """The TransformerLens name of a residual stream, MLP or attention output; the submodule's own name otherwise."""
    layer, name = trainer.get("layer"), trainer.get("submodule_name")
    if isinstance(layer, int) and (not name or "resid_post" in name):
        return (f"blocks.{layer}.hook_resid_post",)
    if isinstance(layer, int) and isinstance(name, str):
        for word, hook in (
            ("mlp_out", "hook_mlp_out"),
            ("attention_out", "hook_attn_out"),
            ("attn_out", "hook_attn_out"),
        ):
            if word in name:
                return (f"blocks.{layer}.{hook}",)
    return (name,) if isinstance(name, str) and name else ()
