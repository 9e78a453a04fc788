"""Where things lie in a store and how arrays are laid out: chunks, shards, codecs."""

from __future__ import annotations

import re
from typing import Any, Literal

import numpy as np
import zarr
from numcodecs import Blosc, Zstd
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from tilepipe.errors import StoreError
from tilepipe.store.files import Files
from tilepipe.tiling import Shape

Version = Literal["0.5", "0.4"]

LABELS = "labels"
PROBABILITIES = "probabilities"
OWN = "tilepipe"
"""The store's own folder (the journal lies there) and its key in the attributes."""
TISSUE = f"{OWN}/tissue"
"""What was taken for tissue: an image per label."""
EXPORTED = "exported"
"""State of a finished image or label in a copy, which has no journal."""
IMAGE_DTYPES = ("uint8", "uint16", "float32")
LABEL_DTYPES = ("uint8", "uint16", "uint32", "int32")

_BLOSC_BLOCK_BYTES = 1 << 20
"""A chunk is one block or a few. Blosc's own choice is 32 kB, for reading parts of a chunk, which
nobody does: H&E is written at 313 instead of 609 MB/s and 2 % larger (benchmarks/NOTES.md)."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+ -]{0,99}")
_RESERVED = {"zarr.json", "con", "nul"}


_OWN_V3 = (
    b'{"zarr_format": 3, "node_type": "array", "shape": [0], "data_type": "uint8", '
    b'"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1]}}, '
    b'"chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}}, '
    b'"fill_value": 0, "codecs": [{"name": "bytes"}], '
    b'"attributes": {"about": "records of tilepipe: which units are done"}}'
)
_OWN_V2 = (
    b'{"zarr_format": 2, "shape": [0], "chunks": [1], "dtype": "|u1", "compressor": null, '
    b'"fill_value": 0, "order": "C", "filters": null, "dimension_separator": "/"}'
)


def put_own_folder(files: Files, version: Version) -> None:
    """Make the store's own folder an empty array in zarr's eyes.

    zarr warns of every folder that is neither group nor array, and never looks inside an array:
    so neither the folder nor the records in it disturb a reader that walks through the store.
    """
    key, value = ("zarr.json", _OWN_V3) if version == "0.5" else (".zarray", _OWN_V2)
    files.put(f"{OWN}/{key}", value)


def check_label_name(location: str, name: str) -> None:
    """Raise StoreError unless ``name`` is one plain folder name."""
    if not _NAME.fullmatch(name) or name.endswith((".", " ")) or name.lower() in _RESERVED:
        raise StoreError(
            f"{location}: {name[:120]!r} cannot be a label's name; use letters, digits and . _ + - "
            "beginning with a letter or digit, e.g. --name nuclei"
        )


def is_safe_name(name: str) -> bool:
    """Tell whether a label that another program may have named lies where its name says."""
    return (
        0 < len(name) <= 200
        and not name.startswith(".")
        and not any(part in ("", ".", "..") for part in name.split("/"))
        and not {"\\", "\0"} & set(name)
    )


def chunk_side(unit_px: int, chunk_px: int) -> int:
    """Return the chunk side for a unit: the largest divisor of the unit up to ``chunk_px``.

    A unit without a divisor of a useful size (a prime, say) is one chunk.

    >>> chunk_side(4096, 512), chunk_side(1000, 512), chunk_side(100, 512), chunk_side(1021, 512)
    (512, 500, 100, 1021)
    """
    if unit_px <= chunk_px:
        return unit_px
    for count in range(-(-unit_px // chunk_px), unit_px // max(1, chunk_px // 4) + 1):
        if unit_px % count == 0:
            return unit_px // count
    return unit_px


def image_codec(dtype: np.dtype[Any]) -> Blosc:
    """Return what compresses a chunk of an image: as a Zarr v2 array names it, and for forecasts.

    Version 0.5 has the same by another name.
    """
    return Blosc(
        cname="zstd",
        clevel=1,
        shuffle=Blosc.BITSHUFFLE if dtype.itemsize == 1 else Blosc.SHUFFLE,
        blocksize=_BLOSC_BLOCK_BYTES,
    )


def create_array(
    files: Files,
    key: str,
    *,
    version: Version,
    axes: tuple[str, ...],
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    unit_px: int,
    chunk_px: int,
    is_label: bool,
) -> None:
    """Create an array whose last two axes are (y, x); all other axes lie in one chunk.

    Version 0.5: chunks in a shard of ``unit_px`` a side. Version 0.4: Zarr v2 has no shards, so a
    unit is several chunks, each a file.

    zarr writes the metadata into memory and they are put from there: an array is one put, and the
    groups above it stay as they are.
    """
    written: dict[str, Buffer] = {}
    store = MemoryStore(written)
    side = chunk_side(unit_px, chunk_px)
    leading = shape[:-2]
    chunks = (*leading, side, side)
    if version == "0.5":
        compressors: list[Any] = (
            # zstd's own checksum: a flipped bit is an error, not a wrong class.
            [ZstdCodec(level=3, checksum=True)]
            if is_label
            else [
                BloscCodec(
                    typesize=dtype.itemsize,
                    cname="zstd",
                    clevel=1,
                    shuffle="bitshuffle" if dtype.itemsize == 1 else "shuffle",
                    blocksize=_BLOSC_BLOCK_BYTES,
                ),
                Crc32cCodec(),
            ]
        )
        zarr.create_array(
            store,
            name=key,
            shape=shape,
            dtype=dtype,
            chunks=chunks,
            shards=(*leading, unit_px, unit_px),
            compressors=compressors,
            fill_value=0,
            dimension_names=axes,
            zarr_format=3,
        )
        files.put(f"{key}/zarr.json", written[f"{key}/zarr.json"].to_bytes(), durable=True)
        return
    compressor = Zstd(level=3, checksum=True) if is_label else image_codec(dtype)
    zarr.create_array(
        store,
        name=key,
        shape=shape,
        dtype=dtype,
        chunks=chunks,
        compressors=compressor,
        fill_value=0,
        chunk_key_encoding={"name": "v2", "separator": "/"},
        zarr_format=2,
    )
    files.put(f"{key}/.zarray", written[f"{key}/.zarray"].to_bytes(), durable=True)


def downsampled(extent: Shape, count: int) -> tuple[Shape, ...]:
    """Return ``count`` extents, each half the one before, rounded up."""
    extents = [extent]
    for _ in range(count - 1):
        y, x = extents[-1]
        extents.append((-(-y // 2), -(-x // 2)))
    return tuple(extents)
