"""Blosc frames that were cut off: the library decodes what lies in memory behind them."""

from __future__ import annotations

from typing import Any

HEADER_BYTES = 16


def is_blosc(array: Any) -> bool:
    """Tell whether each stored object of a zarr array is one Blosc frame."""
    outermost = type(array.compressors[-1]).__name__ if array.compressors else ""
    return array.shards is None and outermost in ("Blosc", "BloscCodec")


def frame_bytes(header: bytes) -> int:
    """Return the length of a frame that begins with ``header``, at least the header's own.

    Blosc 1 format: the last of the header's numbers, 4 bytes, little-endian.
    """
    return max(HEADER_BYTES, int.from_bytes(header[12:HEADER_BYTES], "little"))
