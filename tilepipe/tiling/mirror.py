"""Mirrored context: what stands beyond the true borders of an image.

The image is continued by reflection about its border pixels (the border pixel is not repeated),
as in the U-Net paper (Ronneberger et al. 2015, fig. 2), and again and again where the context is
wider than the image: period ``2 * (n - 1)``. An axis of one pixel is continued by that pixel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilepipe.buffers import empty
from tilepipe.tiling.box import Box, Shape


def mirror_index(start: int, stop: int, length: int) -> NDArray[np.intp]:
    """Return the indices in ``[0, length)`` that positions ``start … stop - 1`` reflect to.

    >>> mirror_index(-3, 6, 4).tolist()
    [3, 2, 1, 0, 1, 2, 3, 2, 1]
    """
    positions = np.arange(start, stop, dtype=np.intp)
    if length == 1:
        return np.zeros_like(positions)
    period = 2 * (length - 1)
    folded = np.mod(positions, period)
    return np.minimum(folded, period - folded)


def mirror_source(box: Box, extent: Shape) -> Box:
    """Return the box inside ``extent`` that holds every pixel which ``box`` reflects to."""
    rows = mirror_index(box.y0, box.y1, extent[0])
    columns = mirror_index(box.x0, box.x1, extent[1])
    return Box(int(rows.min()), int(columns.min()), int(rows.max()) + 1, int(columns.max()) + 1)


def read_mirrored(read: Callable[[Box], NDArray[Any]], box: Box, extent: Shape) -> NDArray[Any]:
    """Read ``box`` of an image of ``extent`` (y, x), mirrored where the box leaves it.

    ``read`` takes a box inside the extent and returns an array whose last two axes are (y, x);
    it is called once. The result has ``box.shape`` as its last two axes.
    """
    source = mirror_source(box, extent)
    pixels = read(source)
    if source == box:
        return pixels
    inside = box.intersect(Box.of_shape(extent))
    if inside.area == 0:
        return _picked(pixels, source, box, extent)
    mirrored = empty((*pixels.shape[:-2], *box.shape), pixels.dtype)
    mirrored[(..., *inside.shift(-box.y0, -box.x0).slices)] = pixels[
        (..., *inside.shift(-source.y0, -source.x0).slices)
    ]
    # Picking pixel by pixel is slow: only the frame around what is there is picked.
    for strip in (
        Box(box.y0, box.x0, inside.y0, box.x1),
        Box(inside.y1, box.x0, box.y1, box.x1),
        Box(inside.y0, box.x0, inside.y1, inside.x0),
        Box(inside.y0, inside.x1, inside.y1, box.x1),
    ):
        if strip.area:
            mirrored[(..., *strip.shift(-box.y0, -box.x0).slices)] = _picked(
                pixels, source, strip, extent
            )
    return mirrored


def _picked(pixels: NDArray[Any], source: Box, box: Box, extent: Shape) -> NDArray[Any]:
    """Return ``box`` from the pixels of ``source``, each picked by its reflected position."""
    rows = mirror_index(box.y0, box.y1, extent[0]) - source.y0
    columns = mirror_index(box.x0, box.x1, extent[1]) - source.x0
    return np.ascontiguousarray(pixels[..., rows[:, None], columns[None, :]])
