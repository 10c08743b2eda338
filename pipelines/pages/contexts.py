"""examples.parquet as JSON, a block of latents at a time, with at most a few row groups of it in memory."""

from collections import OrderedDict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.pages.script import exact_json, json_text, short
from sae.spelling import REPLACEMENT, Speller

_TEXT = ("token_ids", "values", "text")
_KEPT_GROUPS = 8


class Contexts:
    """The contexts of a dictionary, by latent.

    Rows may stand in any order; where those of a latent are close together, each row group is read once.

    Args:
        speller: None leaves each context one piece of text, without the tokens that fire.
    """

    def __init__(self, file: Path, speller: Speller | None) -> None:
        self._file = pq.ParquetFile(file)
        self._speller = speller
        names = self._file.schema_arrow.names
        self.fields = [name for name in names if name not in _TEXT and name != "latent"]
        """What is known of a context beside its text, in the order of the file."""
        self._latent_column = names.index("latent")
        self._ranges = [self._range(group) for group in range(self._file.num_row_groups)]
        self._groups: OrderedDict[int, pa.Table] = OrderedDict()

    def _range(self, group: int) -> tuple[int, int]:
        statistics = self._file.metadata.row_group(group).column(self._latent_column).statistics
        if statistics is None or not statistics.has_min_max:
            return 0, 2**31
        return int(statistics.min), int(statistics.max)

    def block(self, start: int, stop: int) -> list[list[str]]:
        """JSON of the contexts of latents `start` to `stop`, in the order of the file: a list for each latent."""
        found: list[list[str]] = [[] for _ in range(stop - start)]
        for group, (low, high) in enumerate(self._ranges):
            if low >= stop or high < start:
                continue
            table = self._group(group)
            owner = table["latent"].to_numpy()
            rows = np.flatnonzero((owner >= start) & (owner < stop))
            # Consecutive rows are a view.
            consecutive = len(rows) and int(rows[-1]) - int(rows[0]) + 1 == len(rows)
            part = table.slice(int(rows[0]), len(rows)) if consecutive else table.take(rows)
            for latent, context in zip(owner[rows].tolist(), self._encoded(part), strict=True):
                found[latent - start].append(context)
        return found

    def _group(self, group: int) -> pa.Table:
        if group not in self._groups:
            if len(self._groups) == _KEPT_GROUPS:
                self._groups.popitem(last=False)
            self._groups[group] = self._file.read_row_group(group)
        self._groups.move_to_end(group)
        return self._groups[group]

    def _encoded(self, table: pa.Table) -> list[str]:
        """One JSON array for each row: the values of `fields`, the pieces, where it fires, and how strongly."""
        columns = [short(table[name].to_pylist()) for name in self.fields]
        bodies = self._bodies(table)
        facts = zip(*columns, strict=True) if columns else [()] * len(bodies)
        return [
            f"{exact_json(fact)[:-1]}{',' if fact else ''}{body}]" for fact, body in zip(facts, bodies, strict=True)
        ]

    def _bodies(self, table: pa.Table) -> list[str]:
        if self._speller is None or not {"token_ids", "values"} <= set(table.column_names):
            texts = table["text"].to_pylist() if "text" in table.column_names else [None] * table.num_rows
            return [f"{json_text([] if text is None else [text])},[],[]" for text in texts]
        tokens, bounds = _flat(table["token_ids"])
        values, _ = _flat(table["values"])
        # Few tokens occur often: each is spelled and encoded once, and only cut characters are looked at in place.
        distinct, which = np.unique(tokens, return_inverse=True)
        alone = [self._speller.piece(token) for token in distinct.tolist()]
        pieces = np.array([exact_json(piece) for piece in alone], object)[which]
        cut = np.array([REPLACEMENT in piece for piece in alone], bool)[which]
        bodies = []
        for a, b in pairwise(bounds.tolist()):
            at = np.flatnonzero(values[a:b])
            mended = cut[a:b].any()
            spelled = exact_json(self._speller.spell(tokens[a:b].tolist())) if mended else f"[{','.join(pieces[a:b])}]"
            bodies.append(f"{spelled},{exact_json(at.tolist())},{json_text(values[a:b][at].tolist())}")
        return bodies


def _flat(column: pa.ChunkedArray) -> tuple[Any, Any]:
    """Elements of a list column, and where each row begins and the last ends."""
    array = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], column.type)
    lengths = array.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    return array.flatten().to_numpy(zero_copy_only=False), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
