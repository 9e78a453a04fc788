"""How the engine cuts what it has read into tiles and batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilepipe.models import Model
from tilepipe.spec import LARGEST_PIXEL
from tilepipe.tiling import Box, Shape, Tile, TilePlan, read_mirrored, round_up
from tilepipe.tiling.plan import legal_input

Skip = Callable[[Box], bool]
"""Tells of a box of the level, which may leave it, whether it holds nothing to segment."""

CELL_PX = 64
"""Empty borders of a core are left out in steps of about this."""
_PAYS = 0.95
"""Two tiles for one must save more than the batches and the seams cost."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Which inputs a tile smaller than the plan's may have."""

    least_px: int
    step_px: int
    """Legal sides are ``least_px + k * step_px`` (``Locality`` of the model)."""
    most_share: float = 1.0
    """Of the plan's input px: what would take more is run whole."""

    def shape(self, plan: TilePlan, core: Box) -> Shape:
        """Return the sides (y, x) of the input for a core."""
        height, width = (self._side(plan, side) for side in core.shape)
        if height * width > self.most_share * plan.input_px**2:
            return plan.input_px, plan.input_px
        return height, width

    def _side(self, plan: TilePlan, core_px: int) -> int:
        wanted = core_px + 2 * plan.halo_px
        side = legal_input(wanted, least_px=self.least_px, step_px=self.step_px)
        return min(plan.input_px, side)

    def area(self, plan: TilePlan, core: Box) -> int:
        """Return the px of the input for a core."""
        height, width = self.shape(plan, core)
        return height * width


def sizes_of(model: Model, backend: str) -> Sizes:
    """Return the inputs that a back-end takes beside the plan's."""
    return Sizes(
        model.locality.least_input_px,
        max(1, model.locality.input_step_px),
        # OpenVINO has a second network for them: more memory, and slower with some models.
        most_share=0.8 if backend == "openvino" else 1.0,
    )


def has_small_cores(plan: TilePlan, sizes: Sizes) -> bool:
    """Tell whether some core is clipped so far that its input is smaller than the plan's."""
    rows, columns = plan.grid.shape
    corners = {plan.grid.unit(iy, ix) for iy in (0, rows - 1) for ix in (0, columns - 1)}
    side = plan.input_px
    return any(
        sizes.shape(plan, tile.core) != (side, side)
        for unit in corners
        for tile in plan.tiles(unit.box)
    )


def hull_of(tiles: Sequence[Tile]) -> Box:
    """Return the smallest box that holds what the tiles read."""
    return Box(
        min(tile.padded.y0 for tile in tiles),
        min(tile.padded.x0 for tile in tiles),
        max(tile.padded.y1 for tile in tiles),
        max(tile.padded.x1 for tile in tiles),
    )


def read_finite(
    read: Callable[[Box], NDArray[Any]], box: Box, extent: Shape
) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
    """Read ``box`` of a level, mirrored outside, as every network is shown it.

    Numbers that are not finite or beyond ``LARGEST_PIXEL``, of pixels without data, are 0: they
    would spoil all within the context. Returns the pixels (c, y, x) and which had such a number
    (y, x), None if none had.
    """
    pixels = read_mirrored(read, box, extent)
    if pixels.dtype.kind != "f":
        return pixels, None
    wrong = ~(np.abs(pixels) <= LARGEST_PIXEL)  # of NaN this is true
    if not wrong.any():
        return pixels, None
    return np.where(wrong, pixels.dtype.type(0), pixels), wrong.any(axis=0)


def cut(pixels: NDArray[Any], hull: Box, box: Box) -> NDArray[Any]:
    """Return the view of ``box`` in pixels (c, y, x) whose corner is the hull's."""
    rows, columns = box.shift(-hull.y0, -hull.x0).slices
    return pixels[:, rows, columns]


def trimmed(plan: TilePlan, tiles: Sequence[Tile], sizes: Sizes) -> list[Tile]:
    """Make the inputs of small cores smaller, tiles of one shape side by side.

    Only where the shape of a tile does not change a bit of its result (``infer/shapes.py``): at
    the borders of a slide and of its tissue this saves most of the work.
    """
    smaller = []
    for tile in tiles:
        height, width = sizes.shape(plan, tile.core)
        y0, x0 = tile.padded.y0, tile.padded.x0
        smaller.append(Tile(tile.core, Box(y0, x0, y0 + height, x0 + width)))
    return sorted(smaller, key=_shape_of)


def tile_of(plan: TilePlan, core: Box) -> Tile:
    """Return the tile of a core, or of a part of one that begins on the alignment."""
    y0, x0 = core.y0 - plan.halo_px, core.x0 - plan.halo_px
    return Tile(core, Box(y0, x0, y0 + plan.input_px, x0 + plan.input_px))


def wanted_parts(plan: TilePlan, core: Box, skip: Skip, sizes: Sizes) -> list[Box]:
    """Return disjoint parts of a core that hold all of it that is not empty, given its context.

    They begin on the alignment, seen from the core's corner. Empty borders are left out; a core
    is halved, at most twice, where that saves input px.
    """
    cell = round_up(CELL_PX, plan.alignment_px)

    def is_empty(box: Box) -> bool:
        return skip(box.grow(plan.context_px))

    def shrunk(box: Box) -> Box | None:
        y0, x0, y1, x1 = box.y0, box.x0, box.y1, box.x1
        while y0 < y1 and is_empty(Box(y0, x0, min(y0 + cell, y1), x1)):
            y0 += cell
        if y0 >= y1:
            return None
        while y1 - y0 > cell and is_empty(Box(_last(y0, y1, cell), x0, y1, x1)):
            y1 = _last(y0, y1, cell)
        while x1 - x0 > cell and is_empty(Box(y0, x0, y1, x0 + cell)):
            x0 += cell
        while x1 - x0 > cell and is_empty(Box(y0, _last(x0, x1, cell), y1, x1)):
            x1 = _last(x0, x1, cell)
        return Box(y0, x0, y1, x1)

    def best(box: Box, halvings: int) -> list[Box]:
        whole = shrunk(box)
        if whole is None:
            return []
        found, found_px = [whole], sizes.area(plan, whole)
        if not halvings:
            return found
        for halves in _halves(whole, cell):
            left = [shrunk(half) for half in halves]
            if left == list(halves):
                continue  # nothing can be left out
            parts = [part for half in halves for part in best(half, halvings - 1)]
            parts_px = sum(sizes.area(plan, part) for part in parts)
            if parts_px < _PAYS * found_px:
                found, found_px = parts, parts_px
        return found

    return best(core, 2)


def _last(start: int, stop: int, step: int) -> int:
    """Return where the last of the steps from ``start`` to ``stop`` begins."""
    return start + (stop - start - 1) // step * step


def _halves(box: Box, cell: int) -> Iterator[tuple[Box, Box]]:
    """Cut a box across and along, in whole cells from its corner."""
    height, width = box.shape
    if height > cell:
        y = box.y0 + round_up(height // 2, cell)
        if y < box.y1:
            yield Box(box.y0, box.x0, y, box.x1), Box(y, box.x0, box.y1, box.x1)
    if width > cell:
        x = box.x0 + round_up(width // 2, cell)
        if x < box.x1:
            yield Box(box.y0, box.x0, box.y1, x), Box(box.y0, x, box.y1, box.x1)


def groups(tiles: Sequence[Tile], batch: int) -> Iterator[Sequence[Tile]]:
    """Cut the tiles into batches of one shape each, keeping their order."""
    for _, same in groupby(tiles, key=_shape_of):
        alike = list(same)
        for start in range(0, len(alike), batch):
            yield alike[start : start + batch]


def _shape_of(tile: Tile) -> Shape:
    return tile.padded.shape


def seen_by(plan: TilePlan, tile: Tile) -> Box:
    """Return the px that may change what a tile writes."""
    return tile.padded if plan.mode == "blended" else tile.core.grow(plan.context_px)
