"""``TilePlan``: how one level is cut into write units and tiles so that the result is exact."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tilepipe.errors import PlanError
from tilepipe.tiling.box import Box, Shape, round_up
from tilepipe.tiling.grid import Grid

Mode = Literal["exact", "two-pass", "blended"]


@dataclass(frozen=True, slots=True)
class Tile:
    """Unit of inference."""

    core: Box
    """Level px this tile writes; cores never overlap."""
    padded: Box
    """Level px this tile reads, always ``TilePlan.input_px`` a side; may leave the image."""


@dataclass(frozen=True, slots=True)
class TilePlan:
    """The cut of one level. All tiles of a plan have one input size, so nothing recompiles.

    Exact modes: the cores of a unit are cut from the unit's corner, so tile starts are multiples
    of the alignment and a unit never needs another unit's tiles. Blended mode: tiles stand on one
    fixed grid of stride ``core_px`` over the whole level whatever the units, and overlap.
    """

    mode: Mode
    extent: Shape
    """Level px (y, x)."""
    unit_px: int
    """Side of a write unit."""
    core_px: int
    """Side of what a tile writes; in blended mode the stride of the tile grid."""
    halo_px: int
    """Px read beyond the core on the top and left, at least the context."""
    margin_px: int
    """Px per side that the network itself consumes (92 for the valid U-Net, 0 if padded)."""
    input_px: int
    """Side of a tile's input."""
    alignment_px: int
    context_px: int

    @property
    def crop_px(self) -> int:
        """Px between the network's output corner and the core's corner."""
        return self.halo_px - self.margin_px

    @property
    def output_px(self) -> int:
        """Side of the network's output for a tile."""
        return self.input_px - 2 * self.margin_px

    @property
    def grid(self) -> Grid:
        """The write units."""
        return Grid(self.extent, self.unit_px)

    @property
    def halo_overhead(self) -> float:
        """Input px per output px: 1.0 would be no overhead."""
        return (self.input_px / self.core_px) ** 2

    def tiles(self, box: Box) -> Iterator[Tile]:
        """Tiles whose cores cover ``box``, a unit's box.

        In blended mode: every tile of the fixed grid whose output touches the box.
        """
        if self.mode != "blended":
            for core in box.split((self.core_px, self.core_px)):
                y0, x0 = core.y0 - self.halo_px, core.x0 - self.halo_px
                yield Tile(core, Box(y0, x0, y0 + self.input_px, x0 + self.input_px))
            return
        # A grid tile k covers output [k*stride - crop, k*stride - crop + output).
        for oy in self._grid_starts(box.y0, box.y1):
            for ox in self._grid_starts(box.x0, box.x1):
                out = Box(oy, ox, oy + self.output_px, ox + self.output_px)
                yield Tile(out.intersect(box), out.grow(self.margin_px))

    def _grid_starts(self, start: int, stop: int) -> range:
        first = (start + self.crop_px - self.output_px) // self.core_px + 1
        last = (stop - 1 + self.crop_px) // self.core_px
        return range(
            first * self.core_px - self.crop_px,
            last * self.core_px - self.crop_px + 1,
            self.core_px,
        )

    def n_tiles(self, box: Box) -> int:
        """Tiles that ``tiles(box)`` yields."""
        if self.mode == "blended":
            return sum(1 for _ in self.tiles(box))
        y, x = box.shape
        return -(-y // self.core_px) * -(-x // self.core_px)

    def footprint(self, box: Box) -> Box:
        """Level px, inside the extent, that the tiles of unit ``box`` read."""
        tiles = list(self.tiles(box))
        hull = Box(
            min(t.padded.y0 for t in tiles),
            min(t.padded.x0 for t in tiles),
            max(t.padded.y1 for t in tiles),
            max(t.padded.x1 for t in tiles),
        )
        inside = hull.intersect(Box.of_shape(self.extent))
        # Mirrored pixels beyond a border lie inside it, within the same distance.
        y0, x0, y1, x1 = inside.y0, inside.x0, inside.y1, inside.x1
        height, width = self.extent
        if hull.y0 < 0:
            y1 = max(y1, min(height, 1 - hull.y0))
        if hull.x0 < 0:
            x1 = max(x1, min(width, 1 - hull.x0))
        if hull.y1 > height:
            y0 = min(y0, max(0, 2 * height - hull.y1 - 1))
        if hull.x1 > width:
            x0 = min(x0, max(0, 2 * width - hull.x1 - 1))
        return Box(y0, x0, y1, x1)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain values, as the store records it."""
        return {**asdict(self), "extent": list(self.extent)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TilePlan:
        """Read what ``to_json`` wrote; PlanError if it is not that."""
        try:
            plan = cls(**{**values, "extent": (int(values["extent"][0]), int(values["extent"][1]))})
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise PlanError(f"a recorded plan cannot be read: {error}") from error
        return plan


def legal_input(wanted_px: int, *, least_px: int, step_px: int) -> int:
    """Return the smallest legal input side >= ``wanted_px`` among ``least_px + k * step_px``."""
    if wanted_px <= least_px:
        return least_px
    return least_px + round_up(wanted_px - least_px, step_px)


def plan_tiles(
    extent: Shape,
    *,
    unit_px: int,
    context_px: int,
    alignment_px: int,
    margin_px: int,
    least_input_px: int,
    input_step_px: int,
    input_px: int | None = None,
    halo_px: int | None = None,
    mode: Mode = "exact",
) -> TilePlan:
    """Plan the tiles of a level of ``extent`` (y, x) px.

    ``input_px`` is the tile's input side as the user gives it (572 is the paper's), or None for
    one tile per unit. ``halo_px`` widens the halo; in blended mode it may be less than the context.

    Raises PlanError where unit, tile and network cannot meet; the message does the arithmetic.
    """
    if min(extent) < 1:
        raise PlanError(f"an image of {extent[0]} x {extent[1]} px has nothing to segment")
    if unit_px < 1 or unit_px % alignment_px:
        raise PlanError(
            f"a write unit of {unit_px} px is not a multiple of the network's alignment "
            f"{alignment_px} px; use --unit {round_up(max(unit_px, 1), alignment_px)}"
        )
    crop_px = round_up(max(0, context_px - margin_px), alignment_px)
    least_halo_px = margin_px + crop_px
    halo = (
        least_halo_px
        if halo_px is None
        else margin_px + round_up(max(0, halo_px - margin_px), alignment_px)
    )
    if mode != "blended" and halo < least_halo_px:
        halo = least_halo_px
    if input_px is None:
        # One tile for a small image, not a unit's worth of mirrored pixels.
        core = min(unit_px, round_up(max(extent), alignment_px))
        side = legal_input(core + 2 * halo, least_px=least_input_px, step_px=input_step_px)
    else:
        side = input_px
        if side < least_input_px or (side - least_input_px) % input_step_px:
            raise PlanError(
                f"the network cannot take a tile of {side} px; the next legal one is --tile "
                f"{legal_input(side, least_px=least_input_px, step_px=input_step_px)}"
            )
        core = (side - 2 * halo) // alignment_px * alignment_px
        if core < 1:
            needed = legal_input(
                2 * halo + alignment_px, least_px=least_input_px, step_px=input_step_px
            )
            raise PlanError(
                f"a tile of {side} px leaves no core: the halo takes 2 x {halo} px; "
                f"use --tile {needed} or more"
            )
        if mode != "blended":
            core = min(core, unit_px)
    return TilePlan(
        mode=mode,
        extent=extent,
        unit_px=unit_px,
        core_px=core,
        halo_px=halo,
        margin_px=margin_px,
        input_px=side,
        alignment_px=alignment_px,
        context_px=context_px,
    )
