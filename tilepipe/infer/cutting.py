"""How the engine cuts what it has read into tiles and batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from numpy.typing import NDArray

from tilepipe.tiling import Box, Shape, Tile, TilePlan
from tilepipe.tiling.plan import legal_input

CHECK_SKIPPED = 64
"""One in so many of the tiles that are skipped as empty is run all the same."""


def hull_of(tiles: Sequence[Tile]) -> Box:
    """Return the smallest box that holds what the tiles read."""
    return Box(
        min(tile.padded.y0 for tile in tiles),
        min(tile.padded.x0 for tile in tiles),
        max(tile.padded.y1 for tile in tiles),
        max(tile.padded.x1 for tile in tiles),
    )


def cut(pixels: NDArray[Any], hull: Box, box: Box) -> NDArray[Any]:
    """Return the view of ``box`` in pixels (c, y, x) whose corner is the hull's."""
    rows, columns = box.shift(-hull.y0, -hull.x0).slices
    return pixels[:, rows, columns]


def trimmed(plan: TilePlan, tiles: Sequence[Tile], *, least_px: int, step_px: int) -> list[Tile]:
    """Make the inputs of clipped cores smaller, tiles of one shape side by side.

    In float32 the shape of a tile does not change a label (tests/seams), and at the borders of a
    slide this saves most of the work.
    """

    def side_of(core_px: int) -> int:
        wanted = core_px + 2 * plan.halo_px
        return min(plan.input_px, legal_input(wanted, least_px=least_px, step_px=step_px))

    smaller = []
    for tile in tiles:
        height, width = (side_of(side) for side in tile.core.shape)
        y0, x0 = tile.padded.y0, tile.padded.x0
        smaller.append(Tile(tile.core, Box(y0, x0, y0 + height, x0 + width)))
    return sorted(smaller, key=_shape_of)


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


def is_checked(plan: TilePlan, tile: Tile) -> bool:
    """Choose about one tile in ``CHECK_SKIPPED``, by its place alone: the same on resume."""
    row, column = tile.core.y0 // plan.core_px, tile.core.x0 // plan.core_px
    mixed = ((row + 1) * 2654435761 + (column + 1) * 2246822519) >> 8
    return mixed % CHECK_SKIPPED == 0
