"""``Damage``: what a unit touches of it is found by place, not by looking at all of it."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from tilepipe.pipeline.worker import _damage
from tilepipe.slide import Damage, DamagedTile
from tilepipe.tiling import Box, Grid

# A damaged file may say of a tile that it has any size.
SIDES = st.integers(0, 3000) | st.integers(0, 1 << 31)
BOXES = st.builds(
    lambda y, x, height, width: Box(y, x, y + height, x + width), SIDES, SIDES, SIDES, SIDES
)
TILES = st.builds(DamagedTile, st.integers(0, 1), st.integers(0, 50), BOXES, st.just("zeros"))


@given(st.lists(TILES, max_size=30), st.integers(0, 1), BOXES)
def test_what_touches_a_box_is_what_looking_at_all_finds(tiles, level, box):
    damage = Damage()
    for tile in tiles:
        damage.add(tile)
    found = damage.touching(level, box)
    all_of_it = [t for t in tiles if t.level == level and t.box.intersect(box).area > 0]
    assert sorted(map(str, found)) == sorted(map(str, all_of_it))
    assert [tile.index for tile in found] == sorted(tile.index for tile in all_of_it)
    assert list(damage) == tiles
    assert len(damage) == len(tiles)
    assert all(tile in damage for tile in tiles)
    assert damage[:] == tiles


def test_a_unit_looks_at_the_damage_near_it_alone():
    """A slide without one whole tile: 4096 of them under 256 units."""
    looked = []

    class Counted(Box):
        def intersect(self, other):
            looked.append(self)
            return super().intersect(other)

    class Hurt:
        damage = Damage()

    for number, tile in enumerate(Grid((64 * 256, 64 * 256), 256)):
        box = Counted(tile.box.y0, tile.box.x0, tile.box.y1, tile.box.x1)
        Hurt.damage.add(DamagedTile(0, number, box, "zeros"))
    units = list(Grid((64 * 256, 64 * 256), 1024))
    facts = [_damage(Hurt, unit, unit.box, level=0) for unit in units]
    assert [each["n_damaged"] for each in facts] == [16] * len(units)
    # Each tile lies in one square, for which one unit asks.
    assert len(looked) == len(Hurt.damage) == 4096
