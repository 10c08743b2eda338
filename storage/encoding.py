"""Bytes of one Zarr v3 chunk or shard, as the codecs in `layout` describe them.

    chunk = data, crc32c(data)                                  codecs: bytes (little endian), crc32c
    chunk = blosc(data), crc32c(blosc(data))                    codecs: bytes (little endian), blosc, crc32c
    shard = chunk_0, chunk_1, …, index, crc32c(index)           codec: sharding_indexed, index at the end
    index = for each chunk slot: offset, length                 uint64 each; both 2^64 - 1 where there is no chunk

Checksums are 4 bytes, little endian. Chunks of one shard stand in order, without gaps, and are equally long unless they
are compressed.
Source: Zarr v3 specification, codecs `bytes`, `blosc`, `crc32c` and `sharding_indexed` version 1.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import crc32c as crc32c_library
import numcodecs.blosc
import numpy as np
from numpy.typing import NDArray

from storage.spec import STORED_DTYPE

numcodecs.blosc.use_threads = False  # blosc's own threads order blocks by chance; as zarr-python sets it too

CHECKSUM_BYTES = 4
MISSING = 2**64 - 1
"""Offset and length of a chunk slot that holds nothing."""
BF16_NAN = 0x7FC0
BLOSC: dict[str, Any] = {"cname": "zstd", "clevel": 1, "shuffle": "bitshuffle", "blocksize": 2**20}
"""Settings of the codec `blosc`, but for `typesize`.

Residual streams in bfloat16 shrink to 1 / 1.24 so; to 1 / 1.02 in the blocks that blosc would choose at this level, and
to 1 / 1.26 at level 7, which takes ten times as long.
"""


def crc32c(data: NDArray[Any] | bytes) -> bytes:
    """CRC-32C of the data as its four stored bytes. Releases the interpreter's lock for all but short data."""
    return int(crc32c_library.crc32c(data)).to_bytes(CHECKSUM_BYTES, "little")


def index_bytes(n_slots: int) -> int:
    """Length of a shard's index with its checksum."""
    return 16 * n_slots + CHECKSUM_BYTES


def encode_index(n_slots: int, lengths: Sequence[int]) -> bytes:
    """Index of a shard whose first slots hold chunks of these lengths in bytes (data and checksum)."""
    index = np.full((n_slots, 2), MISSING, "<u8")
    index[: len(lengths), 1] = lengths
    index[: len(lengths), 0] = np.cumsum([0, *lengths[:-1]]) if lengths else []
    return index.tobytes() + crc32c(index)


def decode_index(data: NDArray[np.uint8], n_slots: int) -> NDArray[np.uint64]:
    """Offsets and lengths, [n_slots, 2], from the bytes of a whole shard.

    Raises: ValueError if the index does not match its checksum, or the file is too short to hold one.
    """
    if data.size < index_bytes(n_slots):
        raise ValueError(f"the file must end with a shard index of {index_bytes(n_slots)} bytes, but has {data.size}")
    tail = data[data.size - index_bytes(n_slots) :]
    if crc32c(tail[:-CHECKSUM_BYTES]) != tail[-CHECKSUM_BYTES:].tobytes():
        raise ValueError("the shard index does not match its checksum")
    return np.frombuffer(tail[:-CHECKSUM_BYTES], "<u8").reshape(n_slots, 2)


def compress(chunk: NDArray[Any]) -> bytes:
    """The chunk by blosc; equal chunks give equal bytes. Releases the interpreter's lock."""
    data: bytes = numcodecs.blosc.compress(
        np.ascontiguousarray(chunk),
        BLOSC["cname"].encode(),
        BLOSC["clevel"],
        numcodecs.blosc.BITSHUFFLE,
        BLOSC["blocksize"],
    )
    return data


def decompress(data: NDArray[np.uint8], out: NDArray[Any]) -> None:
    """Fills `out` (contiguous) with what `compress` was given.

    Raises: ValueError if the data does not hold exactly that many bytes, or is damaged.
    """
    n_bytes, _, n_stored = np.frombuffer(data[4:16], "<u4") if data.size >= 16 else (0, 0, 0)
    if n_bytes != out.nbytes or n_stored != data.size:  # a blosc header: these three after four single bytes
        raise ValueError(f"it must be {out.nbytes:,} bytes in blosc, but its header says {n_bytes:,}")
    try:
        numcodecs.blosc.decompress(data, out.reshape(-1).view(np.uint8))
    except RuntimeError as error:
        raise ValueError(f"it does not decompress: {error}") from error


def fill_value(dtype: np.dtype[Any]) -> int | float:
    """What an element that was never written reads as.

    NaN, whose bfloat16 pattern is 0x7FC0; for integers -128 (int8), -1 (wider) or the greatest value (unsigned).
    """
    if dtype == np.uint16:
        return BF16_NAN
    if dtype.kind == "u":
        return int(np.iinfo(dtype).max)
    if dtype == np.int8:
        return -128
    return float("nan") if dtype.kind == "f" else -1


def to_float32(stored: NDArray[Any]) -> NDArray[np.float32]:
    """Stored activations (uint16 means the bits of bfloat16) as a new float32 array."""
    if stored.dtype == np.uint16:
        bits: NDArray[np.uint32] = np.left_shift(stored, 16, dtype=np.uint32)
        return bits.view(np.float32)
    return stored.astype(np.float32)


def to_bfloat16_bits(values: NDArray[Any]) -> NDArray[np.uint16]:
    """Bits of the bfloat16 nearest to each value, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype(np.uint16)
    rounded[np.isnan(values)] = BF16_NAN
    return rounded


def stored_as(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Floats (uint16 means the bits of bfloat16) in the stored form of a hook's type, rounded to nearest even.

    What exceeds float16 becomes infinite. Not copied if it is in that form already.
    """
    if values.dtype == STORED_DTYPE[dtype]:
        return values
    if dtype == "bfloat16":
        return to_bfloat16_bits(values)
    with np.errstate(over="ignore"):
        return (to_float32(values) if values.dtype == np.uint16 else values).astype(STORED_DTYPE[dtype])
