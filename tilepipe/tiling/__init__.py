"""Integer geometry: boxes, tiles, mirrored context, the plan and its bill."""

from tilepipe.tiling.box import Box, Shape, round_up
from tilepipe.tiling.grid import Grid, Unit
from tilepipe.tiling.mirror import mirror_index, mirror_source, read_mirrored
from tilepipe.tiling.plan import Tile, TilePlan, plan_tiles

__all__ = [
    "Box",
    "Grid",
    "Shape",
    "Tile",
    "TilePlan",
    "Unit",
    "mirror_index",
    "mirror_source",
    "plan_tiles",
    "read_mirrored",
    "round_up",
]
