"""From an entry under `saes:` to the SAE that it asks for."""

from collections.abc import Sequence
from typing import Any

from pipelines.config import SAESpec
from sae import (
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

OF_ONE_HOOK: dict[
    str,
    type[StandardConfig | GatedConfig | TopKConfig | BatchTopKConfig | JumpReLUConfig | MatryoshkaBatchTopKConfig],
] = {
    "standard": StandardConfig,
    "gated": GatedConfig,
    "topk": TopKConfig,
    "batchtopk": BatchTopKConfig,
    "jumprelu": JumpReLUConfig,
    "matryoshka_batchtopk": MatryoshkaBatchTopKConfig,
}


def n_latents(spec: SAESpec, d_in: int) -> int:
    """The SAE's width; an expansion factor counts widths of the first hook."""
    return spec.d_sae or round(spec.expansion_factor * d_in)


def sae_config(spec: SAESpec, widths: Sequence[int]) -> SAEConfig:
    """The configuration of the SAE that an entry asks for.

    Args:
        widths: of the hooks in `RunConfig.hooks_of`.
    Raises: ValueError for settings that do not fit each other, such as k above the number of latents.
    """
    settings: dict[str, Any] = {"d_sae": n_latents(spec, widths[0]), **spec.settings()}
    match spec.architecture:
        case "crosscoder":
            return CrosscoderConfig(d_ins=tuple(widths), **settings)
        case "transcoder":
            return TranscoderConfig(d_in=widths[0], d_out=widths[1], **settings)
        case other:
            return OF_ONE_HOOK[other](d_in=widths[0], **settings)
