"""Where things lie in a store and how arrays are laid out: chunks, shards, codecs."""

from __future__ import annotations

import re
from typing import Any, Literal

import numpy as np
import zarr
from numcodecs import Blosc, Zstd
from zarr.abc.store import Store as ZarrStore
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from tilepipe.errors import StoreError
from tilepipe.tiling import Shape

Version = Literal["0.5", "0.4"]

LABELS = "labels"
OWN = "tilepipe"
"""The store's own folder (the journal lies there) and its key in the attributes."""
IMAGE_DTYPES = ("uint8", "uint16", "float32")
LABEL_DTYPES = ("uint8", "uint16", "uint32", "int32")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+ -]{0,99}")
_RESERVED = {"zarr.json", "con", "nul"}


def check_label_name(location: str, name: str) -> None:
    """Raise StoreError unless ``name`` is one plain folder name."""
    if not _NAME.fullmatch(name) or name.endswith((".", " ")) or name.lower() in _RESERVED:
        raise StoreError(
            f"{location}: {name[:120]!r} cannot be a label's name; use letters, digits and . _ + - "
            "beginning with a letter or digit, e.g. --name nuclei"
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


def create_array(
    store: ZarrStore,
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
    """
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
        return
    compressor = (
        Zstd(level=3, checksum=True)
        if is_label
        else Blosc(
            cname="zstd",
            clevel=1,
            shuffle=Blosc.BITSHUFFLE if dtype.itemsize == 1 else Blosc.SHUFFLE,
        )
    )
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


def downsampled(extent: Shape, count: int) -> tuple[Shape, ...]:
    """Return ``count`` extents, each half the one before, rounded up."""
    extents = [extent]
    for _ in range(count - 1):
        y, x = extents[-1]
        extents.append((-(-y // 2), -(-x // 2)))
    return tuple(extents)
