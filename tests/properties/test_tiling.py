"""Geometry: cores partition, context is mirrored exactly, one writer per unit."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilepipe.errors import PlanError
from tilepipe.tiling import (
    Box,
    Grid,
    TilePlan,
    mirror_index,
    plan_tiles,
    read_mirrored,
    round_up,
)
from tilepipe.tiling.grid import level_extents
from tilepipe.tiling.mirror import mirror_source
from tilepipe.tiling.plan import legal_input

extents = st.tuples(st.integers(1, 90), st.integers(1, 90))


@st.composite
def plans(draw, mode="exact"):
    """A plan of a padded or a valid network with any core, halo and unit."""
    alignment = draw(st.sampled_from([1, 2, 4, 16]))
    context = draw(st.integers(0, 40))
    margin = draw(st.sampled_from([0, context]))
    least = max(alignment, 2 * margin + draw(st.integers(1, 8)))
    tile = draw(st.one_of(st.none(), st.integers(1, 120)))
    if tile is not None:
        halo = margin + round_up(max(0, context - margin), alignment)
        tile = legal_input(2 * halo + alignment + tile, least_px=least, step_px=alignment)
    return plan_tiles(
        draw(extents),
        unit_px=alignment * draw(st.integers(2, 20)),
        context_px=context,
        alignment_px=alignment,
        margin_px=margin,
        least_input_px=least,
        input_step_px=alignment,
        input_px=tile,
        mode=mode,
    )


@given(plans())
def test_cores_partition_the_extent(plan):
    seen = np.zeros(plan.extent, np.uint8)
    for unit in plan.grid:
        for tile in plan.tiles(unit.box):
            assert unit.box.contains(tile.core)
            seen[tile.core.slices] += 1
    assert np.all(seen == 1)


@given(plans())
def test_padded_is_core_and_halo(plan):
    for unit in list(plan.grid)[:4]:
        tiles = list(plan.tiles(unit.box))
        assert len(tiles) == plan.n_tiles(unit.box)
        for tile in tiles:
            assert tile.padded.shape == (plan.input_px, plan.input_px)
            assert tile.padded.contains(tile.core.grow(plan.context_px))
            # Starts keep the pooling phase of the whole image.
            assert (tile.padded.y0 + plan.halo_px) % plan.alignment_px == 0
            assert (tile.padded.x0 + plan.halo_px) % plan.alignment_px == 0
            # What the network puts out covers the core.
            out = tile.padded.grow(-plan.margin_px)
            assert out.contains(tile.core)
            assert (tile.core.y0 - out.y0, tile.core.x0 - out.x0) == (plan.crop_px, plan.crop_px)


@given(plans(mode="blended"))
def test_blended_tiles_stand_on_one_grid_and_cover(plan):
    seen = np.zeros(plan.extent, np.int64)
    starts = set()
    for unit in plan.grid:
        for tile in plan.tiles(unit.box):
            assert tile.padded.shape == (plan.input_px, plan.input_px)
            starts.add((tile.padded.y0 % plan.core_px, tile.padded.x0 % plan.core_px))
            seen[tile.core.slices] += 1
    assert np.all(seen >= 1)
    assert len(starts) == 1


@given(plans())
def test_footprint_holds_all_that_is_read(plan):
    extent = Box.of_shape(plan.extent)
    for unit in list(plan.grid)[:4]:
        footprint = plan.footprint(unit.box)
        assert extent.contains(footprint)
        for tile in plan.tiles(unit.box):
            assert footprint.contains(tile.padded.intersect(extent))
            assert footprint.contains(mirror_source(tile.padded.intersect(unit.box.grow(
                plan.halo_px)), plan.extent))  # fmt: skip


@given(plans())
def test_plan_survives_json(plan):
    assert TilePlan.from_json(plan.to_json()) == plan


@given(st.integers(1, 40), st.integers(-200, 200), st.integers(0, 200))
def test_mirror_index_is_numpys_reflection(length, start, count):
    before, after = max(0, -start), max(0, start + count - length)
    padded = np.pad(np.arange(length), (before, after), mode="reflect")
    expected = padded[start + before : start + before + count]
    assert mirror_index(start, start + count, length).tolist() == expected.tolist()


@given(extents, st.integers(-80, 80), st.integers(-80, 80), st.integers(1, 90), st.integers(1, 90))
def test_read_mirrored_equals_padding_once(extent, y, x, height, width):
    image = np.arange(2 * extent[0] * extent[1], dtype=np.int32).reshape(2, *extent)
    reads = []

    def read(box):
        assert Box.of_shape(extent).contains(box)
        reads.append(box)
        return image[(slice(None), *box.slices)]

    got = read_mirrored(read, Box(y, x, y + height, x + width), extent)
    rows = mirror_index(y, y + height, extent[0])
    columns = mirror_index(x, x + width, extent[1])
    assert len(reads) == 1
    assert np.array_equal(got, image[:, rows[:, None], columns])


@given(extents, st.integers(4, 64))
def test_grid_units_partition_and_number(extent, unit_px):
    grid = Grid(extent, unit_px)
    seen = np.zeros(extent, np.uint8)
    for number, unit in enumerate(grid):
        assert grid.index(unit.iy, unit.ix) == number
        seen[unit.box.slices] += 1
    assert np.all(seen == 1)
    assert len(grid) == grid.shape[0] * grid.shape[1]


@given(extents, st.integers(1, 64), st.integers(-50, 350), st.integers(-50, 350))
def test_touching_is_exactly_the_overlap(extent, unit_px, y, x):
    grid = Grid(extent, unit_px)
    box = Box(y, x, y + 40, x + 70)
    touched = {(unit.iy, unit.ix) for unit in grid.touching(box)}
    wanted = {(u.iy, u.ix) for u in grid if u.box.intersect(box).area}
    assert touched == wanted


def test_the_papers_tile_writes_384_of_388():
    plan = plan_tiles(
        (2000, 2000), unit_px=2048, context_px=92, alignment_px=16, margin_px=92,
        least_input_px=188, input_step_px=16, input_px=572,
    )  # fmt: skip
    assert (plan.output_px, plan.core_px, plan.halo_px) == (388, 384, 92)


def test_an_impossible_tile_names_the_next_one():
    facts = {
        "unit_px": 512, "context_px": 92, "alignment_px": 16, "margin_px": 92,
        "least_input_px": 188, "input_step_px": 16,
    }  # fmt: skip
    with pytest.raises(PlanError, match="--tile 572"):
        plan_tiles((900, 900), input_px=570, **facts)
    with pytest.raises(PlanError, match=r"leaves no core.*--tile 204"):
        plan_tiles((900, 900), input_px=188, **facts)
    with pytest.raises(PlanError, match="--unit 112"):
        plan_tiles((900, 900), **{**facts, "unit_px": 100})


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_levels_halve_rounded_up_to_one_small_one(height, width):
    levels = level_extents((height, width))
    assert levels[0] == (height, width)
    assert max(levels[-1]) <= 512
    for fine, coarse in itertools.pairwise(levels):
        assert coarse == (-(-fine[0] // 2), -(-fine[1] // 2))
        assert max(fine) > 512
