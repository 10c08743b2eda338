"""scores.safetensors: the pooled activation of every latent on every example, sparse, for whoever computes again.

For each dictionary NAME, in the rows' order of audit.json's `examples` (compressed sparse rows):

    NAME/indptr [n_examples + 1], NAME/indices [n_active], NAME/values [n_active], NAME/shape [2]

and, where documents of the corpus were given, the candidates' pooled activations on them:

    NAME/corpus_latents [n_candidates], NAME/corpus [n_documents, n_candidates]
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from safetensors.numpy import load, save

from pipelines.audit.views import Spot, View
from pipelines.rundir import write_bytes


def write_scores(path: Path, views: Sequence[View], candidates: Sequence[Spot] = ()) -> str:
    """Write the scores of all views, and those of the candidates over the corpus; returns the file's SHA-256."""
    from scipy.sparse import csr_array

    tensors: dict[str, np.ndarray] = {}
    for v, view in enumerate(views):
        rows = csr_array(view.scores.astype(np.float32))
        tensors |= {
            f"{view.name}/indptr": rows.indptr.astype(np.int64),
            f"{view.name}/indices": rows.indices.astype(np.int32),
            f"{view.name}/values": rows.data,
            f"{view.name}/shape": np.array(rows.shape, dtype=np.int64),
        }
        if view.corpus is not None:
            latents = np.array(sorted({spot.latent for spot in candidates if spot.view == v}), dtype=np.int64)
            tensors |= {
                f"{view.name}/corpus_latents": latents,
                f"{view.name}/corpus": np.ascontiguousarray(view.corpus[:, latents], dtype=np.float32),
            }
    written = save(tensors)
    write_bytes(path, written)
    return hashlib.sha256(written).hexdigest()


class Scores(NamedTuple):
    """What one dictionary makes of the examples, and of the corpus as far as candidates go."""

    examples: Float[np.ndarray, "n_examples d_sae"]
    corpus: Float[np.ndarray, "n_documents n_candidates"] | None
    corpus_latents: Int[np.ndarray, " n_candidates"]


def read_scores(path: Path) -> dict[str, Scores]:
    """The scores by name of their dictionary.

    Raises:
        ValueError: the file is damaged, or its parts do not fit each other.
    """
    from scipy.sparse import csr_array

    try:
        tensors = load(path.read_bytes())
        out = {}
        for name in sorted({key.rpartition("/")[0] for key in tensors}):
            indptr, indices, values, shape = (
                tensors[f"{name}/{part}"] for part in ("indptr", "indices", "values", "shape")
            )
            rows = csr_array((values, indices, indptr), shape=tuple(int(n) for n in shape))
            rows.check_format()
            latents = tensors.get(f"{name}/corpus_latents", np.empty(0, dtype=np.int64))
            out[name] = Scores(rows.toarray().astype(np.float32), tensors.get(f"{name}/corpus"), latents)
        return out
    except Exception as error:
        raise ValueError(f"{path} cannot be read as scores ({error}). Run the audit again.") from error
