"""What a network is shown of an image with another number of channels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilepipe.slide.shown import can_be_shown, reads_shown, shown
from tilepipe.tiling import Box


@given(st.sampled_from(["uint8", "uint16"]), st.integers(0, 2**32 - 1))
def test_luminance_of_integers_is_rounded(dtype, seed):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, np.iinfo(dtype).max, (3, 4, 5), dtype, endpoint=True)
    wanted = np.tensordot([0.299, 0.587, 0.114], pixels.astype(np.float64), axes=1)
    grey = shown(pixels, 1)
    assert grey.dtype == dtype
    assert grey.shape == (1, 4, 5)
    assert np.abs(grey[0] - wanted).max() <= 0.5 + 1e-9


def test_luminance_of_floats_and_of_grey():
    pixels = np.random.default_rng(0).normal(size=(3, 6, 7)).astype(np.float32)
    wanted = np.tensordot([0.299, 0.587, 0.114], pixels.astype(np.float64), axes=1)
    grey = shown(pixels, 1)
    assert grey.dtype == np.float32
    np.testing.assert_allclose(grey[0], wanted, atol=1e-6)
    for dtype in ("uint8", "uint16"):
        same = np.arange(np.iinfo(dtype).max + 1).astype(dtype).reshape(1, 16, -1)
        np.testing.assert_array_equal(shown(np.repeat(same, 3, axis=0), 1), same)


def test_a_pixel_is_shown_as_it_is_whatever_lies_around_it():
    pixels = np.random.default_rng(1).random((3, 37, 41)).astype(np.float32)
    whole = shown(pixels, 1)
    for box in Box.of_shape((37, 41)).split((5, 7)):
        read = reads_shown(lambda box: pixels[(slice(None), *box.slices)], 1)
        np.testing.assert_array_equal(read(box), whole[(slice(None), *box.slices)])


@pytest.mark.parametrize(
    ("have", "wanted", "can"),
    [(1, 1, True), (1, 4, True), (3, 3, True), (3, 1, True),
     (2, 1, False), (4, 1, False), (3, 2, False), (4, 3, False)],
)  # fmt: skip
def test_what_can_be_shown(have, wanted, can):
    assert can_be_shown(have, wanted) is can
    pixels = np.random.default_rng(2).integers(0, 255, (have, 3, 3), np.uint8)
    result = shown(pixels, wanted)
    assert (result.shape[0] == wanted) is can
    if not can or have == wanted:
        assert result is pixels
    if have == 1:
        assert all(np.array_equal(channel, pixels[0]) for channel in result)
