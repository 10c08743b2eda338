"""The tables beside a dictionary, checked, and what the index page takes from them."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import UsageError
from pipelines.pages.columns import figures_of, measures_of, status_of
from sae import Dictionary

FEATURES, EXAMPLES, LABELS = "features.parquet", "examples.parquet", "labels.parquet"
_INDEX_TOKENS = 4
_NUMBERS = ("density", "max_activation", "monosemanticity")
_PROVENANCE = ("text", "packing", "context_size", "store_fingerprint", "seed", "versions")
_BLANK: Mapping[str, Any] = {}


def read_features(tables: Path, d_sae: int) -> pa.Table:
    """features.parquet, a row per latent, in order.

    Raises:
        UsageError: there is none, or it is of another dictionary.
    """
    file = tables / FEATURES
    if not file.exists():
        raise UsageError(f"{tables} has no {FEATURES}: run `sae label` and `sae export` first")
    table = pq.read_table(file)
    if "latent" in table.column_names:
        table = table.sort_by("latent")
        latents = table["latent"].to_numpy()
    else:
        latents = np.arange(table.num_rows)
    if not np.array_equal(latents, np.arange(d_sae)):
        raise UsageError(
            f"{file} must have one row for each of the dictionary's {d_sae} latents, but has {table.num_rows}: "
            "label this dictionary again"
        )
    return table


class OtherLabels:
    """Rows of labels.parquet by latent: what others call it. Without the file there are none."""

    def __init__(self, tables: Path) -> None:
        file = tables / LABELS
        # The dictionary's own rules have rows there too; those stand in features.parquet.
        rules = [("source", "!=", "predicate")]
        self._table = pq.read_table(file, filters=rules).sort_by("latent") if file.exists() else None
        self._latents = np.empty(0, np.int64) if self._table is None else self._table["latent"].to_numpy()

    def block(self, start: int, stop: int) -> list[list[dict[str, Any]]]:
        """The labels of latents `start` to `stop`, a list for each."""
        bounds = np.searchsorted(self._latents, np.arange(start, stop + 1))
        if self._table is None:
            return [[] for _ in range(stop - start)]
        rows = self._table.slice(int(bounds[0]), int(bounds[-1] - bounds[0])).to_pylist()
        cuts = (bounds - bounds[0]).tolist()
        return [rows[a:b] for a, b in pairwise(cuts)]


def index_of(features: pa.Table, others: OtherLabels) -> dict[str, Any]:
    """The columns of the index table, a value for each latent.

    `label` is what the latent is called: its own label, else that of somebody else (`by` says whose), else null.
    """
    names = features.column_names
    tests = measures_of(names)
    rows = features.select(
        [name for name in ("label", "labelled", "label_kind", "survives", "density") if name in names]
    )
    facts = rows.to_pylist() if rows.num_columns else [_BLANK] * features.num_rows
    index: dict[str, Any] = {
        "label": [fact.get("label") for fact in facts],
        "candidate": _column(features, "candidate"),
        "kind": [fact.get("label_kind") for fact in facts],
        "status": [status_of(fact) for fact in facts],
        "by": [None] * features.num_rows,
        "test": None,
    }
    for latent, rows_ in enumerate(others.block(0, features.num_rows)):
        named = next((row for row in rows_ if row.get("label")), None)
        if named is not None and index["label"][latent] is None:
            index["label"][latent] = named["label"]
            index["by"][latent] = str(named.get("author") or named.get("source") or "elsewhere")
    if tests:
        index["test"] = {"title": tests[0]["title"], "help": tests[0]["help"]}
        for part in ("value", "low", "high"):
            index[part] = _column(features, str(tests[0][part]))
    for name in _NUMBERS:
        if name in names:
            index[name] = _column(features, name)
    if "top_tokens" in names:
        index["top"] = [None if t is None else t[:_INDEX_TOKENS] for t in features["top_tokens"].to_pylist()]
    return index


def _column(table: pa.Table, name: str) -> Sequence[Any]:
    values: list[Any] = table[name].to_pylist() if name in table.column_names else [None] * table.num_rows
    return values


def meta_of(dictionary: Dictionary, features: pa.Table, title: str, block: int) -> dict[str, Any]:
    """What the pages say about the dictionary as a whole."""
    provenance = dictionary.provenance
    return {
        "title": title,
        "architecture": dictionary.config.architecture,
        "hooks": list(dictionary.hook_names),
        "model": provenance.get("model_name") or dictionary.metadata.get("model_name"),
        "d_in": dictionary.d_in,
        "n": dictionary.d_sae,
        "block": block,
        "figures": figures_of(dictionary.metrics),
        "tests": measures_of(features.column_names),
        "provenance": {name: provenance[name] for name in _PROVENANCE if name in provenance},
    }
