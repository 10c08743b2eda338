"""scores.safetensors: the pooled activation of every latent on every example, sparse, for whoever computes again.

For each dictionary NAME, in the rows' order of audit.json's `examples` (compressed sparse rows):

    NAME/indptr [n_examples + 1], NAME/indices [n_active], NAME/values [n_active], NAME/shape [2]
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from safetensors.numpy import load, save

from pipelines.audit.views import View
from pipelines.rundir import write_bytes


def write_scores(path: Path, views: Sequence[View]) -> None:
    """Write the scores of all views."""
    from scipy.sparse import csr_array

    tensors: dict[str, np.ndarray] = {}
    for view in views:
        rows = csr_array(view.scores.astype(np.float32))
        tensors |= {
            f"{view.name}/indptr": rows.indptr.astype(np.int64),
            f"{view.name}/indices": rows.indices.astype(np.int32),
            f"{view.name}/values": rows.data,
            f"{view.name}/shape": np.array(rows.shape, dtype=np.int64),
        }
    write_bytes(path, save(tensors))


def read_scores(path: Path) -> dict[str, Float[np.ndarray, "n_examples d_sae"]]:
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
            out[name] = rows.toarray().astype(np.float32)
        return out
    except Exception as error:
        raise ValueError(f"{path} cannot be read as scores ({error}). Run the audit again.") from error
