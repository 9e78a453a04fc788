"""The size that a compressed tile declares, before a decoder is asked to allocate it."""

from __future__ import annotations

from tilepipe.tiling import Shape


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
