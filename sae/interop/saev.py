"""saev (OSU-NLP-Group/saev): `sae.pt`, a line of JSON followed by what `torch.save` wrote.

    {"schema": 2 …, "cfg": {d_vit, exp_factor, "activation": {"cls", "params": {top_k}}, …}, "lib", "commit"}
    W_enc (d_in, d_sae)   b_enc   W_dec (d_sae, d_in)   b_dec   activation.threshold, a scalar, of BatchTopK

    latent_acts = activation(x @ W_enc + b_enc);  x_hat = latent_acts @ W_dec + b_dec

BatchTopK has a threshold at inference where the file has one; older files choose k a token. Their TopK may keep a
negative value of a token that has fewer than k positive ones; here such a latent is off.
"""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae.config import BatchTopKConfig, SAEConfig, StandardConfig, TopKConfig
from sae.interop.files import contained, parse_json, read_pt
from sae.interop.parts import At, Foreign, dimension, filled, shift_biases, take, whole_number

NAME = "saev"
_FILE = "sae.pt"
_MAX_HEADER = 1_000_000
_WHERE = {name: At(name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")} | {"threshold": At("activation.threshold")}


def claims(folder: Path) -> tuple[str, ...]:
    """See `parts.Format`."""
    if not (folder / _FILE).is_file():
        return ()
    with contained(folder, _FILE).open("rb") as stream:
        return (_FILE,) if stream.read(1) == b"{" else ()


def read(folder: Path) -> Foreign:
    """See `parts.Format`."""
    file = contained(folder, _FILE)
    with file.open("rb") as stream:
        header = parse_json(file, stream.readline(_MAX_HEADER))
        state = read_pt(io.BytesIO(stream.read()), file)
    cfg = header.get("cfg", header)
    if not isinstance(cfg, Mapping):
        raise ValueError(f"`cfg` must be an object, got {json.dumps(cfg)[:80]}.")
    sae = filled(config := _config(cfg, state), take(state, _WHERE, config))
    if isinstance(config, BatchTopKConfig):
        sae.state_dict()["threshold"].clamp_(min=0.0)  # one of 0 or below is a plain ReLU there
    shift_biases(sae, sae.b_dec)
    return Foreign(sae, (), {"saev": {key: header.get(key) for key in ("schema", "lib", "commit", "cfg")}})


def _config(cfg: Mapping[str, Any], state: Mapping[str, Any]) -> SAEConfig:
    widths: dict[str, Any] = {"d_in": dimension(state, "W_enc", 0), "d_sae": dimension(state, "W_enc", 1)}
    activation = cfg.get("activation", {"cls": "Relu"})
    if not isinstance(activation, Mapping) or activation.get("cls") not in ("Relu", "TopK", "BatchTopK"):
        raise ValueError(f"`cfg.activation.cls` must be Relu, TopK or BatchTopK, got {activation!r}.")
    if activation["cls"] == "Relu":
        return StandardConfig(**widths)
    k = min(whole_number(activation.get("params") or {}, "top_k"), widths["d_sae"])
    if activation["cls"] == "BatchTopK" and "activation.threshold" in state:
        return BatchTopKConfig(**widths, k=k)
    return TopKConfig(**widths, k=k)
