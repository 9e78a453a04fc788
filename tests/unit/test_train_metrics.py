"""Metrics against values worked out by hand and against brute force."""

import itertools
from collections import Counter

import numpy as np
import pytest
from scipy import ndimage

from tilepipe.spec import distinct_names
from tilepipe.tiling import Box
from tilepipe.train import em
from tilepipe.train.cells import NO_CELLS, THRESHOLDS, count_cells
from tilepipe.train.em import best_threshold, rand_error, simple_points, warp, warping_error
from tilepipe.train.evaluate import LabelImage, evaluate
from tilepipe.train.metrics import (
    class_score,
    confusion,
    foreground_dice,
    merge_foreground,
    pixel_error,
)
from tilepipe.train.overlap import OverlapCounter, shared_px


def test_class_scores_by_hand():
    truth = np.array([[0, 0, 1, 1], [2, 2, 1, 0]])
    found = np.array([[0, 1, 1, 1], [2, 0, 0, 0]])
    counts = confusion(found, truth, 3)
    assert counts.tolist() == [[2, 1, 0], [1, 2, 0], [1, 0, 1]]
    one = class_score(counts, 1)
    assert (one.dice, one.iou) == (pytest.approx(4 / 6), pytest.approx(2 / 4))
    assert (one.precision, one.recall) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
    assert pixel_error(counts) == pytest.approx(3 / 8)
    assert merge_foreground(counts).tolist() == [[2, 1], [2, 3]]
    assert np.isnan(class_score(confusion(found, truth, 5), 4).dice)
    assert confusion(found, truth, 3, ignore=0).sum() == 5
    assert foreground_dice(counts) == pytest.approx(6 / 9)
    assert foreground_dice(confusion(np.zeros(3, int), np.zeros(3, int), 2)) == 1.0


def test_cells_by_hand():
    truth = np.zeros((10, 30), int)
    truth[:, :10], truth[:, 10:20] = 4, 9
    found = np.zeros((10, 30), int)
    found[:, :9] = 1  # IoU 0.9 with 4
    found[:6, 10:20] = 2  # IoU 0.6 with 9
    found[:, 25:] = 3
    counts = count_cells(found, truth)
    assert (counts.truth, counts.predicted) == (2, 3)
    assert dict(zip(THRESHOLDS, counts.matched, strict=True)) == {
        0.5: 2, 0.55: 2, 0.6: 2, 0.65: 1, 0.7: 1, 0.75: 1, 0.8: 1, 0.85: 1, 0.9: 1, 0.95: 0,
    }  # fmt: skip
    assert counts.f1() == pytest.approx(4 / 5)
    assert counts.ap() == pytest.approx(2 / 3)
    assert (counts + NO_CELLS) == counts
    assert NO_CELLS.f1() == 1.0


def test_half_of_a_cell_is_not_the_cell():
    truth = np.ones((4, 4), int)
    halves = np.repeat([[1, 1, 2, 2]], 4, axis=0)
    assert count_cells(halves, truth).matched[0] == 0


def brute_rand(predicted, truth):
    """All pairs of pixels inside true cells; membrane pixels are each a segment of their own."""
    t = ndimage.label(truth)[0].ravel()
    p = ndimage.label(predicted)[0].ravel()
    alone = itertools.count(10_000)
    p = np.array([x or next(alone) for x in p])[t > 0]
    t = t[t > 0]
    same_t, same_p = t[:, None] == t[None], p[:, None] == p[None]
    precision = (same_t & same_p).sum() / same_p.sum()
    recall = (same_t & same_p).sum() / same_t.sum()
    return 1 - 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize("seed", range(4))
def test_rand_error_equals_all_pairs(seed):
    rng = np.random.default_rng(seed)
    truth, found = rng.random((18, 17)) < 0.7, rng.random((18, 17)) < 0.7
    assert rand_error(found, truth) == pytest.approx(brute_rand(found, truth), abs=1e-12)


def test_rand_error_knows_splits_and_mergers():
    truth = np.ones((9, 9), bool)
    truth[:, 4] = False
    assert rand_error(truth, truth) == 0.0
    assert rand_error(np.ones((9, 9), bool), truth) > 0.3
    outside = truth.copy()
    outside[3, 4] = True  # joins the two: a merger of topology
    assert rand_error(outside, truth) > 0.3
    # No true cell is no case: found or not, nothing can be said.
    assert np.isnan(rand_error(truth, np.zeros((9, 9), bool)))
    assert np.isnan(rand_error(np.zeros((9, 9), bool), np.zeros((9, 9), bool)))


def components(mask):
    return ndimage.label(mask)[1], ndimage.label(~np.pad(mask, 1), structure=np.ones((3, 3)))[1]


@pytest.mark.parametrize("seed", range(3))
def test_simple_points_are_those_that_keep_the_topology(seed):
    rng = np.random.default_rng(seed)
    mask = rng.random((9, 9)) < 0.6
    simple = simple_points(mask)
    before = components(mask)
    for y, x in np.argwhere(simple):
        flipped = mask.copy()
        flipped[y, x] ^= True
        assert components(flipped) == before


def test_warping_ignores_shifts_and_counts_topology():
    truth = np.zeros((20, 20), bool)
    truth[2:18, 2:8] = truth[2:18, 11:18] = True
    shifted = np.roll(truth, 2, axis=1)
    assert (shifted != truth).any()
    assert warping_error(shifted, truth) == 0.0
    assert components(warp(truth, shifted)) == components(truth)
    merged = truth.copy()
    merged[10, 8:11] = True
    # A bridge of three pixels: two grow from the cells, the last one joins them.
    assert warping_error(merged, truth) == pytest.approx(1 / 400)
    hole = truth.copy()
    hole[5, 3] = False
    assert warping_error(hole, truth) == pytest.approx(1 / 400)


@pytest.mark.parametrize("seed", range(20))
def test_bending_looks_at_what_may_bend_and_is_that_of_whole_sweeps(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 40, 2))
    noise = (ndimage.gaussian_filter(rng.random(shape), seed % 3) for _ in range(2))
    truth, found = (values > np.quantile(values, rng.random()) for values in noise)
    bent, before = truth.copy(), None
    while not np.array_equal(bent, before):
        before = bent.copy()
        for y, x in ((0, 0), (0, 1), (1, 0), (1, 1)):
            bent[y::2, x::2] ^= ((bent != found) & simple_points(bent))[y::2, x::2]
    looks = []
    monkeypatch.setattr(em, "simple_points", lambda mask: looks.append(0) or simple_points(mask))
    np.testing.assert_array_equal(warp(truth, found), bent)
    assert len(looks) == 1  # at the whole; of a large mask each look takes seconds


def test_best_threshold_finds_the_cut():
    truth = np.ones((9, 9), bool)
    truth[:, 4] = False
    values = np.where(truth, 0.9, 0.7)
    assert best_threshold(values, truth, np.array([0.5, 0.8])) == 0.8


@pytest.mark.parametrize("box_px", [7, 16, 100])
@pytest.mark.parametrize("seed", range(2))
def test_overlap_by_boxes_equals_the_whole(seed, box_px):
    rng = np.random.default_rng(seed)
    found, truth = (ndimage.uniform_filter(rng.random((40, 53)), 3) > 0.5 for _ in range(2))
    counter = OverlapCounter(found.shape)
    for box in Box.of_shape(found.shape).split((box_px, box_px)):
        counter.add(found[box.slices], truth[box.slices], box)
    got = counter.result()
    f, t = ndimage.label(found)[0], ndimage.label(truth)[0]
    assert sorted(got.predicted.values()) == sorted(np.bincount(f.ravel())[1:])
    assert sorted(got.truth.values()) == sorted(np.bincount(t.ravel())[1:])
    pairs = np.unique(np.stack([t[t > 0], f[t > 0]]), axis=1, return_counts=True)[1]
    assert sorted(got.shared.values()) == sorted(pairs)


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (1, 40), (30, 20)])
@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64, np.uint64])
def test_shared_px_are_counted_by_pair(shape, dtype, monkeypatch):
    rng = np.random.default_rng(0)
    ids = np.array([0, 1, 7, np.iinfo(dtype).max // 2], dtype)
    first, second = (np.repeat(rng.choice(ids, shape), 3, axis=1) for _ in range(2))
    wanted = Counter(zip(first.ravel().tolist(), second.ravel().tolist(), strict=True))
    sort, sorted_px = np.lexsort, []
    monkeypatch.setattr(np, "lexsort", lambda keys: sorted_px.append(len(keys[0])) or sort(keys))
    assert list(shared_px(first, second).items()) == sorted(wanted.items())
    assert sum(sorted_px) <= first.size / 3


def test_classes_of_one_name_have_a_score_each():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, (40, 50)).astype(np.uint8)
    found = np.where(truth == 1, 0, truth).astype(np.uint8)
    names = ("background", "cell", "cell")
    images = [
        LabelImage(k, (40, 50), ids.dtype, lambda box, ids=ids: ids[box.slices], names)
        for k, ids in (("found", found), ("truth", truth))
    ]
    scores = evaluate(*images).classes
    assert list(scores) == ["background", "cell (1)", "cell (2)"]
    assert (scores["cell (1)"].dice, scores["cell (2)"].dice) == (0, 1)


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (("background", "tumour", "stroma"), "1 is 'stroma' and 'tumour', 2 is 'tumour' and"),
        (("background", "Stroma", "tumour"), None),  # as it is called in the other
        (("", "class 1", "class 2", "cell"), None),  # no names, and no such px
        ((), None),
    ],
)
def test_classes_of_another_order_are_told(names, told):
    ids = np.tile(np.arange(3, dtype=np.uint8), (6, 2))
    found, truth = (
        LabelImage(k, ids.shape, ids.dtype, lambda box: ids[box.slices], mine)
        for k, mine in (("found", ("background", "stroma", "tumour", "x")), ("truth", names))
    )
    notes = evaluate(found, truth).notes
    assert [told in note for note in notes] == ([True] if told else [])


@pytest.mark.parametrize(
    ("found", "truth", "kind", "told"),
    [
        ([1, 0, 1, 0, 1], [1, 0, 1, 0, 1], "auto", True),  # a mask of wide integers
        ([255, 0, 255, 0, 0], [1, 0, 1, 0, 0], "auto", True),
        ([2, 0, 1, 0, 1], [2, 0, 1, 0, 1], "auto", True),
        ([2, 0, 1, 0, 1], [2, 0, 1, 0, 1], "instances", False),
        ([2, 0, 1, 0, 1], [2, 0, 1, 0, 3], "auto", False),
        ([1, 0, 0, 0, 0], [1, 0, 0, 0, 0], "auto", False),
        ([1, 0, 0, 0, 1], [0, 0, 0, 0, 0], "auto", False),
    ],
)
def test_wide_ids_that_may_be_classes_are_told(found, truth, kind, told):
    sides = np.array([found], np.uint8), np.array([truth], np.uint16)
    images = [
        LabelImage("side", ids.shape, ids.dtype, lambda box, ids=ids: ids[box.slices])
        for ids in sides
    ]
    notes = evaluate(*images, truth_kind=kind).notes
    assert ["--truth-kind classes" in note for note in notes] == [True] * told
    notes = evaluate(*images[::-1], predicted_kind=kind).notes
    assert ["--pred-kind classes" in note for note in notes] == [True] * told


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ((), ()),
        (("a", "b"), ("a", "b")),
        (("a", "b", "a"), ("a (0)", "b", "a (2)")),
        (("a", "a", "a (0)"), ("a (0) (0)", "a (1)", "a (0) (2)")),
    ],
)
def test_names_that_are_told_apart(names, told):
    assert distinct_names(names) == told
