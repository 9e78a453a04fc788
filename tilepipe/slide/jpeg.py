"""Strict JPEG decoding of TIFF tiles: a damaged stream raises instead of giving wrong pixels.

libjpeg repairs what it can and only warns; for a slide that means grey blocks nobody notices.
Here each warning is an error. (A flipped bit that leaves a valid code stream changes pixels
without a trace: JPEG has no checksum.) The colours are those of tifffile: what it tells
imagecodecs by arguments is told to libjpeg by an Adobe marker.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from tilepipe.tiling import Shape

_SOI, _EOI = b"\xff\xd8", b"\xff\xd9"
_NO_TRANSFORM = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"
_STANDALONE = {0x01, *range(0xD0, 0xDA)}
# Baseline, extended and progressive Huffman, and arithmetic: what TurboJPEG decodes at 8 bits.
_TURBO_FRAMES = {0xC0, 0xC1, 0xC2, 0xC9, 0xCA}
_MOST_PX = 65500
_SPACES = {1: "GRAY", 3: "RGB", 4: "CMYK"}
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}


@dataclass(frozen=True, slots=True)
class Frame:
    """The header of a JPEG stream."""

    kind: int
    """Second byte of the start-of-frame marker."""
    precision: int
    height: int
    width: int
    components: int
    jfif: bool
    scan_at: int
    """Offset of the first start-of-scan marker."""

    @property
    def turbo(self) -> bool:
        """TurboJPEG decodes it to its samples: 8 bits, not lossless, grey or three colours."""
        return self.checked and self.components in (1, 3)

    @property
    def checked(self) -> bool:
        """TurboJPEG decodes it, whatever its colours are."""
        return self.kind in _TURBO_FRAMES and self.precision == 8 and self.components in _SPACES


def read_frame(data: bytes) -> Frame:
    """Read the markers up to the first scan; ValueError says what is missing."""
    if data[:2] != _SOI:
        raise ValueError("no start-of-image marker")
    jfif = False
    found: tuple[int, int, int, int, int] | None = None
    for kind, start, stop in _segments(data):
        if kind == 0xE0 and data[start + 4 : start + 8] == b"JFIF":
            jfif = True
        elif kind in _FRAMES:
            if stop - start < 10:
                raise ValueError("a frame header that is too short")
            found = (
                kind,
                data[start + 4],
                int.from_bytes(data[start + 5 : start + 7], "big"),
                int.from_bytes(data[start + 7 : start + 9], "big"),
                data[start + 9],
            )
        elif kind == 0xDA:
            if found is None:
                raise ValueError("a scan without a frame header")
            return Frame(*found, jfif=jfif, scan_at=start)
    raise ValueError("no scan")


def _segments(data: bytes) -> list[tuple[int, int, int]]:
    """Marker segments (kind, start, stop) of a header, up to and with the first scan."""
    segments = []
    at = 2
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            raise ValueError(f"no marker at byte {at}")
        kind = data[at + 1]
        if kind == 0xFF:  # fill byte
            at += 1
            continue
        if kind in _STANDALONE:
            at += 2
            continue
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        stop = at + 2 + length
        if length < 2 or stop > len(data):
            raise ValueError(f"a marker segment at byte {at} that leaves the stream")
        segments.append((kind, at, stop))
        if kind == 0xDA:
            break
        at = stop
    return segments


def _tables_body(tables: bytes) -> bytes:
    """Quantisation and Huffman tables of a TIFF's JPEGTables, without colour markers."""
    return b"".join(
        tables[start:stop] for kind, start, stop in _segments(tables) if kind in (0xDB, 0xC4, 0xDD)
    )


def whole_stream(data: bytes, *, tables: bytes | None, header: bytes | None) -> bytes:
    """Join a tile with the tables or header that the TIFF keeps once; a complete JPEG."""
    if header:
        # NDPI: restart intervals of one long scan; a trailing restart marker has no successor.
        if len(data) >= 2 and data[-2] == 0xFF and 0xD0 <= data[-1] <= 0xD7:
            data = data[:-2]
        return header + data + (b"" if data.endswith(_EOI) else _EOI)
    if tables and data[:2] == _SOI:
        return _SOI + _tables_body(tables) + data[2:]
    return data


def check_structure(data: bytes) -> Frame:
    """Check the markers of a stream that only the lenient decoder can take; ValueError."""
    frame = read_frame(data)
    if data.rfind(_EOI, frame.scan_at) < 0:
        raise ValueError("no end-of-image marker: the stream is cut off")
    return frame


def check_strict(stream: bytes, frame: Frame) -> None:
    """Raise ValueError for any irregularity of a JPEG whose colours the lenient decoder knows."""
    known = stream if frame.checked else _of_one_component(stream, frame)
    if known is None:
        return
    try:
        simplejpeg.decode_jpeg_header(known)
    except ValueError:
        return  # a way to leave out colour that TurboJPEG does not know
    simplejpeg.decode_jpeg(known, colorspace=_SPACES.get(frame.components, "GRAY"), strict=True)


def _of_one_component(stream: bytes, frame: Frame) -> bytes | None:
    """Tell of two components as of one twice as wide; None where that is another stream.

    TurboJPEG knows no two. Their blocks lie in turn: those of one component lie so, too, and its
    pixels are wrong, but each code is read.
    """
    width = 16 * -(-frame.width // 8)
    plain = frame.kind in (0xC0, 0xC1) and frame.precision == 8 and frame.components == 2
    if not plain or width > _MOST_PX:
        return None
    segments = _segments(stream)
    parts = [_SOI]
    for kind, start, stop in segments:
        part = stream[start:stop]
        if kind == frame.kind:
            if part[11] != 0x11 or part[14] != 0x11:  # one has fewer pixels
                return None
            part = b"".join((part[:2], b"\0\x0b", part[4:7], width.to_bytes(2), b"\1", part[10:13]))
        elif kind == 0xDD:
            interval = 2 * int.from_bytes(part[4:6])
            if interval > 0xFFFF:
                return None
            part = part[:4] + interval.to_bytes(2)
        elif kind == 0xDA:
            if part[4] != 2 or part[6] != part[8]:  # apart, or with codes of their own
                return None
            part = b"".join((part[:2], b"\0\x08\1", part[5:7], part[9:12]))
        parts.append(part)
    return b"".join(parts) + stream[segments[-1][2] :]


def decode_strict(stream: bytes, frame: Frame, *, untransformed: bool) -> NDArray[np.uint8]:
    """Pixels (y, x, 1 or 3) uint8 of a complete 8-bit JPEG; ValueError for any irregularity.

    ``untransformed``: the three components are the samples, whatever the markers say.
    """
    if frame.components == 1:
        return np.asarray(simplejpeg.decode_jpeg(stream, colorspace="GRAY", strict=True))
    if untransformed:
        stream = _as_untransformed(stream)
    return np.asarray(simplejpeg.decode_jpeg(stream, colorspace="RGB", strict=True))


def _as_untransformed(stream: bytes) -> bytes:
    """Replace the colour markers by one that says: no transform, the components are RGB."""
    segments = _segments(stream)
    kept = b"".join(stream[start:stop] for kind, start, stop in segments[:-1] if kind not in _COLOR)
    return _SOI + _NO_TRANSFORM + kept + stream[segments[-1][1] :]


_COLOR = {0xE0, 0xEE}


def fits(frame: Frame, segment: Shape, remaining: Shape, *, tiled: bool) -> bool:
    """Tell whether a frame of this size can be the segment (y, x) px of the image.

    Tiles may be cut to what remains of the image; the last strip may be whole.
    """
    size = (frame.height, frame.width)
    if tiled:
        cut = (min(segment[0], remaining[0]), min(segment[1], remaining[1]))
        return size in (segment, cut, (cut[0], segment[1]))
    return frame.width == segment[1] and frame.height >= min(segment[0], remaining[0])
