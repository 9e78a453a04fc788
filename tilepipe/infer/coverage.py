"""``Coverage``: what of a unit was computed and what was skipped as empty, for its record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilepipe.infer.cutting import tile_of
from tilepipe.tiling import Box, Tile, TilePlan

CHECK_SKIPPED = 64
"""One in so many of the tiles that are skipped as empty is run all the same."""
MOST_BOXES = 256
"""A record of a unit holds no more."""


class Coverage:
    """Adds up the tiles of one unit."""

    def __init__(self, plan: TilePlan, box: Box) -> None:
        self.box = box
        self.n_tiles = 0
        """Tiles of which at least a part was computed."""
        self.computed: list[Box] = []
        """Cores."""
        self.skipped: list[Box] = []
        """Cores of which all or a part was not computed."""
        self._plan = plan
        self._n_skipped = 0
        self._checked_px = self._lost_px = 0

    def add(self, tile: Tile, parts: Sequence[Box]) -> list[Tile]:
        """Take in a tile and the parts of its core that are not empty; return what is to be run."""
        self.n_tiles += bool(parts)
        self._n_skipped += not parts
        self.computed += parts
        if _is_whole(tile, parts):
            return [tile]
        self.skipped.append(tile.core)
        return [tile_of(self._plan, part) for part in parts]

    def wants_check(self, tile: Tile, parts: Sequence[Box]) -> bool:
        """Tell whether a tile is run although it, or a part of it, is empty."""
        return not _is_whole(tile, parts) and is_checked(self._plan, tile)

    def check(self, tile: Tile, parts: Sequence[Box], ids: NDArray[np.uint8]) -> None:
        """Take in the class ids (y, x) that the whole core would have had."""
        core = tile.core
        self._checked_px += core.area - sum(part.area for part in parts)
        self._lost_px += int(np.count_nonzero(ids)) - sum(
            int(np.count_nonzero(ids[part.shift(-core.y0, -core.x0).slices])) for part in parts
        )

    def facts(self, *, looks_for_empty: bool) -> dict[str, Any]:
        """Return what the unit's record holds of it; ``maps.UnitResult`` says what is what."""
        facts: dict[str, Any] = {"tiles": self.n_tiles}
        if looks_for_empty:
            facts["tiles_skipped"] = self._n_skipped
        if self._checked_px:
            facts["skipped_checked_px"] = self._checked_px
            facts["skipped_lost_px"] = self._lost_px
        if self.skipped:
            facts["skipped_px"] = self.box.area - covered_px(self.computed, self.box)
            if self._plan.mode == "blended":
                # Tiles overlap: what a skipped one covers is not all there.
                facts["skipped"] = boxes_json(self.skipped)
            else:
                facts["computed"] = boxes_json(self.computed)
        return facts


def _is_whole(tile: Tile, parts: Sequence[Box]) -> bool:
    return list(parts) == [tile.core]


def is_checked(plan: TilePlan, tile: Tile) -> bool:
    """Choose about one tile in ``CHECK_SKIPPED``, by its place alone: the same on resume."""
    row, column = tile.core.y0 // plan.core_px, tile.core.x0 // plan.core_px
    mixed = ((row + 1) * 2654435761 + (column + 1) * 2246822519) >> 8
    return mixed % CHECK_SKIPPED == 0


def covered_px(boxes: Sequence[Box], whole: Box) -> int:
    """Count the px of ``whole`` under ``boxes``, which may overlap."""
    covered = np.zeros(whole.shape, np.bool_)
    for box in boxes:
        covered[box.intersect(whole).shift(-whole.y0, -whole.x0).slices] = True
    return int(np.count_nonzero(covered))


def boxes_json(boxes: Sequence[Box]) -> list[list[int]] | None:
    """Return boxes as a record holds them: (y0, x0, y1, x1) px; None where they are too many."""
    if len(boxes) > MOST_BOXES:
        return None
    return [[box.y0, box.x0, box.y1, box.x1] for box in boxes]


def boxes_of(values: Any) -> list[Box] | None:
    """Read what ``boxes_json`` made, as untrusted input; ValueError if it is not that."""
    if values is None:
        return None
    if not isinstance(values, list) or len(values) > MOST_BOXES:
        raise ValueError("no list of boxes")
    boxes = []
    for value in values:
        if not isinstance(value, list) or len(value) != 4 or {type(n) for n in value} != {int}:
            raise ValueError(f"{str(value)[:80]} is no box")
        boxes.append(Box(*value))
    return boxes
