import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st
from zarr.codecs import Crc32cCodec

from storage.backends import LocalBackend
from storage.encoding import (
    MISSING,
    compress,
    crc32c,
    decode_index,
    decompress,
    encode_index,
    to_bfloat16_bits,
    to_float32,
)
from storage.layout import ArrayLayout, contexts_per_chunk
from storage.rows import RowReader
from storage.spec import HookSpec, StoreSpec
from storage.writer import file_buffers


def test_crc32c_gives_the_published_check_value() -> None:
    assert crc32c(b"123456789") == (0xE3069283).to_bytes(4, "little")  # RFC 3720, appendix B.4


def example_array(n_rows: int, compressed: bool, dtype: str) -> ArrayLayout:
    shape = (n_rows, 3)
    return ArrayLayout(
        "x", shape, np.dtype(dtype), rows_per_file=12, rows_per_chunk=4, sharded=True, compressed=compressed
    )


@given(st.integers(1, 20), st.data())
def test_index_round_trip(n_slots: int, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 1000), max_size=n_slots))
    encoded = np.frombuffer(encode_index(n_slots, lengths), np.uint8)
    index = decode_index(encoded, n_slots)
    assert index[: len(lengths)].tolist() == [[sum(lengths[:i]), length] for i, length in enumerate(lengths)]
    assert (index[len(lengths) :] == MISSING).all()


def test_index_with_a_flipped_bit_is_refused() -> None:
    encoded = np.frombuffer(encode_index(3, [100, 100]), np.uint8).copy()
    encoded[5] ^= 1
    with pytest.raises(ValueError, match="index does not match its checksum"):
        decode_index(encoded, 3)


@pytest.mark.parametrize("dtype", ["uint16", "float32", "int8"])
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("n_rows", [24, 20, 12, 9, 1])
def test_encoder_gives_files_that_zarr_reads_back(tmp_path: Path, n_rows: int, compressed: bool, dtype: str) -> None:
    array = example_array(n_rows, compressed, dtype)
    rows = np.arange(n_rows * 3).reshape(n_rows, 3).astype(dtype)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "zarr.json").write_bytes(array.metadata())
    for file in range(array.n_files):
        path = tmp_path / array.file_key(file)
        path.parent.mkdir(parents=True)
        buffers = file_buffers(array, file, rows[file * 12 : file * 12 + 12])
        path.write_bytes(b"".join(bytes(buffer) for buffer in buffers))
        assert compressed or path.stat().st_size == array.file_bytes(file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = zarr.open_array(str(tmp_path / "x"), mode="r")
    assert (read[:] == rows).all()


@pytest.mark.parametrize("dtype", ["uint16", "float32", "int8"])
@pytest.mark.parametrize("n_rows", [24, 20, 5])
def test_reader_reads_what_zarr_compresses(tmp_path: Path, n_rows: int, dtype: str) -> None:
    array = example_array(n_rows, True, dtype)
    rows = np.random.default_rng(0).integers(0, 9, (n_rows, 3)).astype(dtype)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "zarr.json").write_bytes(array.metadata())
    zarr.open_array(str(tmp_path / "x"), config={"write_empty_chunks": True})[:] = rows
    reader = RowReader(LocalBackend(tmp_path), array, verify=True)
    for start, stop in [(0, n_rows), (1, 3), (3, 5), (n_rows - 1, n_rows), (2, 2)]:
        assert (reader.read(start, stop) == rows[start:stop]).all()


def test_compression_gives_the_same_bytes_in_any_thread() -> None:
    chunk = np.random.default_rng(0).normal(size=(4096, 512)).astype(np.float16)
    with ThreadPoolExecutor(4) as pool:
        assert {*pool.map(compress, [chunk] * 4), compress(chunk)} == {compress(chunk)}


def test_decompression_refuses_what_is_not_the_chunk() -> None:
    chunk = np.arange(100, dtype=np.uint16)
    data = np.frombuffer(compress(chunk), np.uint8)
    out = np.empty_like(chunk)
    decompress(data, out)
    assert (out == chunk).all()
    for bad in (data[:-1], data[:8], np.concatenate([data, data[:1]])):
        with pytest.raises(ValueError, match="it must be 200 bytes in blosc, but"):
            decompress(bad, out)
    with pytest.raises(ValueError, match="it must be 198 bytes in blosc, but its header says 200"):
        decompress(data, out[:-1])
    broken = data.copy()
    broken[16:] = 255
    with pytest.raises(ValueError, match="does not decompress"):
        decompress(broken, out)


def test_encoder_gives_the_bytes_that_zarr_writes(tmp_path: Path) -> None:
    rows = np.arange(24 * 3, dtype=np.uint16).reshape(24, 3) + 1
    theirs = zarr.create_array(
        str(tmp_path / "x"), shape=(24, 3), chunks=(4, 3), shards=(12, 3), dtype="uint16", compressors=[Crc32cCodec()]
    )
    theirs[:] = rows
    array = ArrayLayout("x", (24, 3), np.dtype(np.uint16), rows_per_file=12, rows_per_chunk=4, sharded=True)
    for file in range(2):
        ours = b"".join(bytes(buffer) for buffer in file_buffers(array, file, rows[file * 12 : file * 12 + 12]))
        assert ours == (tmp_path / array.file_key(file)).read_bytes()


@pytest.mark.parametrize(
    ("context_length", "d_in", "contexts_per_shard", "expected"),
    [
        (256, 576, 256, 8),  # 288 KiB per context: eight make 2.25 MiB
        (1024, 2304, 64, 1),  # 4.5 MiB per context
        (4096, 8192, 4, 1),  # 64 MiB per context: one, though it exceeds 8 MiB
        (256, 576, 31, 1),  # 31 is prime and 31 contexts exceed 8 MiB
        (8, 4, 16, 16),  # a tiny shard is one chunk
    ],
)
def test_chunks_are_whole_contexts_of_two_to_eight_mebibytes_where_possible(
    context_length: int, d_in: int, contexts_per_shard: int, expected: int
) -> None:
    hook = HookSpec("h", d_in)
    spec = StoreSpec(
        n_contexts=100,
        context_length=context_length,
        contexts_per_shard=contexts_per_shard,
        n_train_contexts=0,
        hooks=(hook,),
    )
    assert contexts_per_chunk(spec, hook) == expected


@given(st.lists(st.floats(width=32), min_size=1))
def test_bfloat16_rounding_equals_torch(values: list[float]) -> None:
    array = np.array(values, np.float32)
    ours = to_float32(to_bfloat16_bits(array))
    theirs = torch.from_numpy(array).bfloat16().float().numpy()
    np.testing.assert_array_equal(ours, theirs)
