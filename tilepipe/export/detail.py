"""``busiest``: the place of a mask worth a look at full resolution."""

from __future__ import annotations

import numpy as np

from tilepipe.store import Label
from tilepipe.tiling import Box, Shape

_SEARCHED_PX = 2048


def busiest(label: Label, extent: Shape, *, side_px: int) -> Box:
    """Return the square of the slide in which the mask has the most outlines, level-0 px.

    It is sought on the finest level of at most 2048 px a side, or in the middle of the coarsest;
    the square is smaller where the slide (``extent``) is.
    """
    levels = label.whole_levels()
    level = next((one for one in levels if max(one.shape) <= _SEARCHED_PX), levels[-1])
    height, width = level.shape
    y0, x0 = max(0, (height - _SEARCHED_PX) // 2), max(0, (width - _SEARCHED_PX) // 2)
    ids = level.read(Box(y0, x0, min(height, y0 + _SEARCHED_PX), min(width, x0 + _SEARCHED_PX)))
    changes = np.zeros(ids.shape, dtype=np.int64)
    changes[1:] += ids[1:] != ids[:-1]
    changes[:, 1:] += ids[:, 1:] != ids[:, :-1]
    rows, columns = (min(side, max(1, side_px // level.downsample)) for side in ids.shape)
    # Sums over every window, by differences of running sums.
    sums = np.pad(changes.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    totals = (
        sums[rows:, columns:] - sums[:-rows, columns:] - sums[rows:, :-columns]
        + sums[:-rows, :-columns]
    )  # fmt: skip
    y, x = np.unravel_index(int(np.argmax(totals)), totals.shape)
    top = max(0, min((int(y) + y0) * level.downsample, extent[0] - side_px))
    left = max(0, min((int(x) + x0) * level.downsample, extent[1] - side_px))
    return Box(top, left, min(extent[0], top + side_px), min(extent[1], left + side_px))
