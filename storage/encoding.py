"""Bytes of one Zarr v3 chunk or shard, as the codecs in `layout` describe them.

    chunk = data, crc32c(data)                                  codecs: bytes (little endian), crc32c
    shard = chunk_0, chunk_1, …, index, crc32c(index)           codec: sharding_indexed, index at the end
    index = for each chunk slot: offset, length                 uint64 each; both 2^64 - 1 where there is no chunk

Checksums are 4 bytes, little endian. Chunks of one shard are equally long and stand in order, without gaps.
Source: Zarr v3 specification, codecs `bytes`, `crc32c` and `sharding_indexed` version 1.0.
"""

from __future__ import annotations

from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

CHECKSUM_BYTES = 4
MISSING = 2**64 - 1
"""Offset and length of a chunk slot that holds nothing."""
BF16_NAN = 0x7FC0


def crc32c(data: NDArray[Any] | bytes) -> bytes:
    """CRC-32C of the data as its four stored bytes."""
    return int(google_crc32c.value(data)).to_bytes(CHECKSUM_BYTES, "little")


def index_bytes(n_slots: int) -> int:
    """Length of a shard's index with its checksum."""
    return 16 * n_slots + CHECKSUM_BYTES


def encode_index(n_slots: int, n_chunks: int, stored_bytes: int) -> bytes:
    """Index of a shard whose first `n_chunks` slots hold chunks of `stored_bytes` (data and checksum) each."""
    index = np.full((n_slots, 2), MISSING, "<u8")
    index[:n_chunks, 0] = np.arange(n_chunks, dtype=np.uint64) * np.uint64(stored_bytes)
    index[:n_chunks, 1] = stored_bytes
    return index.tobytes() + crc32c(index)


def decode_index(data: NDArray[np.uint8], n_slots: int) -> NDArray[np.uint64]:
    """Offsets and lengths, [n_slots, 2], from the bytes of a whole shard.

    Raises: ValueError if the index does not match its checksum.
    """
    tail = data[data.size - index_bytes(n_slots) :]
    if crc32c(tail[:-CHECKSUM_BYTES]) != tail[-CHECKSUM_BYTES:].tobytes():
        raise ValueError("the shard index does not match its checksum")
    return np.frombuffer(tail[:-CHECKSUM_BYTES], "<u8").reshape(n_slots, 2)


def fill_value(dtype: np.dtype[Any]) -> int | float:
    """What an element that was never written reads as.

    NaN, whose bfloat16 pattern is 0x7FC0; for integers -1, or the greatest value if there is no negative one.
    """
    if dtype == np.uint16:
        return BF16_NAN
    if dtype.kind == "u":
        return int(np.iinfo(dtype).max)
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
