import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st
from zarr.codecs import Crc32cCodec

from storage.encoding import MISSING, crc32c, decode_index, encode_index, to_bfloat16_bits, to_float32
from storage.layout import ArrayLayout, contexts_per_chunk
from storage.spec import HookSpec, StoreSpec
from storage.writer import file_buffers


def test_crc32c_gives_the_published_check_value() -> None:
    assert crc32c(b"123456789") == (0xE3069283).to_bytes(4, "little")  # RFC 3720, appendix B.4


@given(st.integers(1, 20), st.data())
def test_index_round_trip(n_slots: int, data: st.DataObject) -> None:
    n_chunks = data.draw(st.integers(0, n_slots))
    encoded = np.frombuffer(encode_index(n_slots, n_chunks, 100), np.uint8)
    index = decode_index(encoded, n_slots)
    assert index[:n_chunks].tolist() == [[100 * i, 100] for i in range(n_chunks)]
    assert (index[n_chunks:] == MISSING).all()


def test_index_with_a_flipped_bit_is_refused() -> None:
    encoded = np.frombuffer(encode_index(3, 2, 100), np.uint8).copy()
    encoded[5] ^= 1
    with pytest.raises(ValueError, match="index does not match its checksum"):
        decode_index(encoded, 3)


@pytest.mark.parametrize("n_rows", [24, 20, 12, 9, 1])
def test_encoder_gives_files_that_zarr_reads_back(tmp_path: Path, n_rows: int) -> None:
    array = ArrayLayout("x", (n_rows, 3), np.dtype(np.uint16), rows_per_file=12, rows_per_chunk=4, sharded=True)
    rows = np.arange(n_rows * 3, dtype=np.uint16).reshape(n_rows, 3)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "zarr.json").write_bytes(array.metadata())
    for file in range(array.n_files):
        path = tmp_path / array.file_key(file)
        path.parent.mkdir(parents=True)
        buffers = file_buffers(array, file, rows[file * 12 : file * 12 + 12])
        path.write_bytes(b"".join(bytes(buffer) for buffer in buffers))
        assert path.stat().st_size == array.file_bytes(file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = zarr.open_array(str(tmp_path / "x"), mode="r")
    assert (read[:] == rows).all()


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
