"""``spread``: pixels of one channel for a network that takes several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilepipe.tiling import Box

Read = Callable[[Box], NDArray[Any]]
"""A box of a level -> its pixels (c, y, x)."""


def spread(read: Read, channels: int) -> Read:
    """Show a single channel to a network that takes several; otherwise read as it is."""

    def reader(box: Box) -> NDArray[Any]:
        pixels = read(box)
        if pixels.shape[0] == 1 and channels > 1:
            return np.broadcast_to(pixels, (channels, *pixels.shape[1:]))
        return pixels

    return reader
