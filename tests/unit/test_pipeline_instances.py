"""Objects found unit by unit are those of the whole image, numbered in the same order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from tilepipe.errors import StoreError
from tilepipe.pipeline.cells import Rule, find_cells
from tilepipe.pipeline.joining import (
    join_cells,
    pack_cells,
    pack_numbers,
    unpack_cells,
    unpack_numbers,
)
from tilepipe.spec import LabelClass, default_classes
from tilepipe.tiling import Box, Grid
from tilepipe.tiling.growth import grow_into
from tilepipe.train.dataset import Teaching
from tilepipe.train.targets import BORDER_CLASSES, FOREGROUND_CLASSES, separate
from tilepipe.train.validate import to_cells

BORDER = Rule(2, least_px=12)
PLAIN = Rule(None)


def by_units(mask, unit_px, rule):
    """The instances of a mask cut into units, through the files between the steps."""
    grid = Grid(mask.shape, unit_px)

    def cells_of(unit):
        seen = unit.box.grow(rule.halo_px).intersect(Box.of_shape(mask.shape))
        return find_cells(mask[seen.slices], unit.box, mask.shape, rule)

    def load(unit):
        return unpack_cells(pack_cells(cells_of(unit)), unit, mask.shape, rule)

    count, shares = join_cells(grid, load, rule)
    out = np.full(mask.shape, -1, np.int32)
    for unit, numbers in shares:
        cells = cells_of(unit)
        assert numbers.fits(cells)
        out[unit.box.slices] = unpack_numbers(pack_numbers(numbers), cells).paint(cells)
    return count, out


def test_a_line_of_objects_on_every_border_is_cut_nowhere():
    mask = np.zeros((96, 130), np.uint8)
    for edge in range(16, 96, 16):
        mask[edge - 2 : edge + 2, 3:125:8] = 1
        mask[edge - 2 : edge + 2, 4:125:8] = 1
    for edge in range(16, 130, 16):
        mask[1:95:5, edge - 3 : edge + 3] = 1
    whole, n = ndimage.label(mask)
    for unit_px in (16, 32, 7, 200):
        count, ids = by_units(mask, unit_px, PLAIN)
        assert count == n
        np.testing.assert_array_equal(ids, whole)


def test_one_object_that_winds_through_every_unit():
    mask = np.zeros((64, 64), np.uint8)
    mask[::4] = 1
    mask[1::8, -1] = mask[2::8, -1] = mask[3::8, -1] = 1
    mask[5::8, 0] = mask[6::8, 0] = mask[7::8, 0] = 1
    count, ids = by_units(mask, 16, PLAIN)
    assert count == 1
    np.testing.assert_array_equal(ids, mask)


def test_pixels_that_meet_at_a_corner_only_are_two_objects():
    mask = np.zeros((8, 8), np.uint8)
    mask[3, 3] = mask[4, 4] = 1
    assert by_units(mask, 4, PLAIN)[0] == 2


def test_classes_are_told_apart():
    mask = np.zeros((20, 20), np.uint8)
    mask[5:15, 5:10] = 1
    mask[5:15, 10:15] = 3
    count, ids = by_units(mask, 10, PLAIN)
    assert count == 2
    assert set(ids[mask == 1]) == {1}
    assert set(ids[mask == 3]) == {2}


@given(
    seed=st.integers(0, 10**6),
    sides=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    unit_px=st.integers(2, 23),
    share=st.floats(0.2, 0.8),
)
def test_random_masks_have_the_regions_that_scipy_finds(seed, sides, unit_px, share):
    generator = np.random.default_rng(seed)
    mask = (generator.random(sides) < share).astype(np.uint8)
    whole, n = ndimage.label(mask)
    count, ids = by_units(mask, unit_px, PLAIN)
    assert count == n
    np.testing.assert_array_equal(ids, whole)


@given(
    seed=st.integers(0, 10**6),
    sides=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    unit_px=st.integers(3, 31),
    smooth=st.sampled_from([0.0, 0.7, 1.5]),
    levels=st.tuples(st.floats(0.3, 0.9), st.floats(0.05, 0.6)),
    least_px=st.sampled_from([1, 12]),
)
def test_a_border_class_separates_as_training_does_on_the_whole_image(
    seed, sides, unit_px, smooth, levels, least_px
):
    generator = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(generator.random(sides), smooth)
    low = np.quantile(field, levels[0])
    mask = np.where(field > low, 2, 0).astype(np.uint8)
    inner = field[field > low]
    if inner.size:
        mask[field > np.quantile(inner, levels[1])] = 1
    whole = separate(mask, min_area_px=least_px)
    count, ids = by_units(mask, unit_px, Rule(2, least_px=least_px))
    assert count == whole.max()
    np.testing.assert_array_equal(ids, whole)


@pytest.mark.parametrize("target", ["foreground", "foreground+border"])
@pytest.mark.parametrize("seed", range(3))
def test_training_counts_the_objects_that_run_makes(target, seed):
    taught = BORDER_CLASSES if target == "foreground+border" else FOREGROUND_CLASSES
    field = ndimage.gaussian_filter(np.random.default_rng(seed).random((60, 70)), 0.8)
    mask = np.digitize(field, np.quantile(field, (0.6, 0.8))[: len(taught) - 1]).astype(np.uint8)
    cells = to_cells(mask, Teaching(target=target, n_classes=len(taught)))
    count, ids = by_units(mask, 16, Rule.of_classes(taught))
    assert cells.max() == count > 5
    np.testing.assert_array_equal(ids, cells)


@pytest.mark.parametrize("border", [1, 2, 3])
def test_a_border_between_objects_of_several_classes(border):
    mask = np.random.default_rng(border).integers(0, 4, (30, 40)).repeat(3, 0).astype(np.uint8)
    count, ids = by_units(mask, 16, Rule(border, least_px=12))
    assert count > 5
    np.testing.assert_array_equal(ids, separate(mask, border=border))


def test_a_blob_of_border_whose_nucleus_lies_units_away_is_no_object():
    mask = np.zeros((12, 80), np.uint8)
    mask[5:8, 2:70] = 2
    mask[5:8, 71:75] = 1
    mask[6, 70] = 2
    count, ids = by_units(mask, 10, BORDER)
    assert count == 1
    np.testing.assert_array_equal(ids, separate(mask))
    assert (ids[:, :60] == 0).all()
    mask[mask == 1] = 0
    count, ids = by_units(mask, 10, BORDER)
    assert (count, set(ids[mask == 2])) == (1, {1})


def test_growth_takes_the_nearest_and_among_equals_the_first():
    ids = np.array([[1, 0, 0, 0, 2, 0, 0, 0, 0]])
    ring = np.ones(ids.shape, bool)
    assert grow_into(ids, ring, reach_px=3).tolist() == [[1, 1, 1, 2, 2, 2, 2, 2, 0]]
    assert grow_into(ids, ring, reach_px=1).tolist() == [[1, 1, 0, 2, 2, 2, 0, 0, 0]]
    assert grow_into(ids, ids == 9, reach_px=3).tolist() == ids.tolist()


def test_the_rule_follows_the_names_of_the_classes():
    assert Rule.of_classes(default_classes(3)).border is None
    named = [LabelClass(name=n, color=(0, 0, 0, 0)) for n in ("background", "Nucleus", "Border")]
    rule = Rule.of_classes(named)
    assert (rule.border, rule.least_px, rule.halo_px) == (2, 12, 3)
    assert rule.to_json()["reach_px"] == 3


def test_what_units_tell_is_read_as_input_that_may_be_damaged():
    mask = np.random.default_rng(0).integers(0, 3, (30, 30)).astype(np.uint8)
    unit = Grid(mask.shape, 16).unit(0, 0)
    seen = unit.box.grow(3).intersect(Box.of_shape(mask.shape))
    cells = find_cells(mask[seen.slices], unit.box, mask.shape, BORDER)
    raw = pack_cells(cells)
    for place in range(0, len(raw), 7):
        hurt = bytearray(raw)
        hurt[place] ^= 4
        with pytest.raises(StoreError):
            unpack_cells(bytes(hurt), unit, mask.shape, BORDER)
    for cut in (0, 3, 16, 40, len(raw) - 1):
        with pytest.raises(StoreError):
            unpack_cells(raw[:cut], unit, mask.shape, BORDER)
    with pytest.raises(StoreError):
        unpack_cells(raw, Grid(mask.shape, 16).unit(1, 1), mask.shape, BORDER)
    with pytest.raises(StoreError):
        unpack_cells(raw, unit, mask.shape, PLAIN)
