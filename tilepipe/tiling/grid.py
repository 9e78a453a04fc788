"""``Grid``: an extent cut into write units, and how units of two levels depend on each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tilepipe.tiling.box import Box, Shape


@dataclass(frozen=True, slots=True)
class Unit:
    """One write unit: a shard of a level, written by one task alone."""

    iy: int
    ix: int
    box: Box
    """Level px; clipped to the extent."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Write units of ``unit_px`` a side over an extent of (y, x) px, in reading order."""

    extent: Shape
    unit_px: int

    @property
    def shape(self) -> Shape:
        """Units per axis (y, x)."""
        return -(-self.extent[0] // self.unit_px), -(-self.extent[1] // self.unit_px)

    def __len__(self) -> int:
        return self.shape[0] * self.shape[1]

    def unit(self, iy: int, ix: int) -> Unit:
        """Return the unit in row ``iy``, column ``ix``; IndexError outside the grid."""
        rows, columns = self.shape
        if not (0 <= iy < rows and 0 <= ix < columns):
            raise IndexError(f"unit ({iy}, {ix}) of a grid of {rows} x {columns}")
        side = self.unit_px
        box = Box(iy * side, ix * side, (iy + 1) * side, (ix + 1) * side)
        return Unit(iy, ix, box.intersect(Box.of_shape(self.extent)))

    def at(self, index: int) -> Unit:
        """Return the unit with the running number ``index`` in reading order."""
        return self.unit(*divmod(index, self.shape[1]))

    def index(self, iy: int, ix: int) -> int:
        """Return the running number of unit (iy, ix)."""
        return iy * self.shape[1] + ix

    def __iter__(self) -> Iterator[Unit]:
        return (self.at(index) for index in range(len(self)))

    def banded(self, columns: int) -> Iterator[int]:
        """Running numbers in bands of ``columns`` units: each from top to bottom, row by row.

        The next row's neighbours then come ``columns`` units later, however wide the grid is.
        """
        rows, width = self.shape
        for left in range(0, width, columns):
            for iy in range(rows):
                for ix in range(left, min(left + columns, width)):
                    yield self.index(iy, ix)

    def touching(self, box: Box) -> Iterator[Unit]:
        """Units that share a pixel with ``box``."""
        inside = box.intersect(Box.of_shape(self.extent))
        if inside.area == 0:
            return
        side = self.unit_px
        for iy in range(inside.y0 // side, (inside.y1 - 1) // side + 1):
            for ix in range(inside.x0 // side, (inside.x1 - 1) // side + 1):
                yield self.unit(iy, ix)


def level_extents(extent: Shape, *, smallest_px: int = 512) -> tuple[Shape, ...]:
    """Extents of a 2x pyramid, sizes rounded up, down to one of at most ``smallest_px`` a side.

    >>> level_extents((2967, 2220))
    ((2967, 2220), (1484, 1110), (742, 555), (371, 278))
    """
    extents = [extent]
    while max(extents[-1]) > smallest_px:
        y, x = extents[-1]
        extents.append((-(-y // 2), -(-x // 2)))
    return tuple(extents)
