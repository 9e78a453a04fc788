"""The weight map against the formula written out, pixel by pixel and cell by cell."""

import numpy as np
import pytest

from tilepipe.errors import TrainError
from tilepipe.train.weight_map import (
    balanced,
    border_term,
    influence_px,
    iter_weight_map,
    two_distances,
    weight_map,
)


def random_cells(rng, shape, count):
    labels = np.zeros(shape, np.int32)
    yy, xx = np.mgrid[: shape[0], : shape[1]]
    for number in range(1, count + 1):
        y, x, r = rng.integers(shape[0]), rng.integers(shape[1]), rng.integers(1, 7)
        labels[(yy - y) ** 2 + (xx - x) ** 2 <= r * r] = number * 3
    return labels


def brute_force(labels, class_weights, w0, sigma):
    """The paper's formula: all distances from every pixel to every pixel of every cell."""
    ids = [i for i in np.unique(labels) if i]
    positions = np.argwhere(np.ones(labels.shape, bool)).astype(float)
    distances = []
    for number in ids:
        cell = np.argwhere(labels == number).astype(float)
        gaps = ((positions[:, None] - cell[None]) ** 2).sum(-1)
        distances.append(np.sqrt(gaps.min(1)))
    result = np.where(labels > 0, class_weights[1], class_weights[0]).astype(float)
    if len(ids) >= 2:
        nearest = np.sort(np.stack(distances), axis=0)
        term = w0 * np.exp(-((nearest[0] + nearest[1]) ** 2) / (2 * sigma**2))
        result += term.reshape(labels.shape)
    return result


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("w0", "sigma"), [(10.0, 5.0), (3.0, 2.0)])
def test_equals_the_formula(seed, w0, sigma):
    rng = np.random.default_rng(seed)
    labels = random_cells(rng, (int(rng.integers(20, 60)), int(rng.integers(20, 60))), 1 + 2 * seed)
    got = weight_map(labels, class_weights=(0.7, 1.3), w0=w0, sigma=sigma)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, brute_force(labels, (0.7, 1.3), w0, sigma), rtol=0, atol=1e-9)


def test_two_touching_pixels_by_hand():
    labels = np.array([[1, 2, 0, 0]])
    near, second = two_distances(labels, reach_px=9)
    assert near.tolist() == [[0, 0, 1, 2]]
    assert second.tolist() == [[1, 1, 2, 3]]
    np.testing.assert_allclose(
        border_term(labels)[0], 10 * np.exp(-np.array([1, 1, 9, 25]) / 50), atol=1e-12
    )


def test_one_cell_has_no_border_term():
    labels = np.zeros((9, 9), int)
    labels[4, 4] = 5
    assert not border_term(labels).any()
    assert not border_term(np.zeros((4, 4), int)).any()


@pytest.mark.parametrize("piece_px", [17, 64])
def test_pieces_equal_the_whole(piece_px):
    labels = random_cells(np.random.default_rng(3), (150, 131), 40)
    whole = weight_map(labels, class_weights=(1.0, 2.0))
    pieced = np.full(labels.shape, np.nan)
    pieces = iter_weight_map(
        lambda box: labels[box.slices], labels.shape, class_weights=(1.0, 2.0), piece_px=piece_px
    )
    for box, values in pieces:
        pieced[box.slices] = values
    np.testing.assert_array_equal(pieced, whole)


def test_balanced_classes_weigh_the_same():
    labels = np.zeros((10, 10), int)
    labels[:3, :5] = 1
    values = weight_map(labels)
    assert values[labels > 0].sum() == pytest.approx(values[labels == 0].sum())
    assert values.mean() == pytest.approx(1.0)
    assert balanced(0.0) == (1.0, 1.0)


def test_influence_is_where_the_term_vanishes():
    assert influence_px(w0=0.0) == 0
    reach = influence_px()
    assert 10 * np.exp(-(reach**2) / 50) <= 1e-11 < 10 * np.exp(-((reach - 1) ** 2) / 50)
    with pytest.raises(TrainError, match="sigma > 0"):
        influence_px(sigma=0)
