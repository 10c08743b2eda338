"""Reads the golden stores and writes a compressed shard with whatever zarr is installed, and holds both against us.

python -W error stock_zarr.py            prints the version of zarr; raises if anything differs
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import zarr

from storage import ActivationStore, verify
from storage.backends import LocalBackend
from storage.layout import GROUP, ArrayLayout, shard_arrays, table_array
from storage.rows import RowReader


def read_golden(path: Path) -> None:
    """Every array of the store, as zarr and as we read it."""
    assert verify(path) == []
    spec = ActivationStore.open(path).spec
    group = zarr.open_group(str(path / GROUP), mode="r")
    arrays = [table_array(spec, name) for name in spec.table_dtypes]
    arrays += [array for hook in spec.hooks for array in shard_arrays(spec, hook)]
    for array in arrays:
        ours = RowReader(LocalBackend(path), array, verify=True).read(0, array.shape[0])
        theirs = group[array.key.removeprefix(f"{GROUP}/")]
        assert theirs.shape == array.shape
        assert theirs.dtype == array.dtype
        assert (theirs[:] == ours).all(), array.key
    assert len(arrays) == len(dict(group.members(max_depth=None))) - 1 - len(spec.hooks)


def read_what_zarr_writes(path: Path, *, compressed: bool) -> None:
    """A sharded array with a last shard that is not whole."""
    array = ArrayLayout("x", (21, 3), np.dtype("uint16"), 12, 4, sharded=True, compressed=compressed)
    rows = np.arange(63, dtype=np.uint16).reshape(21, 3)
    (path / "x").mkdir(parents=True)
    (path / "x" / "zarr.json").write_bytes(array.metadata())
    zarr.open_array(str(path / "x"), config={"write_empty_chunks": True})[:] = rows
    assert (RowReader(LocalBackend(path), array, verify=True).read(0, 21) == rows).all()


if __name__ == "__main__":
    for golden in sorted((Path(__file__).parent / "golden").glob("v*/activations*")):
        read_golden(golden)
    with tempfile.TemporaryDirectory() as directory:
        read_what_zarr_writes(Path(directory) / "plain", compressed=False)
        read_what_zarr_writes(Path(directory) / "compressed", compressed=True)
    print(zarr.__version__)
