from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from storage import (
    AlreadyExistsError,
    CorruptionError,
    FormatError,
    IncompleteError,
    LatentStore,
    LatentWriter,
    NotFoundError,
    SpecMismatchError,
    verify,
)

N_ROWS, D_SAE, N_SHARDS = 60, 7, 4
META = {"d_sae": D_SAE, "n_shards": N_SHARDS, "n_rows": N_ROWS, "fingerprint": "store+dictionary"}


def dense(seed: int = 0) -> NDArray[np.float32]:
    """Latent activations [N_ROWS, D_SAE]; latent 3 never fires, shard 2 (rows 30 to 44) is silent."""
    rng = np.random.default_rng(seed)
    values = rng.random((N_ROWS, D_SAE), np.float32) * (rng.random((N_ROWS, D_SAE)) < 0.3)
    values[:, 3] = 0
    values[30:45] = 0
    return values.astype(np.float32)


def write(writer: LatentWriter, shard: int, seed: int = 0) -> None:
    start, stop = 15 * shard, 15 * shard + 15
    row, latent = np.nonzero(dense(seed)[start:stop])
    shuffled = np.random.default_rng(1).permutation(len(row))
    row, latent = row[shuffled] + start, latent[shuffled]
    writer.write_shard(shard, row, latent, dense(seed)[row, latent])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    writer = LatentWriter.create(tmp_path / "latents", META)
    for shard in writer.missing():
        write(writer, shard)
    writer.seal()
    return tmp_path / "latents"


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, D_SAE), st.integers(0, D_SAE))
def test_block_holds_the_nonzeros_of_its_latents_by_ascending_row(path: Path, a: int, b: int) -> None:
    lo, hi = sorted((a, b))
    block = LatentStore.open(path).block(lo, hi)
    assert len(block.indptr) == hi - lo + 1
    for j, latent in enumerate(range(lo, hi)):
        rows = np.flatnonzero(dense()[:, latent])
        part = slice(block.indptr[j], block.indptr[j + 1])
        assert (block.row[part] == rows).all()
        assert (block.value[part] == dense()[rows, latent]).all()


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, N_ROWS), st.integers(0, N_ROWS))
def test_counts_of_a_row_range_are_those_of_the_dense_matrix(path: Path, a: int, b: int) -> None:
    start, stop = sorted((a, b))
    store = LatentStore.open(path)
    assert (store.counts(start, stop) == (dense()[start:stop] > 0).sum(axis=0)).all()
    assert (store.counts() == (dense() > 0).sum(axis=0)).all()
    assert store.n_entries == (dense() > 0).sum()


def test_store_knows_its_shape_and_meta(path: Path) -> None:
    store = LatentStore.open(path)
    assert (store.n_rows, store.d_sae) == (N_ROWS, D_SAE)
    assert store.meta["fingerprint"] == "store+dictionary"
    assert verify(path) == []


def test_pieces_are_npy_files(path: Path) -> None:
    indptr, row, value = (
        np.load(path / f"pieces/000001/{name}.npy", allow_pickle=False) for name in ("indptr", "row", "value")
    )
    assert (indptr.dtype, row.dtype, value.dtype) == (np.int64, np.uint32, np.float32)
    assert len(row) == len(value) == indptr[-1] == (dense()[15:30] > 0).sum()


def test_store_without_any_activation_is_valid(tmp_path: Path) -> None:
    writer = LatentWriter.create(tmp_path / "l", {**META, "n_shards": 1})
    writer.write_shard(0, np.empty(0, np.int64), np.empty(0, np.int32), np.empty(0, np.float32))
    writer.seal()
    store = LatentStore.open(tmp_path / "l")
    assert store.counts().sum() == 0
    assert len(store.block(0, D_SAE).row) == 0


def test_resumed_writer_writes_only_what_is_missing(tmp_path: Path) -> None:
    write(LatentWriter.create(tmp_path / "l", META), 2)
    writer = LatentWriter.create(tmp_path / "l", META)
    assert writer.missing() == [0, 1, 3]
    with pytest.raises(IncompleteError, match=r"3 are missing \(0, 1, 3\)"):
        writer.seal()
    with pytest.raises(IncompleteError, match="3 are missing"):
        LatentStore.open(tmp_path / "l")


def test_shard_written_twice_is_kept_as_it_was(path: Path) -> None:
    before = (path / "pieces/000000/value.npy").read_bytes()
    write(LatentWriter.open(path), 0, seed=9)
    assert (path / "pieces/000000/value.npy").read_bytes() == before


def test_meta_must_be_complete_and_equal(path: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"must have d_sae, n_shards, n_rows, fingerprint; n_rows, fingerprint is absent"
    ):
        LatentWriter.create(tmp_path / "x", {"d_sae": 1, "n_shards": 1})
    with pytest.raises(SpecMismatchError, match="fingerprint: store 'store\\+dictionary', asked for 'other'"):
        LatentWriter.create(path, {**META, "fingerprint": "other"})


def test_create_refuses_what_is_not_a_latent_store(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(AlreadyExistsError, match="something else stands there"):
        LatentWriter.create(tmp_path, META)


def test_missing_and_newer_stores_are_named(path: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"must be a latent store at .*nothing, but it has no meta.json"):
        LatentStore.open(tmp_path / "nothing")
    meta = (path / "meta.json").read_text()
    (path / "meta.json").write_text(meta.replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(FormatError, match="says 2: upgrade"):
        LatentStore.open(path)


@pytest.mark.parametrize(
    ("row", "latent", "value", "message"),
    [
        ([60], [0], [1.0], r"rows must lie in \[0, 60\), got \[60, 60\]"),
        ([0], [7], [1.0], r"latents must lie in \[0, 7\), got \[7, 7\]"),
        ([0], [0], [float("nan")], "values must be finite"),
        ([0, 0], [1, 1], [1.0, 2.0], r"a \(row, latent\) pair comes twice"),
        ([0, 1], [1], [1.0], r"must be 1-D of equal length, got shapes \(2,\), \(1,\), \(1,\)"),
    ],
)
def test_impossible_entries_are_refused(
    tmp_path: Path, row: list[int], latent: list[int], value: list[float], message: str
) -> None:
    writer = LatentWriter.create(tmp_path / "l", META)
    with pytest.raises(ValueError, match=message):
        writer.write_shard(0, np.array(row), np.array(latent), np.array(value))
    with pytest.raises(ValueError, match=r"shard number must lie in \[0, 4\), got 4"):
        writer.write_shard(4, np.array([0]), np.array([0]), np.array([1.0]))


def test_shards_whose_rows_overlap_are_not_sealed(tmp_path: Path) -> None:
    writer = LatentWriter.create(tmp_path / "l", {**META, "n_shards": 2})
    for shard in range(2):
        writer.write_shard(shard, np.array([5, 9]), np.array([0, 1]), np.array([1.0, 1.0]))
    with pytest.raises(CorruptionError, match="must ascend, but shard 1 starts at row 5, before the end"):
        writer.seal()


def test_ranges_outside_of_the_store_are_refused(path: Path) -> None:
    with pytest.raises(ValueError, match=r"Latents must lie in \[0, 7\], got \[0, 8\)"):
        LatentStore.open(path).block(0, 8)
    with pytest.raises(ValueError, match=r"Rows must lie in \[0, 60\], got \[0, 61\)"):
        LatentStore.open(path).counts(0, 61)


@pytest.mark.parametrize(
    ("damage", "message"), [("flip", "match its SHA-256"), ("cut", "bytes, but it has"), ("unlink", "it is missing")]
)
@pytest.mark.parametrize("name", ["indptr", "row", "value"])
def test_damaged_piece_is_named(path: Path, damage: str, message: str, name: str) -> None:
    file = path / f"pieces/000001/{name}.npy"
    data = file.read_bytes()
    file.unlink()
    if damage != "unlink":
        file.write_bytes(data[:-1] + (bytes([data[-1] ^ 1]) if damage == "flip" else b""))
    with pytest.raises(CorruptionError, match=rf"{name}.npy \(shard 1\).*{message}.*sae verify .* --repair"):
        LatentStore.open(path).block(0, D_SAE)
    assert [problem.file for problem in verify(path)] == [f"pieces/000001/{name}.npy"]
    writer = LatentWriter.open(path)
    writer.discard(1)
    write(writer, 1)
    writer.seal()
    assert verify(path) == []
