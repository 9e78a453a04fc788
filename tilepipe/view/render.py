"""Pixels to bytes that a browser takes: JPEG and PNG tiles, gzipped class ids."""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray

UInt8 = NDArray[np.uint8]

_CHANNEL = re.compile(r"(\d{1,4}):(-?[\d.eE+-]{1,24}):(-?[\d.eE+-]{1,24}):([0-9a-fA-F]{6})")
_SPREAD = 2654435761
FIRST_CHANNELS = 8
"""Shown until somebody chooses, of an image of more."""


@dataclass(frozen=True, slots=True)
class Window:
    """How one channel is shown: ``low`` is black, ``high`` its full colour."""

    channel: int
    low: float
    high: float
    color: tuple[int, int, int]

    def to_text(self) -> str:
        """Return the form that ``parse_windows`` reads."""
        red, green, blue = self.color
        return f"{self.channel}:{self.low:g}:{self.high:g}:{red:02x}{green:02x}{blue:02x}"


def parse_windows(text: str, *, channels: int) -> tuple[Window, ...]:
    """Read ``0:0:255:ff0000,1:…``; ValueError if it is not that or names no such channel."""
    windows = []
    for part in text.split(",")[: channels + 1] if text else []:
        match = _CHANNEL.fullmatch(part)
        if match is None:
            raise ValueError("a channel is index:low:high:rrggbb")
        channel, low, high = int(match[1]), float(match[2]), float(match[3])
        if channel >= channels or not np.isfinite([low, high]).all():
            raise ValueError("no such channel or window")
        windows.append(Window(channel, low, high, rgb_of(match[4])))
    if len(windows) > channels:
        raise ValueError(f"more windows than the {channels} channels")
    return tuple(windows)


def rgb_of(text: str) -> tuple[int, int, int]:
    """Red, green, blue of ``rrggbb``."""
    red, green, blue = bytes.fromhex(text)
    return red, green, blue


def compose_rgb(pixels: NDArray[Any], windows: Sequence[Window], *, rgb: bool) -> UInt8:
    """Colour (c, y, x) pixels of any number type: (y, x, 3) uint8.

    An RGB image of bytes stays as it is; other images are windowed, coloured and added up.
    """
    if rgb and pixels.dtype == np.uint8 and pixels.shape[0] >= 3:
        return np.ascontiguousarray(np.moveaxis(pixels[:3], 0, -1))
    if rgb and pixels.shape[0] >= 3:
        top = 65535.0 if pixels.dtype == np.uint16 else 1.0
        scaled = np.nan_to_num(pixels[:3].astype(np.float32)) * (255.0 / top)
        return np.ascontiguousarray(np.moveaxis(scaled.clip(0, 255).astype(np.uint8), 0, -1))
    total = np.zeros((*pixels.shape[1:], 3), dtype=np.float32)
    for window in windows:
        span = window.high - window.low or 1.0
        plane = np.nan_to_num(pixels[window.channel].astype(np.float32))
        share = ((plane - window.low) / span).clip(0, 1)
        total += share[..., None] * np.asarray(window.color, dtype=np.float32)
    rounded: UInt8 = (total + 0.5).clip(0, 255).astype(np.uint8)
    return rounded


def to_jpeg(pixels: UInt8, *, quality: int = 92) -> bytes:
    """Encode (y, x, 3) uint8 as JPEG without colour subsampling."""
    encoded: bytes = simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels), quality=quality, colorspace="RGB", colorsubsampling="444"
    )
    return encoded


def to_png(pixels: UInt8) -> bytes:
    """Encode (y, x) or (y, x, 3 or 4) uint8 as PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=4)
    return buffer.getvalue()


def to_gzip(ids: NDArray[Any]) -> bytes:
    """Class ids as gzip of little-endian bytes: uint8 as it is, anything wider as uint32.

    What 32 bits do not hold becomes another number, never 0: the page draws objects apart by it.
    """
    if ids.dtype.itemsize == 8:
        wide = ids.astype(np.uint64)
        folded = (wide + (wide >> np.uint64(32)) * np.uint64(_SPREAD)) & np.uint64(0xFFFFFFFF)
        ids = np.where((folded == 0) & (wide != 0), np.uint64(1), folded)
    if ids.dtype != np.uint8:
        ids = ids.astype("<u4")
    packer = zlib.compressobj(level=1, wbits=31)
    return packer.compress(np.ascontiguousarray(ids).tobytes()) + packer.flush()
