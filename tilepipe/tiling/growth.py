"""``grow_into``: labels grown over a ring around them, the same wherever an image is cut."""

from __future__ import annotations

from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray


def reach_offsets(reach_px: float) -> tuple[tuple[int, int], ...]:
    """Return the (dy, dx) within ``reach_px``, the nearest first, equals in reading order."""
    side = range(-int(reach_px), int(reach_px) + 1)
    near = [(dy * dy + dx * dx, dy, dx) for dy in side for dx in side]
    return tuple((dy, dx) for square, dy, dx in sorted(near) if 0 < square <= reach_px**2)


def grow_into(ids: NDArray[Any], ring: NDArray[np.bool_], *, reach_px: float) -> NDArray[np.int32]:
    """Give each pixel of ``ring`` the id of the nearest labelled pixel within ``reach_px``.

    Equally near ids are told apart by their place: the first in reading order wins. So a pixel
    depends on nothing beyond ``reach_px``, which a distance transform of the whole image does not
    promise where two are equally near.

    Parameters
    ----------
    ids
        (y, x) integers; 0 = none. They stay as they are.
    ring
        (y, x) where ids may grow; pixels with an id of their own are left alone.
    reach_px
        Euclidean distance between pixel centres.

    Returns
    -------
    (y, x) int32.
    """
    grown = ids.astype(np.int32)
    places = np.flatnonzero(ring & (grown == 0))
    if not places.size:
        return grown
    margin = ceil(reach_px)
    width = grown.shape[1] + 2 * margin
    padded = np.pad(grown, margin).ravel()
    y, x = np.divmod(places, grown.shape[1])
    centres = (y + margin) * width + x + margin
    target = grown.reshape(-1)
    for dy, dx in reach_offsets(reach_px):
        found = padded[centres + (dy * width + dx)]
        hit = found != 0
        target[places[hit]] = found[hit]
        places, centres = places[~hit], centres[~hit]
        if not places.size:
            break
    return grown
