"""Crosscoders: of ckkissane/crosscoder-model-diff-replication, and of science-of-finetuning/dictionary_learning.

the first    cfg.json and cc_weights.pt, or N_cfg.json and N.pt
    W_enc (n_sources, d_in, d_sae)   W_dec (d_sae, n_sources, d_in)   b_enc (d_sae)   b_dec (n_sources, d_in)
the second   config.json and model.safetensors, or ae.pt
    encoder.weight (n_sources, d_in, d_sae)   decoder.weight (n_sources, d_sae, d_in)   encoder.bias   decoder.bias
    code_normalization_id;  and, with BatchTopK, k and threshold, both scalars

    latent_acts = relu(Σ_s x_s @ W_enc_s + b_enc);  x_hat_s = latent_acts @ W_dec_s + b_dec_s

Neither encoder subtracts b_dec. With BatchTopK a latent is on where its activation times Σ_s ‖W_dec_s‖, or what else
`code_normalization_id` says, exceeds the threshold; here latent activations come out times that, so that one threshold
does for all of them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae.config import CrosscoderConfig
from sae.crosscoder import Crosscoder
from sae.interop.files import contained, read_json, read_pt, read_safetensors
from sae.interop.parts import At, Foreign, filled, rescale_latents, shift_biases, take, tensor_problem, whole_number

NAME = "crosscoder"
_JOINED = {name: At(name) for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
_CODE_NORMALISATIONS = {
    1: "the sum of the sources' decoder norms",
    2: "the norm of the joined decoder row",
    4: "nothing",
}
"""What BatchTopK multiplies latent activations by before it compares them, by `code_normalization_id`."""


def claims(folder: Path) -> tuple[str, ...]:
    """See `parts.Format`."""
    if (folder / "cc_weights.pt").is_file():
        return ("cc_weights.pt", "cfg.json")
    numbered = sorted(file for file in folder.glob("*.pt") if (folder / f"{file.stem}_cfg.json").is_file())
    if len(numbered) == 1:
        return (numbered[0].name, f"{numbered[0].stem}_cfg.json")
    for weights in ("model.safetensors", "ae.pt"):
        if (folder / weights).is_file() and (folder / "config.json").is_file():
            return (weights, "config.json") if _is_second(read_json(folder / "config.json")) else ()
    return ()


def _is_second(settings: Mapping[str, Any]) -> bool:
    trainer = settings.get("trainer", settings)
    return (
        isinstance(trainer, Mapping) and "num_layers" in trainer and {"activation_dim", "dict_size"} <= trainer.keys()
    )


def read(folder: Path) -> Foreign:
    """See `parts.Format`."""
    weights, settings_file = claims(folder)
    if not (folder / settings_file).is_file():
        raise ValueError(f"`{settings_file}` is missing; without it the hooks are unknown.")
    settings = read_json(contained(folder, settings_file))
    file = contained(folder, weights)
    state: dict[str, Any] = (
        dict(read_safetensors(file, whole=("k", "code_normalization_id")))
        if weights.endswith(".safetensors")
        else read_pt(file)
    )
    first = "W_enc" in state
    names = (
        ("W_enc", "W_dec", "b_enc", "b_dec")
        if first
        else (
            "encoder.weight",
            "decoder.weight",
            "encoder.bias",
            "decoder.bias",
        )
    )
    batchtopk = "threshold" in state
    joined, config = _join(state, names, latents_first=first, batchtopk=batchtopk)
    sae = filled(config, take(joined, _JOINED, config))
    assert isinstance(sae, Crosscoder)
    if batchtopk:
        sae.threshold.clamp_(min=0.0)
        code = int(state.get("code_normalization_id", 1))
        if code != 4:
            norms = sae.source_norms().sum(dim=1) if code == 1 else sae.W_dec.norm(dim=1)
            rescale_latents(sae, norms.clamp_min(1e-8))
    shift_biases(sae, sae.b_dec)
    hook = settings.get("hook_point")
    return Foreign(sae, (str(hook),) * len(config.d_ins) if hook else (), {"crosscoder": settings})


def _join(
    state: Mapping[str, Any], names: tuple[str, str, str, str], *, latents_first: bool, batchtopk: bool
) -> tuple[dict[str, Any], CrosscoderConfig]:
    """The sources side by side, as `Crosscoder` has them. Raises: ValueError listing what is wrong with the tensors."""
    enc, dec, b_enc, b_dec = names
    W_enc = state.get(enc)
    if not isinstance(W_enc, Tensor) or W_enc.ndim != 3:
        raise ValueError(f"tensor `{enc}` must have three dimensions, got {tuple(getattr(W_enc, 'shape', ()))}.")
    n, d, d_sae = W_enc.shape
    shapes = {
        enc: (n, d, d_sae),
        dec: (d_sae, n, d) if latents_first else (n, d_sae, d),
        b_enc: (d_sae,),
        b_dec: (n, d),
    }
    unused = {"code_normalization_id", "k"}
    problems = [f"tensor `{name}` is missing" for name in shapes if name not in state]
    problems += [
        f"tensor `{name}` is not part of a crosscoder"
        for name in state
        if name not in shapes and name not in unused | {"threshold"}
    ]
    found = [tensor_problem(name, state[name], shape) for name, shape in shapes.items() if name in state]
    problems += [problem for problem in found if problem is not None]
    code = state.get("code_normalization_id")
    if batchtopk and isinstance(code, Tensor) and int(code) not in _CODE_NORMALISATIONS:
        known = ", ".join(f"{id_} ({what})" for id_, what in _CODE_NORMALISATIONS.items())
        problems.append(f"tensor `code_normalization_id` must be {known}, got {int(code)}")
    if problems:
        raise ValueError("; ".join(sorted(problems)) + ".")
    W_dec = state[dec] if latents_first else state[dec].transpose(0, 1)
    joined: dict[str, Any] = {
        "W_enc": W_enc.reshape(n * d, d_sae),
        "W_dec": W_dec.reshape(d_sae, n * d),
        "b_enc": state[b_enc],
        "b_dec": state[b_dec].reshape(n * d),
    }
    sparsity: dict[str, Any] = {"sparsity": "l1"}
    if batchtopk:
        joined["threshold"] = torch.as_tensor(state["threshold"])
        sparsity = {"sparsity": "batchtopk", "k": whole_number(state, "k")}
    return joined, CrosscoderConfig(d_ins=(d,) * n, d_sae=d_sae, **sparsity)
