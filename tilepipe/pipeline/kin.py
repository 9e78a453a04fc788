"""Who lies above and under a unit in a pyramid of stages."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from tilepipe.tiling import Grid, Unit

Node = tuple[int, int]
"""(stage number, unit index)"""


def nothing(_: Unit) -> Iterable[Node]:
    """Say of a unit that there is none."""
    return ()


def parent(number: int, grid: Grid) -> Callable[[Unit], Iterable[Node]]:
    """Return what finds the unit above a unit: in ``grid``, that of stage ``number``."""
    return lambda unit: [(number, grid.index(unit.iy // 2, unit.ix // 2))]


def children(number: int, grid: Grid) -> Callable[[Unit], Iterable[Node]]:
    """Return what finds the up to four units under a unit, in the same way."""
    rows, columns = grid.shape
    return lambda unit: (
        (number, grid.index(iy, ix))
        for iy in range(2 * unit.iy, min(2 * unit.iy + 2, rows))
        for ix in range(2 * unit.ix, min(2 * unit.ix + 2, columns))
    )
