"""Labels run on texts that are in no store: edited contexts, for instance."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.labels.families import TokenTable
from pipelines.labels.rerun import Text
from pipelines.labels.rules import Views

_LEAST = 4
"""Texts of a table, which needs two documents of each split."""


class LabelsOnTexts:
    """Runs accepted labels; see `swaps.Holds`."""

    def __init__(self, rows: Mapping[int, Mapping[str, Any]], strings: Sequence[str]) -> None:
        """Args:
        rows: of features.parquet, by latent.
        strings: readable text of every token id.
        """
        self._rows, self._strings = rows, strings

    def __call__(self, latents: NDArray[np.int64], texts: Sequence[Text]) -> NDArray[np.bool_]:
        result = np.zeros(len(texts), bool)
        if not len(texts):
            return result
        table = _table_of(texts)
        last = np.arange(len(texts)) * table.context_length + np.array([len(text) - 1 for text in texts], np.int64)
        views = Views(table, self._strings)
        for latent in np.unique(latents).tolist():
            row = self._rows[latent]
            if row["labelled"] and row["rule"] is not None:
                mine = np.flatnonzero(latents == latent)
                result[mine] = views.score(views.of_data(json.loads(row["rule"])), last[mine]) > 0
        return result


def _table_of(texts: Sequence[Text]) -> TokenTable:
    """Each text a document and a context of its own, padded at the end."""
    n, length = max(_LEAST, len(texts)), max(2, *(len(text) for text in texts))
    token, usable = np.zeros((n, length), np.int32), np.zeros((n, length), bool)
    for i in range(n):
        text = texts[min(i, len(texts) - 1)]
        token[i, : len(text)] = text
        usable[i, : max(2, len(text))] = True
    return TokenTable(
        token=token.reshape(-1),
        document=np.repeat(np.arange(n, dtype=np.int32), length),
        position=np.tile(np.arange(length, dtype=np.int32), n),
        usable=usable.reshape(-1),
        context_length=length,
        n_train=n // 2 * length,
    )
