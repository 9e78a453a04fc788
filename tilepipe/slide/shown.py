"""``shown``: an image's pixels for a network that takes another number of channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilepipe.tiling import Box

Read = Callable[[Box], NDArray[Any]]
"""A box of a level -> its pixels (c, y, x)."""
LUMINANCE = (0.299, 0.587, 0.114)
"""Of red, green and blue (ITU-R BT.601)."""


def can_be_shown(channels: int, wanted: int) -> bool:
    """Tell whether ``shown`` makes ``wanted`` channels of so many; three have to be colours."""
    return channels in (1, wanted) or (channels, wanted) == (3, 1)


def shown(pixels: NDArray[Any], channels: int) -> NDArray[Any]:
    """(c, y, x) uint8, uint16 or float -> (channels, y, x) of the same dtype, pixel by pixel.

    One channel fills all; red, green and blue become their luminance, integers rounded. What cannot
    be shown is returned as it is.
    """
    have = pixels.shape[0]
    if have == channels or not can_be_shown(have, channels):
        return pixels
    if have == 1:
        return np.broadcast_to(pixels, (channels, *pixels.shape[1:]))
    if pixels.dtype.kind == "f":
        return _sum(pixels, [pixels.dtype.type(share) for share in LUMINANCE])[None]
    thousandths = _sum(pixels, [np.uint32(round(1000 * share)) for share in LUMINANCE])
    return ((thousandths + np.uint32(500)) // np.uint32(1000)).astype(pixels.dtype)[None]


def _sum(pixels: NDArray[Any], weights: list[Any]) -> NDArray[Any]:
    """Sum of the channels times their weights, added up one after the other."""
    total = pixels[0] * weights[0]
    for channel, weight in zip(pixels[1:], weights[1:], strict=True):
        total += channel * weight
    return np.asarray(total)


def reads_shown(read: Read, channels: int) -> Read:
    """Return what reads boxes as a network of so many channels is shown them."""
    return lambda box: shown(read(box), channels)
