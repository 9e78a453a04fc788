"""``Maps``: what the tiles of a box become: class ids and, if asked for, their probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilepipe.buffers import empty
from tilepipe.infer.backends import BatchResult
from tilepipe.tiling import Box, Tile


@dataclass(frozen=True, slots=True)
class UnitResult:
    """What became of one unit."""

    ids: NDArray[np.uint8]
    """Class ids (y, x) of the unit's box."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Plain values: precision, backend, tiles, seconds per step, and, where it happened, ``oom``
    (how often memory ran out), ``oom_events`` (what was made smaller), ``redone_fp32``,
    ``not_finite_px``, ``tiles_skipped`` (whole ones), ``skipped_px`` (theirs and the empty parts
    of others), with it ``computed`` (what was run, as ``boxes_json`` tells it; of blended tiles,
    which overlap, ``skipped``: those that were not), and of what was skipped and run all the same
    ``skipped_checked_px`` and ``skipped_lost_px`` (px that are not background)."""
    probabilities: NDArray[np.uint8] | None = None
    """Quantised probabilities (classes - 1, y, x), 0 in skipped tiles; None: not asked for."""


@dataclass(frozen=True, slots=True)
class Maps:
    """Maps of one box, put together from pieces; 0 where none was put."""

    box: Box
    ids: NDArray[np.uint8]
    """(y, x)"""
    probabilities: NDArray[np.uint8] | None
    """(classes - 1, y, x), or None."""

    @classmethod
    def empty(cls, box: Box, *, channels: int) -> Maps:
        """Return maps of 0; ``channels`` 0: no probabilities."""
        planes = _zeros((channels, *box.shape)) if channels else None
        return cls(box, _zeros(box.shape), planes)

    def put_tiles(self, tiles: Sequence[Tile], result: BatchResult) -> None:
        """Put the cores of a batch where they belong."""
        values = result.values.numpy()
        planes = None if result.probabilities is None else result.probabilities.numpy()
        for place, tile in enumerate(tiles):
            height, width = tile.core.shape
            target = tile.core.shift(-self.box.y0, -self.box.x0).slices
            self.ids[target] = values[place, :height, :width]
            if self.probabilities is not None and planes is not None:
                self.probabilities[(..., *target)] = planes[place, :, :height, :width]

    def put(self, part: Maps) -> None:
        """Put the maps of a box inside this one."""
        target = part.box.shift(-self.box.y0, -self.box.x0).slices
        self.ids[target] = part.ids
        if self.probabilities is not None and part.probabilities is not None:
            self.probabilities[(..., *target)] = part.probabilities


def _zeros(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    zeros = empty(shape, np.uint8)
    zeros[...] = 0
    return zeros
