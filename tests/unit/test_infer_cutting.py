"""What of a core is computed: all that is not empty, in few px; and what a record says of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from tilepipe.infer.coverage import MOST_BOXES, boxes_json, boxes_of, covered_px
from tilepipe.infer.cutting import (
    Sizes,
    tile_of,
    trimmed,
    wanted_parts,
)
from tilepipe.infer.recompute import computed_px
from tilepipe.tiling import Box, plan_tiles


def plan_of(core_px=512, *, context_px=40, unit_px=1024, extent=(2048, 2048)):
    return plan_tiles(
        extent,
        unit_px=unit_px,
        context_px=context_px,
        alignment_px=16,
        margin_px=0,
        least_input_px=32,
        input_step_px=16,
        input_px=core_px + 2 * 48,
    )


SIZES = Sizes(32, 16)


def skip_of(full):
    """What asks a mask (y, x) of full px; outside of it there is nothing."""

    def skip(box: Box) -> bool:
        inside = box.intersect(Box.of_shape(full.shape))
        return not full[inside.slices].any()

    return skip


@st.composite
def fields(draw):
    """A level of a few rectangles of tissue."""
    full = np.zeros((700, 640), bool)
    for _ in range(draw(st.integers(0, 4))):
        y, x = draw(st.integers(0, 699)), draw(st.integers(0, 639))
        full[y : y + draw(st.integers(1, 300)), x : x + draw(st.integers(1, 300))] = True
    return full


@given(fields(), st.sampled_from([1.0, 0.8, 0.3]))
@settings(max_examples=150, deadline=None)
def test_every_px_that_sees_tissue_is_in_one_part_and_no_more_is_run_than_before(full, share):
    plan = plan_of()
    sizes = replace(SIZES, most_share=share)
    core = Box(64, 32, 64 + plan.core_px, 32 + plan.core_px - 7)
    parts = wanted_parts(plan, core, skip_of(full), sizes)
    times = np.zeros((1200, 1200), np.uint8)
    for part in parts:
        assert core.contains(part)
        assert (part.y0 - core.y0) % plan.alignment_px == (part.x0 - core.x0) % 16 == 0
        times[part.slices] += 1
    assert times.max(initial=0) <= 1
    # The square around each px of tissue is what sees it.
    sees = np.zeros((1200, 1200), bool)
    sees[: full.shape[0], : full.shape[1]] = full
    sees = ndimage.binary_dilation(sees, np.ones((3, 3), bool), iterations=plan.context_px)
    inside = np.zeros_like(sees)
    inside[core.slices] = True
    assert not (sees & inside & (times == 0)).any()
    assert sum(sizes.area(plan, part) for part in parts) <= sizes.area(plan, core)


def test_a_strip_an_l_and_two_corners():
    plan = plan_of()
    core = Box(0, 0, 512, 512)
    full = np.zeros((512, 512), bool)
    full[:, :100] = True
    assert wanted_parts(plan, core, skip_of(full), SIZES) == [Box(0, 0, 512, 192)]
    full[400:] = True
    parts = wanted_parts(plan, core, skip_of(full), SIZES)
    assert len(parts) == 2
    assert sum(part.area for part in parts) < 0.7 * core.area
    corners = np.zeros((512, 512), bool)
    corners[:20, :20] = corners[-20:, -20:] = True
    parts = wanted_parts(plan, core, skip_of(corners), SIZES)
    assert sorted(parts) == [Box(0, 0, 64, 64), Box(448, 448, 512, 512)]
    assert wanted_parts(plan, core, lambda _: True, SIZES) == []
    assert wanted_parts(plan, core, lambda _: False, SIZES) == [core]


def test_what_would_hardly_be_smaller_is_run_whole():
    plan = plan_of()
    sizes = Sizes(32, 16, most_share=0.8)
    assert sizes.shape(plan, Box(0, 0, 512, 320)) == (608, 416)
    assert sizes.shape(plan, Box(0, 0, 512, 448)) == (608, 608)
    small, large = (tile_of(plan, Box(0, 0, 512, side)) for side in (320, 448))
    assert [tile.padded.shape for tile in trimmed(plan, [large, small], sizes)] == [
        (608, 416), (608, 608),
    ]  # fmt: skip


@given(st.lists(st.tuples(*[st.integers(-50, 500)] * 4), max_size=5))
def test_boxes_of_a_record_come_back(corners):
    boxes = [Box(min(a, c), min(b, d), max(a, c), max(b, d)) for a, b, c, d in corners]
    assert boxes_of(boxes_json(boxes)) == boxes


def test_too_many_boxes_are_not_recorded_and_nonsense_is_told():
    assert boxes_json([Box(0, 0, 1, 1)] * (MOST_BOXES + 1)) is None
    assert boxes_of(None) is None
    for wrong in ("all", [[1, 2, 3]], [[0, 0, 1, True]], [[0, 0, 1.5, 2]], [[5, 0, 1, 1]], [1],
                  [[0, 0, 1, 1]] * (MOST_BOXES + 1)):  # fmt: skip
        with pytest.raises(ValueError, match="box"):
            boxes_of(wrong)


def test_what_the_journal_says_was_computed():
    plan = plan_of(unit_px=1024)
    facts = {(0, 0): {"computed": [[0, 0, 1024, 512]]}, (1, 0): {"computed": None}, (0, 1): {}}
    box = Box(1000, 500, 1050, 1100)
    stored = np.zeros(box.shape, np.uint8)
    stored[40, 10] = 2  # of the unit below, of which only the foreground is compared
    stored[5, 100] = 1  # skipped, says the journal, and yet not background
    computed = computed_px(plan, box, facts, stored)
    expected = np.zeros(box.shape, bool)
    expected[:24, :12] = True
    expected[:24, 524:] = True
    expected[24:, 524:] = True
    expected[40, 10] = expected[5, 100] = True
    np.testing.assert_array_equal(computed, expected)


def test_of_blended_tiles_what_a_skipped_one_covers_is_not_compared():
    plan = replace(plan_of(unit_px=1024), mode="blended")
    facts = {(0, 0): {"skipped": [[0, 0, 1024, 512]]}, (1, 0): {"skipped": None}}
    box = Box(1000, 500, 1050, 1100)
    computed = computed_px(plan, box, facts, np.ones(box.shape, np.uint8))
    expected = np.ones(box.shape, bool)
    expected[:24, :12] = False
    expected[24:, :524] = False
    np.testing.assert_array_equal(computed, expected)


def test_px_under_boxes_that_overlap_count_once():
    assert covered_px([Box(0, 0, 4, 4), Box(2, 2, 9, 3), Box(8, 8, 9, 9)], Box(1, 0, 6, 6)) == 14
