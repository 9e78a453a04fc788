"""``find_object``: the next or previous object of some classes, one region read at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from tilepipe.tiling import Box, Grid
from tilepipe.tiling.regions import label_regions
from tilepipe.view.pyramid import ShownPyramid

REGION_PX = 2048
_ALL_CLASSES = frozenset(range(256))
_REGIONS_PER_CALL = 24


def find_object(
    pyramid: ShownPyramid,
    *,
    classes: frozenset[int] | None,
    cursor: tuple[int, int],
    backwards: bool,
) -> dict[str, Any]:
    """Look for the object after (or before) ``cursor`` = (region, place in it).

    Objects are numbered region by region in reading order; one that crosses regions counts in
    the first, and is measured there alone: it is not ``whole``. Looks at a bounded number of
    regions: ``found`` None says to go on at ``cursor``.
    """
    grid = Grid(pyramid.levels[0].shape, REGION_PX)
    region, place = cursor
    step = -1 if backwards else 1
    for _ in range(_REGIONS_PER_CALL):
        if not 0 <= region < len(grid):
            return {"found": False, "cursor": [region, place]}
        objects = _Objects(pyramid, grid.at(region).box, classes)
        place = min(place, len(objects)) + step
        if 0 <= place < len(objects):
            return {"found": True, "cursor": [region, place], **objects[place]}
        region += step
        place = 1 << 40 if backwards else -1
    return {"found": None, "cursor": [region, place]}


def region_at(pyramid: ShownPyramid, y: int, x: int) -> int:
    """Return the number of the region with a level-0 image pixel."""
    grid = Grid(pyramid.levels[0].shape, REGION_PX)
    factor = pyramid.levels[0].downsample * REGION_PX
    rows, columns = grid.shape
    return grid.index(min(max(y, 0) // factor, rows - 1), min(max(x, 0) // factor, columns - 1))


class _Objects:
    """Objects whose first part lies in a box, in reading order; measured when asked for."""

    def __init__(self, pyramid: ShownPyramid, box: Box, classes: frozenset[int] | None) -> None:
        # One line more above and to the left shows what began in an earlier region.
        wide = Box(max(0, box.y0 - 1), max(0, box.x0 - 1), box.y1, box.x1)
        self._wide = wide
        self._level_shape = pyramid.levels[0].shape
        self._factor = pyramid.levels[0].downsample
        self._parts, self._values = _parts(pyramid.read(0, wide), classes)
        found = []
        for number, (rows, columns) in enumerate(ndimage.find_objects(self._parts), start=1):
            earlier = (box.y0 > 0 and rows.start == 0) or (box.x0 > 0 and columns.start == 0)
            if not earlier:
                found.append((rows.start, columns.start, number, rows, columns))
        found.sort(key=lambda one: one[:3])
        self._found = found

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, place: int) -> dict[str, Any]:
        """Class, area and place of an object, in level-0 px of the image."""
        y0, x0, number, rows, columns = self._found[place]
        inside = self._parts[rows, columns] == number
        ys, xs = np.nonzero(inside)
        top, left, factor = self._wide.y0 + y0, self._wide.x0 + x0, self._factor
        height, width = inside.shape
        ends = top + height, left + width
        goes_on = any(
            end == edge < side
            for end, edge, side in zip(
                ends, (self._wide.y1, self._wide.x1), self._level_shape, strict=True
            )
        )
        return {
            "value": self._values[number - 1],
            "whole": not goes_on,
            "area_px": len(ys) * factor * factor,
            "y": (top + float(ys.mean()) + 0.5) * factor,
            "x": (left + float(xs.mean()) + 0.5) * factor,
            "box": [top * factor, left * factor, (top + height) * factor, (left + width) * factor],
        }


def _parts(
    mask: NDArray[Any], classes: frozenset[int] | None
) -> tuple[NDArray[np.int32], list[int]]:
    """Numbered parts (0 is none) and the value of each part, from part 1 on.

    An instance is one part whatever its shape; a class has a part per connected region.
    """
    if mask.dtype != np.uint8:
        values, places = np.unique(mask, return_inverse=True)
        solid = values != 0
        # A table from place to number: 0, wherever among the ids it stands, is none.
        numbers = np.where(solid, np.cumsum(solid), 0).astype(np.int32)
        return numbers[places].reshape(mask.shape), values[solid].tolist()
    parts, found = label_regions(mask, without=() if classes is None else _ALL_CLASSES - classes)
    return parts, found.tolist()
