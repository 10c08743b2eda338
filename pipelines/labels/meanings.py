"""Token forms grouped by what the language model itself takes them for: clusters of its unembedding.

Rules about meaning need groups of words that mean alike. The rows of the unembedding are a small embedder that is
always at hand: forms of the corpus are clustered by cosine at several sizes (spherical k-means, Dhillon and Modha 2001,
Machine Learning 42, 143-175), which gives views of a token and of the token before it. A rule that names a cluster is
written down as the list of its forms, so that it runs without the model.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

SIZES = (1024, 256)
_N_ROUNDS = 8
_N_NAMED = 3
_FORMS_PER_CLUSTER = 8
"""Clusters must have this many forms on average: a small corpus gets fewer clusters."""


class Meanings(NamedTuple):
    """Clusters of one size."""

    of_form: NDArray[np.int32]
    """Cluster of each form; the last one, `names[-1]`, holds the forms without an embedding."""
    names: Sequence[str]


@torch.no_grad()
def cluster_forms(
    form: NDArray[np.int32],
    form_names: Sequence[str],
    count: NDArray[np.int64],
    W_U: Float[Tensor, "d_model vocab"],
    size: int,
) -> Meanings:
    """Clusters of the forms that occur.

    Args:
        form: form of every vocabulary id.
        count: occurrences of each form; the commonest members name a cluster.
        W_U: unembedding; a form has the mean of its ids' columns.
    """
    n_forms = len(form_names)
    occurs = torch.from_numpy(np.flatnonzero(count))
    k = min(size, max(len(occurs) // _FORMS_PER_CLUSTER, 1))
    ids = torch.from_numpy(form[: W_U.shape[1]].astype(np.int64))
    sums = torch.zeros(n_forms, W_U.shape[0]).index_add_(0, ids, W_U.T[: len(ids)].float().cpu())
    rows = sums[occurs]
    rows = torch.nn.functional.normalize(rows - rows.mean(0), dim=1)
    # The commonest forms are the first centres: no draw, so the same clusters every time.
    centres = rows[torch.from_numpy(np.argsort(-count[occurs.numpy()], kind="stable")[:k].copy())]
    for _ in range(_N_ROUNDS):
        nearest = (rows @ centres.T).argmax(1)
        summed = torch.zeros_like(centres).index_add_(0, nearest, rows)
        used = summed.norm(dim=1) > 0
        centres = torch.where(used[:, None], torch.nn.functional.normalize(summed, dim=1), centres)
    of_form = np.full(n_forms, k, np.int32)
    of_form[occurs.numpy()] = (rows @ centres.T).argmax(1).numpy()
    members: list[list[str]] = [[] for _ in range(k + 1)]
    for i in np.argsort(-count, kind="stable")[: len(occurs)].tolist():
        if len(members[of_form[i]]) < _N_NAMED:
            members[of_form[i]].append(repr(form_names[i]))
    return Meanings(of_form, [", ".join(names) or "nothing" for names in members])
