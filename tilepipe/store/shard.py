"""``ShardFormat``: pixels as shards of Zarr v3, packed and unpacked in the caller's thread.

zarr does both through its event loop: each chunk is copied, encoded or decoded by a pool of
threads, joined with the others, and the one thread of that loop holds the interpreter meanwhile. A
unit is written whole, once, by the lane that made it, and read by lanes that have nothing else to
do: so here each chunk goes through a buffer that stays in the cache (Zarr v3 specification,
"Sharding codec", version 1.0).
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

from tilepipe.tiling import Box

Encode = Callable[[NDArray[Any]], bytes]
"""A contiguous chunk -> its stored bytes."""
Decode = Callable[[bytes, NDArray[Any]], None]
"""Stored bytes -> a chunk's buffer; ValueError if they are damaged."""
ReadRange = Callable[[int, int], bytes]
"""(offset, length) -> those bytes of a file, fewer at its end."""

_ABSENT = (2**64 - 1, 2**64 - 1)
"""Offset and length of a chunk that is not stored: it reads as fill value."""
_CRC_BYTES = 4
_BLOSC_HEADER_BYTES = 16
_BLOSC_SHUFFLES = {"noshuffle": Blosc.NOSHUFFLE, "shuffle": Blosc.SHUFFLE,
                   "bitshuffle": Blosc.BITSHUFFLE}  # fmt: skip


@dataclass(frozen=True, slots=True)
class ShardFormat:
    """How the shards of one array are laid out."""

    chunk: tuple[int, ...]
    """Sides of a chunk; it spans the axes before (y, x)."""
    shard: tuple[int, ...]
    dtype: np.dtype[Any]
    """As stored: little-endian."""
    encode: Encode
    decode: Decode
    checked: bool
    """Each chunk is followed by its CRC-32C."""

    @classmethod
    def for_array(cls, array: zarr.Array[Any]) -> ShardFormat | None:
        """Return the format of an array whose layout it knows, else None: that is zarr's alone.

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
        if shard is None or array.fill_value != 0 or np.signbit(array.fill_value):
            return None
        if not tuple(array.shape[:-2]) == tuple(shard[:-2]) == tuple(chunk[:-2]):
            return None
        codec = _chunk_codec(sharding.codecs)
        if codec is None:
            return None
        return cls(tuple(chunk), tuple(shard), array.dtype.newbyteorder("<"), *codec)

    @property
    def _chunks(self) -> tuple[int, int]:
        """Chunks of a shard along y and x."""
        return self.shard[-2] // self.chunk[-2], self.shard[-1] // self.chunk[-1]

    def pack(self, pixels: NDArray[Any]) -> Iterator[bytes]:
        """Yield the bytes of a shard in the order of the file, nothing where all are 0.

        ``pixels`` may be smaller than the shard, at the borders of a level; what is missing of a
        chunk is 0. A chunk whose bytes are all 0 is not stored. Written as they come, a chunk's
        bytes are freed before the next one's are made: malloc takes the same memory again.
        """
        side_y, side_x = self.chunk[-2:]
        entries = [_ABSENT] * prod(self._chunks)
        buffer = np.empty(self.chunk, self.dtype)
        raw = buffer.view(np.uint8)  # -0.0 is no 0: its bytes would be lost
        offset = 0
        for place in range(len(entries)):
            y0, x0 = place // self._chunks[1] * side_y, place % self._chunks[1] * side_x
            part = pixels[..., y0 : y0 + side_y, x0 : x0 + side_x]
            if not part.size:
                continue
            if part.shape != buffer.shape:
                buffer[...] = 0
            buffer[..., : part.shape[-2], : part.shape[-1]] = part
            if not raw.any():
                continue
            stored = self.encode(buffer)
            length = len(stored) + (_CRC_BYTES if self.checked else 0)
            entries[place] = offset, length
            offset += length
            yield stored
            if self.checked:
                yield _crc(stored)
        if offset:
            index = struct.pack(f"<{2 * len(entries)}Q", *(n for entry in entries for n in entry))
            yield index + _crc(index)

    def unpack(self, read: ReadRange, size: int, box: Box, out: NDArray[Any]) -> None:
        """Read ``box`` of a shard, counted from its corner, into ``out`` (..., y, x).

        ``size`` is that of the file, and ``read`` gives its bytes. Chunks that are not stored are
        0. Raises ValueError, which says what is wrong, for damaged bytes.
        """
        index = self._index(read, size)
        buffer = np.empty(self.chunk, self.dtype)
        for (iy, ix), part, target in pieces(box, self.chunk[-2:], out):
            offset, length = (int(number) for number in index[iy, ix])
            if (offset, length) == _ABSENT:
                target[...] = 0
                continue
            if offset + length > size:
                raise ValueError(f"chunk ({iy}, {ix}) of a shard lies behind its end")
            stored = (_checked if self.checked else _exactly)(read, offset, length)
            self.decode(stored, buffer)
            target[...] = buffer[(..., *part.slices)]

    def _index(self, read: ReadRange, size: int) -> NDArray[np.uint64]:
        """Return offset and length of each chunk: (chunks y, chunks x, 2)."""
        length = 16 * prod(self._chunks)
        if size < length + _CRC_BYTES:
            raise ValueError(f"a shard of {size} bytes is cut off: it has no index")
        raw = _checked(read, size - length - _CRC_BYTES, length + _CRC_BYTES)
        return np.frombuffer(raw, "<u8").reshape(*self._chunks, 2)


def pieces(
    box: Box, sides: tuple[int, ...], out: NDArray[Any]
) -> Iterator[tuple[tuple[int, int], Box, NDArray[Any]]]:
    """Cut ``box`` along a grid of ``sides`` (y, x) that begins at (0, 0).

    Yields place in the grid, the part seen from that cell's corner, and the part's view of ``out``,
    pixels (..., y, x) of the box.
    """
    side_y, side_x = sides
    for iy in range(box.y0 // side_y, -(-box.y1 // side_y)):
        for ix in range(box.x0 // side_x, -(-box.x1 // side_x)):
            y0, x0 = iy * side_y, ix * side_x
            part = Box(y0, x0, y0 + side_y, x0 + side_x).intersect(box)
            target = out[(..., *part.shift(-box.y0, -box.x0).slices)]
            yield (iy, ix), part.shift(-y0, -x0), target


def _is_plain_index(sharding: ShardingCodec) -> bool:
    kinds = [type(codec) for codec in sharding.index_codecs]
    return sharding.index_location.value == "end" and kinds == [BytesCodec, Crc32cCodec]


def _chunk_codec(codecs: Sequence[Any]) -> tuple[Encode, Decode, bool] | None:
    """Return what does as ``codecs`` do, and whether a CRC-32C follows; None for others."""
    if not codecs or not isinstance(codecs[0], BytesCodec):
        return None
    if (endian := codecs[0].endian) is not None and endian.value != "little":
        return None
    match codecs[1:]:
        case [ZstdCodec() as codec]:
            return _zstd_encoder(codec), _unzstd, False
        case [BloscCodec() as codec]:
            return _blosc_encoder(codec), _unblosc, False
        case [BloscCodec() as codec, Crc32cCodec()]:
            return _blosc_encoder(codec), _unblosc, True
    return None


def _zstd_encoder(codec: ZstdCodec) -> Encode:
    level, checksum = codec.level, codec.checksum
    return lambda chunk: bytes(zstd.compress(chunk, level, checksum))


def _unzstd(stored: bytes, chunk: NDArray[Any]) -> None:
    found = zstd.decompress(stored)
    if len(found) != chunk.nbytes:
        raise ValueError(f"a chunk of {chunk.nbytes} bytes decodes to {len(found)}")
    chunk[...] = np.frombuffer(found, chunk.dtype).reshape(chunk.shape)


def _blosc_encoder(codec: BloscCodec) -> Encode:
    name, level, blocksize = codec.cname.value.encode(), codec.clevel, codec.blocksize
    shuffle = _BLOSC_SHUFFLES[codec.shuffle.value]
    return lambda chunk: bytes(blosc.compress(chunk, name, level, shuffle, blocksize))


def _unblosc(stored: bytes, chunk: NDArray[Any]) -> None:
    # The header's sizes (Blosc 1 format): it decodes as many bytes as they say.
    if len(stored) < _BLOSC_HEADER_BYTES:
        raise ValueError(f"a chunk of {len(stored)} bytes is cut off")
    decoded, _, length = struct.unpack_from("<III", stored, 4)
    if decoded != chunk.nbytes or length != len(stored):
        raise ValueError(
            f"a chunk of {chunk.nbytes} bytes, {len(stored)} of them stored, says that it is one "
            f"of {decoded} and {length}"
        )
    blosc.decompress(stored, chunk)


def _exactly(read: ReadRange, offset: int, length: int) -> bytes:
    found = read(offset, length)
    if len(found) != length:
        raise ValueError(f"{length} bytes were to be read and {len(found)} came: it is cut off")
    return found


def _checked(read: ReadRange, offset: int, length: int) -> bytes:
    """Read what comes before a CRC-32C at the end; ValueError if it does not match."""
    if length < _CRC_BYTES:
        raise ValueError(f"{length} bytes are too few for a checksum")
    body = _exactly(read, offset, length - _CRC_BYTES)
    if _crc(body) != _exactly(read, offset + length - _CRC_BYTES, _CRC_BYTES):
        raise ValueError("the checksum of its bytes does not match")
    return body


def _crc(value: bytes) -> bytes:
    """Return the CRC-32C, little-endian (Zarr v3 specification, "CRC32C checksum codec")."""
    return struct.pack("<I", google_crc32c.value(value))
