"""openai/sparse_autoencoder: one `.pt` file a dictionary, named after its layer.

    pre_bias (d_in)   encoder.weight (d_sae, d_in)   latent_bias (d_sae)   decoder.weight (d_in, d_sae)
    activation "ReLU" | "TopK"   activation_state_dict {k, postact_fn}   and three statistics of training

    latent_acts = activation((x_n − pre_bias) @ encoder.weight.T + latent_bias);  x_n_hat = … + pre_bias

"TopK" implies that x_n is x normalised token by token (`sae.tokennorm`, "layer_norm"); "ReLU" that it is x itself.
"""

from pathlib import Path
from typing import Any

from sae.config import SAEConfig, StandardConfig, TopKConfig
from sae.interop.files import contained, mentions, read_pt
from sae.interop.parts import At, Foreign, dimension, filled, take, whole_number

NAME = "openai/sparse_autoencoder"
_WHERE = {
    "W_enc": At("encoder.weight", transposed=True),
    "b_enc": At("latent_bias"),
    "W_dec": At("decoder.weight", transposed=True),
    "b_dec": At("pre_bias"),
}
_UNUSED = (
    "activation",
    "activation_state_dict",
    "stats_last_nonzero",
    "latents_activation_frequency",
    "latents_mean_square",
)
_OWN_NAMES = ("pre_bias", "latent_bias")
_OTHERS = ("ae.pt", "sae.pt", "cc_weights.pt", "model_final.pt", "ae_final.pt")


def claims(folder: Path) -> tuple[str, ...]:
    """See `parts.Format`. A name says nothing here, so a lone `.pt` file of no other format is looked into."""
    files = [file for file in sorted(folder.glob("*.pt")) if file.name not in _OTHERS]
    if len(files) != 1 or files[0].with_name(f"{files[0].stem}_cfg.json").exists():
        return ()
    return (files[0].name,) if mentions(contained(folder, files[0].name), _OWN_NAMES) else ()


def is_one(state: dict[str, Any]) -> bool:
    """Whether a state has this format's own names."""
    return state.keys() >= set(_OWN_NAMES)


def read(folder: Path) -> Foreign:
    """See `parts.Format`."""
    (name,) = claims(folder)
    return of_state(read_pt(contained(folder, name)))


def of_state(state: dict[str, Any]) -> Foreign:
    """The dictionary in a state. Raises: ValueError naming the key or tensor that is wrong."""
    widths: dict[str, Any] = {
        "d_in": dimension(state, "encoder.weight", 1),
        "d_sae": dimension(state, "encoder.weight", 0),
    }
    activation, settings = state.get("activation", "ReLU"), state.get("activation_state_dict", {})
    config: SAEConfig
    if activation == "ReLU":
        config = StandardConfig(**widths)
    elif activation == "TopK":
        if settings.get("postact_fn") != "ReLU":
            raise ValueError(
                f"`activation_state_dict.postact_fn` must be 'ReLU', got {settings.get('postact_fn')!r}: "
                "latent activations are never negative here."
            )
        config = TopKConfig(**widths, k=whole_number(settings, "k"))
    else:
        raise ValueError(f"`activation` must be ReLU or TopK, got {activation!r}.")
    sae = filled(config, take(state, _WHERE, config, unused=_UNUSED))
    sae.token_norm = "layer_norm" if activation == "TopK" else "none"
    return Foreign(sae)
