"""``Damage``: the tiles that were filled of a slide, found again by where they lie."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

from tilepipe.tiling import Box

CELL_PX = 1024
"""Side of the squares under which tiles are kept: about that of a tile, of a unit a quarter."""
MOST_CELLS = 64
"""A tile under more of them is kept by itself: there are few, and a file may say any size."""


@dataclass(frozen=True, slots=True)
class DamagedTile:
    """A tile of the file that could not be decoded and was filled."""

    level: int
    index: int
    """Running number in the file's own table of tiles or strips."""
    box: Box
    """Level px."""
    reason: str


class Damage(Sequence[DamagedTile]):
    """Tiles in the order in which they were filled; threads add to it and look while others do."""

    def __init__(self) -> None:
        self._tiles: list[DamagedTile] = []
        self._known: set[DamagedTile] = set()
        self._cells: dict[tuple[int, int, int], list[DamagedTile]] = {}
        self._wide: list[DamagedTile] = []
        self._lock = threading.Lock()

    def add(self, tile: DamagedTile) -> None:
        """Take in a tile that was filled."""
        with self._lock:
            self._tiles.append(tile)
            self._known.add(tile)
            if _n_cells(tile.box) > MOST_CELLS:
                self._wide.append(tile)
                return
            for cell in _cells(tile.level, tile.box):
                self._cells.setdefault(cell, []).append(tile)

    def touching(self, level: int, box: Box) -> list[DamagedTile]:
        """Return the tiles of a level that have a px in ``box``, in the order of the file.

        Takes as long as there are tiles near the box, however many there are elsewhere.
        """
        found: dict[int, DamagedTile] = {}
        with self._lock:
            if _n_cells(box) > len(self._tiles):
                near = self._tiles[:]
            else:
                near = [t for cell in _cells(level, box) for t in self._cells.get(cell, ())]
                near += self._wide
        for tile in near:
            # By identity: two pages may have the same tile damaged for the same reason.
            if tile.level == level and tile.box.intersect(box).area > 0:
                found[id(tile)] = tile
        return sorted(found.values(), key=lambda tile: tile.index)

    def __contains__(self, tile: object) -> bool:
        """Tell whether this very tile was filled, for this reason."""
        return tile in self._known

    def __len__(self) -> int:
        """Count the tiles."""
        return len(self._tiles)

    def __iter__(self) -> Iterator[DamagedTile]:
        """Yield the tiles known by now."""
        return iter(self._tiles[:])

    @overload
    def __getitem__(self, index: int) -> DamagedTile: ...
    @overload
    def __getitem__(self, index: slice) -> list[DamagedTile]: ...
    def __getitem__(self, index: int | slice) -> DamagedTile | list[DamagedTile]:
        """Return tiles by the order in which they were filled."""
        return self._tiles[index]


def _n_cells(box: Box) -> int:
    reduced = box.reduced(CELL_PX)
    return reduced.area if box.area else 0


def _cells(level: int, box: Box) -> Iterator[tuple[int, int, int]]:
    if box.area == 0:
        return
    for iy in range(box.y0 // CELL_PX, (box.y1 - 1) // CELL_PX + 1):
        for ix in range(box.x0 // CELL_PX, (box.x1 - 1) // CELL_PX + 1):
            yield level, iy, ix
