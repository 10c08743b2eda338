"""The files that labelling leaves: features.parquet (a row per latent), examples.parquet (a row per context) and
counter_examples.parquet (the same, contexts in which a label is wrong).

Each appears whole or not at all, examples first, so that a folder with features.parquet is finished. Their schema
carries `schema_version`; a change of meaning is a new version.
"""

import os
import uuid
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.labels.contexts import KINDS, Examples, Windows
from pipelines.labels.families import TokenTable
from pipelines.rundir import fsync_directory

SCHEMA_VERSION = "2"
_METADATA = {"schema_version": SCHEMA_VERSION}

_STRINGS = pa.list_(pa.field("element", pa.string()))  # the name that Parquet gives it

_LATENTS = pa.list_(pa.field("element", pa.int32()))
_TESTS = [
    (f"{name}{end}", pa.float32())
    for name in ("detection_random", "detection_same_token", "detection_same_document", "detection_neighbour", "fuzz")
    for end in ("", "_low", "_high")
]  # balanced accuracy on held-out questions, 95 % interval, documents as clusters; 0.5 is chance

FEATURES = pa.schema(
    [
        ("latent", pa.int32()),
        ("label", pa.string()),  # null unless `labelled`
        ("label_source", pa.string()),  # whose label that is: predicate, or as in labels.parquet
        ("label_kind", pa.string()),  # view that its first condition is about; "unlabelled"; "silent" = never fires
        ("labelled", pa.bool_()),
        ("candidate", pa.string()),  # the fitted rule in English, whether or not it passed
        ("survives", pa.bool_()),  # the fitted rule passes every test (`verdicts.surviving`)
        ("monosemanticity", pa.float32()),  # see `features.monosemanticity`
        ("rule", pa.string()),  # the fitted rule as data: JSON, see `rules.Views.data`
        ("rule_family", pa.string()),  # view that its first condition is about
        ("rule_bits", pa.float32()),  # description length saved on questions about train documents
        ("rule_explained", pa.float32()),  # the same as a share of the description length without a rule
        ("promotes", _STRINGS),
        ("suppresses", _STRINGS),
        ("detection_balanced_accuracy", pa.float32()),  # held-out documents, every firing
        ("detection_low", pa.float32()),  # 95 % interval, documents as clusters
        ("detection_high", pa.float32()),
        ("detection_tpr", pa.float32()),
        ("detection_tpr_strong", pa.float32()),  # firings in the range that carries half of the train activation
        ("detection_fpr", pa.float32()),
        ("detection_precision", pa.float32()),  # at the natural rate
        ("detection_auroc", pa.float32()),
        ("detection_null", pa.float32()),  # mean balanced accuracy of this label on other random latents
        ("detection_mismatch_p", pa.float32()),  # share of those that it fits at least as well, itself counted
        *_TESTS,
        ("tpr_by_decile", pa.list_(pa.field("element", pa.float32()))),  # weakest tenth of the firings first
        ("p_value", pa.float64()),  # the larger of those against same_token and same_document negatives
        ("mismatch_rank", pa.int32()),  # of the latent among random others under its label; 1 is best
        ("n_mismatch", pa.int32()),
        ("neighbour_rank", pa.int32()),  # the same among nearest decoder neighbours
        ("n_neighbour", pa.int32()),
        ("near_duplicates", _LATENTS),  # see `relations`
        ("splits_into", _LATENTS),
        ("split_from", _LATENTS),
        ("absorbed_by", _LATENTS),
        ("n_train_active", pa.int64()),
        ("n_heldout_active", pa.int64()),
        ("density", pa.float64()),  # share of usable tokens, both splits
        ("max_activation", pa.float32()),
        ("top_tokens", _STRINGS),  # by activation mass on train documents
    ],
    metadata=_METADATA,
)

EXAMPLES = pa.schema(
    [
        ("latent", pa.int32()),
        ("kind", pa.string()),  # "top" or "quantile"; "miss" or "false alarm" in counter_examples.parquet
        ("rank", pa.int16()),  # top: 0 is strongest; quantile: 0 is the weakest rank bin
        ("context", pa.int32()),
        ("offset", pa.int32()),  # of the firing within the context
        ("document", pa.int32()),  # row of the document table
        ("peak", pa.int16()),  # of the firing within token_ids
        ("token_ids", pa.list_(pa.field("element", pa.int32()))),
        ("values", pa.list_(pa.field("element", pa.float32()))),
        ("max_value", pa.float32()),  # the activation at the firing
        ("text", pa.string()),
    ],
    metadata=_METADATA,
)


class ParquetFile:
    """A Parquet file that is written in pieces beside its place and appears there on a clean exit.

    Context manager; on an exception nothing is left behind.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._path = path
        self._partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
        self._schema = schema

    def __enter__(self) -> "ParquetFile":
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._writer = pq.ParquetWriter(self._partial, self._schema, compression="zstd")
        return self

    def write(self, columns: Mapping[str, Any]) -> None:
        """Append rows; `columns` has one array or list per field of the schema."""
        self._writer.write_table(pa.table(dict(columns), schema=self._schema))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()
        try:
            if error is None:
                with self._partial.open("rb") as written:
                    os.fsync(written.fileno())
                os.replace(self._partial, self._path)
                fsync_directory(self._path.parent)
        finally:
            self._partial.unlink(missing_ok=True)


def example_columns(
    examples: Examples, windows: Windows, first_latent: int, table: TokenTable, token_strings: Sequence[str]
) -> dict[str, Any]:
    """Rows of `EXAMPLES` for the examples of one block whose first latent is `first_latent`."""
    token_ids = table.token[windows.row][windows.inside]
    ends = np.cumsum(windows.inside.sum(1))
    offsets = np.concatenate([np.zeros(1, np.int64), ends]).astype(np.int32)
    middle = windows.row.shape[1] // 2
    pieces = [token_strings[token] for token in token_ids.tolist()]
    bounds = offsets.tolist()
    return {
        "latent": (examples.latent + first_latent).astype(np.int32),
        "kind": [KINDS[kind] for kind in examples.kind.tolist()],
        "rank": examples.rank,
        "context": (examples.row // table.context_length).astype(np.int32),
        "offset": (examples.row % table.context_length).astype(np.int32),
        "document": table.document[examples.row],
        "peak": windows.inside[:, :middle].sum(1).astype(np.int16),
        "token_ids": pa.ListArray.from_arrays(offsets, token_ids),
        "values": pa.ListArray.from_arrays(offsets, windows.value[windows.inside]),
        "max_value": examples.value,
        "text": ["".join(pieces[a:b]) for a, b in pairwise(bounds)],
    }


def nullable(x: NDArray[np.floating[Any]]) -> Any:
    """A float column in which NaN (undefined) is null."""
    return pa.array(x.astype(np.float32), mask=np.isnan(x))
