"""Targets from cells, and cells back from class ids."""

import numpy as np
import pytest
from scipy import ndimage

from tilepipe.errors import TrainError
from tilepipe.train.targets import border_target, edge_distance, make_target, separate


def discs(shape, places):
    labels = np.zeros(shape, np.int32)
    yy, xx = np.mgrid[: shape[0], : shape[1]]
    for number, (y, x, r) in enumerate(places, start=1):
        labels[(yy - y) ** 2 + (xx - x) ** 2 <= r * r] = number
    return labels


TOUCHING = [(20, 14, 9), (20, 32, 9), (45, 30, 7), (0, 50, 8)]


def test_edge_distance_is_that_of_each_cell_alone():
    labels = discs((60, 60), TOUCHING)
    labels[30:34, 5:20] = 7
    labels[34:38, 5:20] = 9
    got = edge_distance(labels, reach_px=5)
    for number in np.unique(labels)[1:]:
        own = labels == number
        alone = ndimage.distance_transform_edt(own)
        near = own & (alone <= 5)
        np.testing.assert_array_equal(got[near], alone[near])
        assert (got[own & ~near] > 5).all()
    assert (got[labels == 0] == 0).all()


def test_edge_distance_of_a_full_image_is_infinite():
    assert np.isinf(edge_distance(np.ones((5, 6), int), reach_px=3)).all()
    halves = np.repeat([[1, 1, 1, 2, 2, 2]], 4, axis=0)
    assert edge_distance(halves, reach_px=3)[0].tolist() == [3, 2, 1, 1, 2, 3]


def test_border_is_inside_and_together_with_nuclei_is_the_cell():
    labels = discs((60, 60), TOUCHING)
    target = border_target(labels)
    np.testing.assert_array_equal(target != 0, labels != 0)
    assert target[20, 14] == 1
    # The ring lies between touching cells, and not where the image cuts a cell.
    assert (target[20, 22:25] == 2).all()
    assert target[0, 50] == 1
    assert border_target(np.zeros((4, 4), int)).max() == 0


def test_small_cells_keep_a_nucleus():
    labels = np.zeros((30, 30), np.int32)
    labels[3:7, 3:7] = 1
    labels[10:12, 10:12] = 2
    labels[20, 20] = 3
    target = border_target(labels, ring_px=3)
    for number in (1, 2, 3):
        own = labels == number
        assert (target[own] == 1).sum() >= 0.25 * own.sum(), number


def test_cells_come_back_from_their_target():
    labels = discs((60, 60), TOUCHING)
    cells = separate(border_target(labels))
    assert cells.max() == 4
    for number in range(1, 5):
        own = labels == number
        mine = np.bincount(cells[own]).argmax()
        both = (own & (cells == mine)).sum()
        assert both / (own | (cells == mine)).sum() > 0.97
    assert cells.dtype == np.int32


def test_separate_by_hand():
    classes = np.array(
        [
            [1, 1, 2, 2, 1, 1, 0, 0],
            [1, 1, 2, 2, 1, 1, 0, 2],
            [0, 0, 0, 0, 0, 0, 0, 2],
        ]
    )
    cells = separate(classes, min_area_px=2)
    assert cells[0].tolist() == [1, 1, 1, 2, 2, 2, 0, 0]
    # A blob of border alone is a cell too small for a nucleus.
    assert cells[2].tolist() == [0, 0, 0, 0, 0, 0, 0, 3]
    assert separate(classes, min_area_px=3).max() == 2
    # Without a border, and by another number of it, each other class is one of insides.
    alone = separate(classes, border=None, min_area_px=1)
    assert alone[0].tolist() == [1, 1, 2, 2, 3, 3, 0, 0]
    turned = np.array([0, 3, 1])[classes]
    assert np.array_equal(separate(turned, border=1, min_area_px=2), cells)
    turned[:2, 4:6] = 2
    assert np.array_equal(separate(turned, border=1, min_area_px=2), cells)


def test_make_target_says_when_ids_are_too_many():
    labels = np.array([[0, 7]])
    assert make_target(labels, "foreground", n_classes=2).tolist() == [[0, 1]]
    assert make_target(labels, "classes", n_classes=8).tolist() == [[0, 7]]
    with pytest.raises(TrainError, match="class ids 0, 7; the network has 3 classes"):
        make_target(labels, "classes", n_classes=3)
