"""One-to-one matching of the latents of two dictionaries, of other seeds, widths or training.

    cosine[i, j]         of decoder rows i of a and j of b
    correlation[i, j]    Pearson, of latent activations over the same tokens

The matching maximises the sum of one of them over pairs, each latent used at most once (Kuhn-Munkres; Paulo and Belrose
2025, arXiv:2501.16615, compare seeds so). Unlike each latent's nearest neighbour it cannot match many to one.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from sae.base import SparseLatents

if TYPE_CHECKING:
    from sae.dictionary import Dictionary

_TOKENS = 16_384
"""Tokens whose products are summed at a time."""
_DENSE_SHARE = 0.01
"""Share of all pairs that are active together above which a dense product is the faster one."""


class Matching(NamedTuple):
    """Pairs of latents, one for each latent of the narrower dictionary, ordered by the latent of the first."""

    latent_a: Int[np.ndarray, " n_pairs"]
    latent_b: Int[np.ndarray, " n_pairs"]
    cosine: Float[np.ndarray, " n_pairs"]
    """Of the decoder directions of each pair."""
    correlation: Float[np.ndarray, " n_pairs"] | None
    """Of their activations, if there were any; 0 where one of them never varies."""

    def share_above(self, cosine: float) -> float:
        """Share of the pairs whose decoder cosine is above a value, 0.7 in the paper: "found by both"."""
        return float((self.cosine > cosine).mean()) if len(self.cosine) else 0.0


def match(
    a: "Dictionary",
    b: "Dictionary",
    activations: Iterable[Float[Tensor, "_ d_in"]] | None,
    by: Literal["cosine", "correlation"],
) -> Matching:
    """See `Dictionary.match`."""
    if by not in ("cosine", "correlation"):
        raise ValueError(f"`by` must be 'cosine' or 'correlation', got {by!r}. Choose one of them.")
    if by == "correlation" and activations is None:
        raise ValueError("Matching by correlation needs activations, got none. Pass batches of them as `activations`.")
    if a.W_dec.shape[1] != b.W_dec.shape[1]:
        raise ValueError(
            f"Both dictionaries must write to the same space, got widths {a.W_dec.shape[1]} and {b.W_dec.shape[1]}. "
            "Match dictionaries of the same hook of the same model."
        )
    cosines = (_directions(a.W_dec) @ _directions(b.W_dec).t()).cpu().numpy()
    correlations = None if activations is None else correlation_matrix(a, b, activations)
    score = cosines if by == "cosine" else correlations
    assert score is not None
    rows, columns = assign(score)
    return Matching(
        rows, columns, cosines[rows, columns], None if correlations is None else correlations[rows, columns]
    )


def assign(score: Float[np.ndarray, "n m"]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows and columns of the one-to-one assignment with the largest sum; rows rise."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(score, maximize=True)
    return rows, columns


def correlation_matrix(
    a: "Dictionary", b: "Dictionary", activations: Iterable[Float[Tensor, "_ d_in"]]
) -> Float[np.ndarray, "d_sae_a d_sae_b"]:
    """Pearson correlation of every latent of a with every one of b, in one pass over the tokens.

    Raises: ValueError if there are fewer than two tokens.
    """
    n = 0
    sums = [np.zeros(d.d_sae) for d in (a, b)]
    squares = [np.zeros(d.d_sae) for d in (a, b)]
    products = np.zeros((a.d_sae, b.d_sae))
    for batch in activations:
        for x in torch.split(batch, _TOKENS):
            n += len(x)
            found = [d.encode_sparse(x) for d in (a, b)]
            for i, (d, latents) in enumerate(zip((a, b), found, strict=True)):
                index, value = latents.latent.cpu().numpy(), latents.value.double().cpu().numpy()
                sums[i] += np.bincount(index, value, d.d_sae)
                squares[i] += np.bincount(index, value**2, d.d_sae)
            products += _products(found[0], found[1], len(x), products.shape)
    if n < 2:
        raise ValueError(f"A correlation needs at least two tokens, got {n}. Pass more activations.")
    means = [total / n for total in sums]
    deviations = [np.sqrt(np.maximum(square / n - mean**2, 0)) for square, mean in zip(squares, means, strict=True)]
    covariance = products / n - np.outer(means[0], means[1])
    scale = np.outer(*deviations)
    return np.divide(covariance, scale, out=np.zeros_like(scale), where=scale > 0).astype(np.float32)


def _products(
    a: SparseLatents, b: SparseLatents, n_tokens: int, shape: tuple[int, ...]
) -> Float[np.ndarray, "d_sae_a d_sae_b"]:
    """Σ_tokens a_i b_j: over the pairs that are active together, or, where those are many, as a dense product."""
    from scipy.sparse import csr_array

    matrices = [
        csr_array(
            (part.value.double().cpu().numpy(), (part.row.cpu().numpy(), part.latent.cpu().numpy())),
            shape=(n_tokens, width),
        )
        for part, width in zip((a, b), shape, strict=True)
    ]
    pairs = len(a.row) * len(b.row) / max(1, n_tokens)
    if pairs > _DENSE_SHARE * n_tokens * shape[0] * shape[1]:
        dense: NDArray[np.float64] = matrices[0].toarray().T @ matrices[1].toarray()
        return dense
    sparse: NDArray[np.float64] = (matrices[0].T @ matrices[1]).toarray()
    return sparse


def _directions(W_dec: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "d_sae d_in"]:
    return torch.nn.functional.normalize(W_dec.float(), dim=1)
