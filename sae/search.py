"""Finding latents: by a direction, by another latent, by the words of their labels."""

import re
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

_LABEL = "label"
_WORD = re.compile(r"\w+")


class Neighbour(NamedTuple):
    """A latent, and the cosine of its decoder direction with what was asked for."""

    latent: int
    cosine: float


class Found(NamedTuple):
    """A latent whose label answers a query; `score` is the share of the query's words that it holds."""

    latent: int
    label: str
    score: float


def nearest(W_dec: Float[Tensor, "d_sae d_out"], direction: Float[Tensor, " width"], n: int) -> list[Neighbour]:
    """The latents whose decoder directions have the largest cosine with `direction`, largest first.

    Raises: ValueError if the direction has another width, is zero, or is not finite.
    """
    direction = direction.to(W_dec.device, torch.float32)
    if tuple(direction.shape) != (W_dec.shape[1],):
        raise ValueError(
            f"`direction` must have shape ({W_dec.shape[1]},), got {tuple(direction.shape)}. Pass one vector of the "
            "space that this dictionary writes to."
        )
    length = direction.norm()
    if not bool(torch.isfinite(length)) or not float(length) > 0:
        raise ValueError(f"`direction` must be finite and not zero, got norm {float(length)}. Pass another one.")
    norms = W_dec.norm(dim=1).float().clamp_min(1e-12)
    cosines = (W_dec @ (direction / length).to(W_dec.dtype)).float() / norms
    top = cosines.topk(min(n, len(cosines)))
    return [Neighbour(*pair) for pair in zip(top.indices.tolist(), top.values.tolist(), strict=True)]


def search(features: Any, query: str, n: int) -> list[Found]:
    """The latents whose labels hold most of the query's words, best first.

    A word counts in full where the label has it, half where a word of the label only begins with it ("river" in
    "rivers"). Case does not matter. Latents of equal score keep their order.

    Args:
        features: the pyarrow Table of a dictionary, with columns `latent` and `label`.
    Raises: ValueError if the table has no such columns or the query no word.
    """
    missing = [name for name in ("latent", _LABEL) if name not in features.column_names]
    if missing:
        raise ValueError(
            f"features.parquet must have the columns latent and {_LABEL} to be searched, but {', '.join(missing)} is "
            "missing. Label the dictionary first."
        )
    words = _WORD.findall(query.casefold())
    if not words:
        raise ValueError(f"A query must hold at least one word, got {query!r}. Name what the latents should be about.")
    found = []
    for latent, label in zip(features["latent"].to_pylist(), features[_LABEL].to_pylist(), strict=True):
        if not label:
            continue
        score = _score(words, _WORD.findall(str(label).casefold()))
        if score > 0:
            found.append(Found(int(latent), str(label), score))
    return sorted(found, key=lambda hit: -hit.score)[:n]


def _score(words: list[str], label: list[str]) -> float:
    held = set(label)
    points = [1.0 if word in held else 0.5 if any(known.startswith(word) for known in held) else 0.0 for word in words]
    return sum(points) / len(words)
