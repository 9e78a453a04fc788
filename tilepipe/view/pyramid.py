"""``ShownPyramid``: pixels of an image or label at any level, also while a job still writes it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilepipe.store import Level
from tilepipe.tiling import Box
from tilepipe.view.cache import ByteLRU
from tilepipe.view.units import UnitTracker

TILE_PX = 512
_OVERVIEW_PX = 2048
Pixels = NDArray[Any]


class ShownPyramid:
    """Levels read in blocks of TILE_PX, each decoded once and kept in the cache."""

    def __init__(
        self,
        levels: Sequence[Level],
        *,
        channels: int | None,
        tracker: UnitTracker | None,
        cache: ByteLRU,
        key: Hashable,
    ) -> None:
        self.levels = list(levels)
        self.channels = channels
        """None for labels, whose pixels are (y, x)."""
        self.tracker = tracker
        self._cache = cache
        self._key = key

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the pixels."""
        return self.levels[0].dtype

    def describe(self) -> list[dict[str, Any]]:
        """Return shape and downsample of each level, as JSON."""
        return [
            {"shape": list(level.shape), "downsample": level.downsample} for level in self.levels
        ]

    def overview(self) -> Pixels:
        """Return the finest level of at most 2048 px a side, else the middle of the coarsest."""
        index = len(self.levels) - 1
        for number, level in enumerate(self.levels):
            if max(level.shape) <= _OVERVIEW_PX:
                index = number
                break
        height, width = self.levels[index].shape
        # A foreign store may have one huge level only: look at its middle then.
        y0, x0 = max(0, (height - _OVERVIEW_PX) // 2), max(0, (width - _OVERVIEW_PX) // 2)
        box = Box(y0, x0, min(height, y0 + _OVERVIEW_PX), min(width, x0 + _OVERVIEW_PX))
        return self.read(index, box)

    def grid_shape(self, level: int) -> tuple[int, int]:
        """Tiles per axis (y, x)."""
        height, width = self.levels[level].shape
        return -(-height // TILE_PX), -(-width // TILE_PX)

    def tile_box(self, level: int, ty: int, tx: int) -> Box:
        """Level px of a tile."""
        box = Box(ty * TILE_PX, tx * TILE_PX, (ty + 1) * TILE_PX, (tx + 1) * TILE_PX)
        return box.intersect(Box.of_shape(self.levels[level].shape))

    def read(self, level: int, box: Box) -> Pixels:
        """Pixels of ``box``, which lies inside the level; 0 where nothing is written yet."""
        out = self._empty(box)
        side = TILE_PX
        for by in range(box.y0 // side, (box.y1 - 1) // side + 1):
            for bx in range(box.x0 // side, (box.x1 - 1) // side + 1):
                area = self.tile_box(level, by, bx)
                part = area.intersect(box)
                if part == area == box:
                    return self.block(level, by, bx)
                source = part.shift(-area.y0, -area.x0).slices
                target = part.shift(-box.y0, -box.x0).slices
                out[(..., *target)] = self.block(level, by, bx)[(..., *source)]
        return out

    def block(self, level: int, by: int, bx: int) -> Pixels:
        """One tile's pixels, from the cache if nothing changed under it."""
        box = self.tile_box(level, by, bx)
        version = 0
        if self.tracker is not None:
            version = self.tracker.version(level, box)
            if version == 0:
                return self._empty(box)
        key = (self._key, level, by, bx, version)
        return self._cache.get(key, lambda: self._make(level, by, bx, box))

    def _make(self, level: int, by: int, bx: int, box: Box) -> Pixels:
        tracker = self.tracker
        units = list(self.levels[level].grid.touching(box))
        if tracker is None or all(tracker.is_done(level, u.iy, u.ix) for u in units):
            return self.levels[level].read(box)
        # The coarse level is not built here yet: look at the finer one, every other pixel.
        out = self._from_finer(level, by, bx, box) if level else self._empty(box)
        for unit in units:
            if tracker.is_done(level, unit.iy, unit.ix):
                part = unit.box.intersect(box)
                target = part.shift(-box.y0, -box.x0).slices
                out[(..., *target)] = self.levels[level].read(part)
        return out

    def _from_finer(self, level: int, by: int, bx: int, box: Box) -> Pixels:
        out = self._empty(box)
        rows, columns = self.grid_shape(level - 1)
        half = TILE_PX // 2
        for dy in range(2):
            for dx in range(2):
                y, x = 2 * by + dy, 2 * bx + dx
                if y < rows and x < columns:
                    thin = self.block(level - 1, y, x)[..., ::2, ::2]
                    height, width = thin.shape[-2:]
                    out[..., dy * half : dy * half + height, dx * half : dx * half + width] = thin
        return out

    def _empty(self, box: Box) -> Pixels:
        lead = () if self.channels is None else (self.channels,)
        return np.zeros((*lead, *box.shape), dtype=self.dtype)
