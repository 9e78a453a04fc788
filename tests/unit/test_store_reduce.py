import numpy as np
import pytest

from tilepipe.store import reduce_image, reduce_label


def slow_mean(fine):
    c, y, x = fine.shape
    coarse = np.empty((c, -(-y // 2), -(-x // 2)), fine.dtype)
    for index in np.ndindex(coarse.shape):
        k, i, j = index
        block = fine[k, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].astype(object).ravel()
        total, count = sum(int(v) for v in block), len(block)
        coarse[index] = (2 * total + count) // (2 * count)
    return coarse


def slow_mode(fine):
    y, x = fine.shape
    coarse = np.empty((-(-y // 2), -(-x // 2)), fine.dtype)
    for i, j in np.ndindex(coarse.shape):
        values, counts = np.unique(fine[2 * i : 2 * i + 2, 2 * j : 2 * j + 2], return_counts=True)
        coarse[i, j] = values[np.argmax(counts)]  # np.unique sorts: the smallest of the most
    return coarse


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("shape", [(3, 8, 10), (1, 7, 5), (2, 1, 1), (1, 1, 6), (1, 9, 1)])
def test_mean_is_rounded_half_up(dtype, shape):
    fine = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)
    np.testing.assert_array_equal(reduce_image(fine), slow_mean(fine))


def test_mean_of_the_extremes_does_not_overflow():
    for dtype in (np.uint8, np.uint16):
        full = np.full((1, 4, 4), np.iinfo(dtype).max, dtype)
        assert (reduce_image(full) == np.iinfo(dtype).max).all()
    assert reduce_image(np.array([[[0, 1], [0, 1]]], np.uint8)).item() == 1
    assert reduce_image(np.array([[[0, 1], [0, 0]]], np.uint8)).item() == 0


def test_float_mean_leaves_nan_out():
    nan = np.nan
    fine = np.array([[[1, 2, nan, 4, 5], [3, 4, nan, nan, nan]]], np.float32)
    coarse = reduce_image(fine)
    assert coarse.dtype == np.float32
    np.testing.assert_array_equal(coarse, np.array([[[2.5, 4.0, 5.0]]], np.float32))
    assert np.isnan(reduce_image(np.full((1, 3, 3), nan, np.float32))).all()


def test_float_infinities_do_not_warn():
    fine = np.array([[[np.inf, -np.inf], [1, 2]]], np.float32)
    assert np.isnan(reduce_image(fine)).all()
    largest = np.full((1, 2, 2), np.finfo(np.float32).max, np.float32)
    assert reduce_image(largest).item() == np.finfo(np.float32).max


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32"])
@pytest.mark.parametrize("shape", [(8, 10), (7, 5), (1, 1), (1, 6), (9, 1), (301, 203)])
def test_mode(dtype, shape):
    fine = np.random.default_rng(1).integers(0, 4, shape).astype(dtype)
    np.testing.assert_array_equal(reduce_label(fine), slow_mode(fine))


def test_every_arrangement_of_four_classes():
    fine = np.array(list(np.ndindex(4, 4, 4, 4)), np.uint8).reshape(-1, 2, 2)
    laid = fine.transpose(1, 0, 2).reshape(2, -1)  # blocks side by side
    np.testing.assert_array_equal(reduce_label(laid), slow_mode(laid))


def test_ties_go_to_the_smallest():
    assert reduce_label(np.array([[3, 1], [1, 3]], np.uint8)).item() == 1
    assert reduce_label(np.array([[9, 4], [7, 5]], np.uint8)).item() == 4
    assert reduce_label(np.array([[9, 4], [9, 5]], np.uint8)).item() == 9
    assert reduce_label(np.array([[-1, 5], [5, -1]], np.int32)).item() == -1


def test_bands_do_not_show():
    fine = np.random.default_rng(2).integers(0, 255, (1, 1200, 2050), np.uint8)
    parts = [reduce_image(fine[:, start : start + 2]) for start in range(0, 1200, 2)]
    np.testing.assert_array_equal(reduce_image(fine), np.concatenate(parts, axis=1))


def test_unit_by_unit_equals_the_whole():
    fine = np.random.default_rng(3).integers(0, 3, (137, 91)).astype(np.uint8)
    whole = reduce_label(fine)
    side = 19  # odd: a coarse unit is reduced from its 2 x 2 fine units at once
    for y in range(0, whole.shape[0], side):
        for x in range(0, whole.shape[1], side):
            piece = reduce_label(fine[2 * y : 2 * (y + side), 2 * x : 2 * (x + side)])
            np.testing.assert_array_equal(piece, whole[y : y + side, x : x + side])


def test_a_view_is_reduced_like_its_copy():
    fine = np.random.default_rng(4).integers(0, 255, (40, 60, 3), np.uint8).transpose(2, 0, 1)
    np.testing.assert_array_equal(reduce_image(fine), reduce_image(fine.copy()))


def test_other_dtypes_are_refused():
    with pytest.raises(TypeError, match="int16 have no 2x2 mean"):
        reduce_image(np.zeros((1, 2, 2), np.int16))
