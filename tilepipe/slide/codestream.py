"""What a compressed tile says of itself: its size, and whether its colours are still YCbCr.

The size is read before a decoder is asked to allocate it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tilepipe.tiling import Shape

APERIO_YCBCR = 33003
_JPEG_2000 = {APERIO_YCBCR, 33004, 33005, 34712}
_PNG, _WEBP = 34933, 50001
STREAMS = {*_JPEG_2000, _PNG, _WEBP}
"""Compressions whose tiles declare a size; the bytes of others may look as if they did."""
_YCBCR = 6


def declared_shape(data: bytes) -> Shape | None:
    """Sides (y, x) px in the header of a PNG, JPEG 2000 or WebP stream; None if it is none."""
    if data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR":
        return _big(data, 20, 4), _big(data, 16, 4)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp(data)
    # The image and tile size segment follows the start of the code stream at once.
    start = data[:256].find(b"\xff\x4f\xff\x51")
    if start >= 0 and len(data) >= start + 24:
        x1, y1, x0, y0 = (_big(data, start + 8 + 4 * k, 4) for k in range(4))
        return y1 - y0, x1 - x0
    return None


def holds_ycbcr(data: bytes, *, compression: int, photometric: int) -> bool:
    """Tell whether a JPEG 2000 tile decodes to luma and chroma, which the TIFF alone says.

    A bare code stream does not name its colours. With the component transform the decoder gives
    RGB, and what has coarser chroma it takes for YCbCr itself.
    """
    if compression not in _JPEG_2000 or (compression != APERIO_YCBCR and photometric != _YCBCR):
        return False
    if data[:4] != b"\xff\x4f\xff\x51":
        return False
    components = _big(data, 40, 2)
    steps = [data[43 + 3 * k : 45 + 3 * k] for k in range(components)]
    if components != 3 or any(step != b"\1\1" for step in steps):
        return False
    at = 4 + _big(data, 4, 2)
    while data[at : at + 1] == b"\xff" and data[at : at + 2] != b"\xff\x52":
        at += 2 + _big(data, at + 2, 2)
    return data[at : at + 2] == b"\xff\x52" and data[at + 8 : at + 9] == b"\0"


def ycbcr_to_rgb(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Colours (y, x, 3) of full-range YCbCr (ITU-R BT.601), as JPEG has it; rounded."""
    luma, blue, red = (pixels[..., k].astype(np.float32) for k in range(3))
    blue -= 128
    red -= 128
    out = np.empty_like(pixels)
    for k, color in enumerate(
        (luma + 1.402 * red, luma - 0.344136 * blue - 0.714136 * red, luma + 1.772 * blue)
    ):
        out[..., k] = np.clip(np.rint(color), 0, 255)
    return out


def _webp(data: bytes) -> Shape | None:
    kind = data[12:16]
    if kind == b"VP8X" and len(data) >= 30:
        return _little(data, 27, 3) + 1, _little(data, 24, 3) + 1
    if kind == b"VP8 " and len(data) >= 30:
        return _little(data, 28, 2) & 0x3FFF, _little(data, 26, 2) & 0x3FFF
    if kind == b"VP8L" and len(data) >= 25:
        bits = _little(data, 21, 4)
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    return None


def _big(data: bytes, at: int, width: int) -> int:
    return int.from_bytes(data[at : at + width], "big")


def _little(data: bytes, at: int, width: int) -> int:
    return int.from_bytes(data[at : at + width], "little")
