"""Display windows: between which values the channels of an image are shown, as its pixels say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilepipe.spec import LARGEST_PIXEL
from tilepipe.store.attributes import (
    ome_attributes,
    ome_of,
    read_attributes,
    update_attributes,
)
from tilepipe.store.metadata import window_of
from tilepipe.store.store import Store
from tilepipe.tiling import Box

_PERCENTILES = (0.5, 99.7)
_MOST_VALUES = 4 << 20
"""What is looked at of an image, in all channels."""


@dataclass(frozen=True, slots=True)
class Shades:
    """What is shown as black and as white, and the least and the most there is."""

    black: float
    white: float
    least: float
    most: float

    @property
    def window(self) -> tuple[float, float]:
        """Black and white, which differ: a channel of one value is shown as black."""
        return self.black, self.white if self.white > self.black else self.black + 1


def shades_of(plane: NDArray[Any]) -> Shades | None:
    """Return the shades of a (y, x) channel; None where all of it is 0, or no data.

    0 is what most cameras and stitchers leave where there is nothing; it does not count.
    """
    values = plane[(np.abs(plane) <= LARGEST_PIXEL) & (plane != 0)].astype(np.float64)
    if not values.size:
        return None
    black, white = (float(part) for part in np.percentile(values, _PERCENTILES))
    return Shades(black, white, float(values.min()), float(values.max()))


def fit_windows(store: Store) -> None:
    """Set the windows of ``omero`` to what the pixels of a finished image span.

    Viewers show an image between ``start`` and ``end`` of the OME-Zarr specification's ``omero``
    block: a camera of 12 bits would be black between 0 and 65535. Left as it is: an image of 8
    bits, a window that somebody else has set, a channel in which nothing is. Red, green and blue
    are shown alike, from 0.
    """
    attributes = read_attributes(store.files, "", store.version) or {}
    ome = ome_of(attributes, store.version)
    block = ome.get("omero")
    listed = block.get("channels") if isinstance(block, dict) else None
    if not isinstance(block, dict) or not isinstance(listed, list):
        return
    if store.dtype == np.uint8 or len(listed) != store.channels:
        return
    found = [shades_of(plane) for plane in _look(store)]
    if store.rgb:
        found = [_in_common(found)] * store.channels
    whole = window_of(store.dtype)
    channels = [
        {**one, "window": _fitted(shades, whole, store.dtype)}
        if shades is not None and isinstance(one, dict) and one.get("window") == whole
        else one
        for one, shades in zip(listed, found, strict=True)
    ]
    if channels == listed:
        return
    parts = {key: value for key, value in ome.items() if key != "version"}
    parts = {**parts, "omero": {**block, "channels": channels}}
    update_attributes(store.files, "", store.version, ome_attributes(parts, store.version))


def _in_common(found: Sequence[Shades | None]) -> Shades | None:
    seen = [shades for shades in found if shades is not None]
    if not seen:
        return None
    return Shades(
        black=0.0,
        white=max(shades.white for shades in seen),
        least=min(shades.least for shades in seen),
        most=max(shades.most for shades in seen),
    )


def _fitted(shades: Shades, whole: Mapping[str, float], dtype: np.dtype[Any]) -> dict[str, float]:
    black, white = shades.window
    low, high = whole["min"], whole["max"]
    if dtype.kind == "f":  # floats have no range but their own
        low, high = min(0.0, shades.least), max(shades.most, white)
    return {"min": low, "max": high, "start": black, "end": min(white, high)}


def _look(store: Store) -> NDArray[Any]:
    """Read (c, y, x) pixels: the finest level of few enough values, or the coarsest's middle."""
    levels = [store.image(index) for index in range(store.n_levels)]
    few = (one for one in levels if store.channels * math.prod(one.shape) <= _MOST_VALUES)
    level = next(few, None)
    if level is not None:
        return level.read(Box.of_shape(level.shape))
    side = max(1, math.isqrt(_MOST_VALUES // store.channels))
    height, width = levels[-1].shape
    y0, x0 = max(0, (height - side) // 2), max(0, (width - side) // 2)
    return levels[-1].read(Box(y0, x0, min(height, y0 + side), min(width, x0 + side)))
