"""Work that is done block by block and survives an interruption: one small Parquet file per finished block.

A folder of parts belongs to a key, the digest of all that decides the results; parts of another key are removed. When
everything is there, `join_columns` adds the results to features.parquet, one row per latent.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.labels.tables import ParquetFile
from pipelines.rundir import read_json, write_json

_KEY_FILE = "key.json"


class Parts:
    """The finished blocks of one piece of work."""

    def __init__(self, folder: Path, key: str, schema: pa.Schema) -> None:
        self._folder, self._schema = folder, schema
        recorded = folder / _KEY_FILE
        if folder.exists() and (not recorded.exists() or read_json(recorded).get("key") != key):
            shutil.rmtree(folder)
        write_json(recorded, {"key": key})

    def __contains__(self, block: int) -> bool:
        return self._path(block).exists()

    def write(self, block: int, columns: Mapping[str, Any]) -> None:
        """Keep the results of a block; the file appears whole or not at all."""
        with ParquetFile(self._path(block), self._schema) as file:
            file.write(columns)

    def read(self, n_blocks: int) -> pa.Table:
        """All blocks, in order."""
        return pa.concat_tables([pq.read_table(self._path(block)) for block in range(n_blocks)])

    def _path(self, block: int) -> Path:
        return self._folder / f"{block:05d}.parquet"


def join_columns(features: Path, latents: NDArray[np.int64], columns: pa.Table) -> None:
    """Set columns of features.parquet: the rows of `columns` are about `latents`, all other latents get null.

    Columns of the same names are replaced; the file changes whole or not at all.
    """
    table = pq.read_table(features)
    place = np.full(table.num_rows, -1, np.int64)
    place[latents] = np.arange(len(latents))
    index = pa.array(place, mask=place < 0)
    for field in columns.schema:
        column = columns[field.name].combine_chunks().take(index)
        held = table.schema.get_field_index(field.name)
        table = table.append_column(field, column) if held < 0 else table.set_column(held, field, column)
    with ParquetFile(features, table.schema) as file:
        file.write({name: table[name] for name in table.column_names})
