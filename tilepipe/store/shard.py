"""``ShardPacker``: the pixels of a unit as one shard of Zarr v3, packed in the caller's thread.

zarr writes a shard through its event loop: each chunk is copied, encoded by a pool of threads,
joined with the others into the shard, and that is written by another thread. A unit is written
whole, once, by the lane that made it, so here each chunk is encoded from a buffer that stays in
the cache and goes to the file as it is (Zarr v3 specification, "Sharding codec", version 1.0).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numcodecs import Blosc, blosc, zstd
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ShardingCodec, ZstdCodec
from zarr.core.metadata import ArrayV3Metadata

Encode = Callable[[NDArray[Any]], bytes]

_ABSENT = (2**64 - 1, 2**64 - 1)
"""Offset and length of a chunk that is not stored: it reads as fill value."""
_BLOSC_SHUFFLES = {"noshuffle": Blosc.NOSHUFFLE, "shuffle": Blosc.SHUFFLE,
                   "bitshuffle": Blosc.BITSHUFFLE}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ShardPacker:
    """How the shards of one array are packed."""

    chunk: tuple[int, ...]
    """Sides of a chunk; it spans the axes before (y, x)."""
    shard: tuple[int, ...]
    dtype: np.dtype[Any]
    """As stored: little-endian."""
    encode: Encode
    """A contiguous chunk's stored bytes."""

    @classmethod
    def for_array(cls, array: zarr.Array[Any]) -> ShardPacker | None:
        """Return the packer of an array whose layout it knows, else None: zarr must write it.

        It knows shards that span all but (y, x), a fill value of 0, an index at the end, and chunks
        in C order compressed by zstd or Blosc, with a CRC-32C or without.
        """
        metadata = array.metadata
        if not isinstance(metadata, ArrayV3Metadata) or len(metadata.codecs) != 1:
            return None
        sharding = metadata.codecs[0]
        if not isinstance(sharding, ShardingCodec) or not _is_plain_index(sharding):
            return None
        chunk, shard = sharding.chunk_shape, array.shards
        if shard is None or array.fill_value != 0:
            return None
        if not tuple(array.shape[:-2]) == tuple(shard[:-2]) == tuple(chunk[:-2]):
            return None
        encode = _encoder(sharding.codecs)
        if encode is None:
            return None
        return cls(tuple(chunk), tuple(shard), array.dtype.newbyteorder("<"), encode)

    def pack(self, pixels: NDArray[Any]) -> Iterator[bytes]:
        """Yield the bytes of a shard in the order of the file; the last ones are the index.

        ``pixels`` may be smaller than the shard, at the borders of a level; what is missing of a
        chunk is 0. A chunk whose bytes are all 0 is not stored.
        """
        side_y, side_x = self.chunk[-2:]
        grid = self.shard[-2] // side_y, self.shard[-1] // side_x
        entries = [_ABSENT] * prod(grid)
        buffer = np.empty(self.chunk, self.dtype)
        raw = buffer.view(np.uint8)  # -0.0 is no 0: its bytes would be lost
        offset = 0
        for place in range(len(entries)):
            y0, x0 = place // grid[1] * side_y, place % grid[1] * side_x
            part = pixels[..., y0 : y0 + side_y, x0 : x0 + side_x]
            if not part.size:
                continue
            if part.shape != buffer.shape:
                buffer[...] = 0
            buffer[..., : part.shape[-2], : part.shape[-1]] = part
            if not raw.any():
                continue
            stored = self.encode(buffer)
            entries[place] = offset, len(stored)
            offset += len(stored)
            yield stored
        index = struct.pack(f"<{2 * len(entries)}Q", *(n for entry in entries for n in entry))
        yield _with_crc(index)


def _is_plain_index(sharding: ShardingCodec) -> bool:
    kinds = [type(codec) for codec in sharding.index_codecs]
    return sharding.index_location.value == "end" and kinds == [BytesCodec, Crc32cCodec]


def _encoder(codecs: Sequence[Any]) -> Encode | None:
    """Return what encodes a chunk as ``codecs`` do, None for codecs it does not know."""
    if not codecs or not isinstance(codecs[0], BytesCodec):
        return None
    if (endian := codecs[0].endian) is not None and endian.value != "little":
        return None
    match codecs[1:]:
        case [ZstdCodec() as codec]:
            return _zstd(codec)
        case [BloscCodec() as codec]:
            return _blosc(codec)
        case [BloscCodec() as codec, Crc32cCodec()]:
            encode = _blosc(codec)
            return lambda chunk: _with_crc(encode(chunk))
    return None


def _zstd(codec: ZstdCodec) -> Encode:
    level, checksum = codec.level, codec.checksum
    return lambda chunk: bytes(zstd.compress(chunk, level, checksum))


def _blosc(codec: BloscCodec) -> Encode:
    name, level, blocksize = codec.cname.value.encode(), codec.clevel, codec.blocksize
    shuffle = _BLOSC_SHUFFLES[codec.shuffle.value]
    return lambda chunk: bytes(blosc.compress(chunk, name, level, shuffle, blocksize))


def _with_crc(value: bytes) -> bytes:
    """Append the CRC-32C, little-endian (Zarr v3 specification, "CRC32C checksum codec")."""
    return value + struct.pack("<I", google_crc32c.value(value))
