"""Colour of 16 bits in a PNG, of which Pillow keeps the upper eight."""

from __future__ import annotations

import struct
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray

_DEEP = 16
_GREY = 0


def is_deep_colour(head: bytes) -> bool:
    """Tell from its first 26 bytes whether a file is a PNG of 16 bits and more than grey alone."""
    if head[:8] != b"\x89PNG\r\n\x1a\n" or head[12:16] != b"IHDR" or len(head) < 26:
        return False
    bits, colour = struct.unpack_from("BB", head, 24)
    return bool(bits == _DEEP and colour != _GREY)


def decode_deep_colour(data: bytes) -> NDArray[np.uint16]:
    """Pixels (y, x, samples), alpha among them; ValueError of what is damaged."""
    try:
        pixels: NDArray[Any] = imagecodecs.png_decode(data)
    except imagecodecs.PngError as error:
        raise ValueError(str(error)) from error
    return pixels.astype(np.uint16, copy=False)
