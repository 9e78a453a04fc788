"""2x2 reduction: the mean for images, the mode for labels. Odd sides use the pixels there are."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilepipe.buffers import empty

_BAND_BYTES = 1 << 20
"""Rows are reduced in bands of about this size, so that the intermediate sums stay in cache."""

_WIDER: dict[str, type[np.unsignedinteger[Any]]] = {"uint8": np.uint16, "uint16": np.uint32}


def reduce_image(fine: NDArray[Any]) -> NDArray[Any]:
    """Return the 2x2 mean: (c, y, x) uint8, uint16 or float32 -> (c, ceil(y/2), ceil(x/2)).

    Integers are rounded half up. The last row or column of an odd side is the mean of the two
    pixels (in the corner the one pixel) that are there. Floats: the mean of those that are not NaN,
    NaN where all four are.
    """
    reduce = _mean_float if fine.dtype.kind == "f" else _mean_integer
    return _banded(fine, reduce)


def reduce_label(fine: NDArray[Any]) -> NDArray[Any]:
    """Return the 2x2 mode: (y, x) of any integer dtype -> (ceil(y/2), ceil(x/2)).

    Of values that occur equally often the smallest wins, so no value appears that is not below and
    the result does not depend on anything but the four pixels. Instance ids are reduced in the
    same way.
    """
    return _banded(fine, _mode)


def _banded(fine: NDArray[Any], reduce: Any) -> NDArray[Any]:
    height, width = fine.shape[-2:]
    coarse = empty((*fine.shape[:-2], -(-height // 2), -(-width // 2)), fine.dtype)
    planes = fine.reshape((-1, height, width))
    targets = coarse.reshape((-1, *coarse.shape[-2:]))
    rows = max(2, _BAND_BYTES // max(1, width * fine.itemsize) // 2 * 2)
    for plane, target in zip(planes, targets, strict=True):
        for start in range(0, height, rows):
            band = _evened(plane[start : start + rows])
            target[start // 2 : start // 2 + band.shape[0] // 2] = reduce(band)
    return coarse


def _evened(band: NDArray[Any]) -> NDArray[Any]:
    """Repeat the last row or column of an odd side: the mean and the mode stay what they are."""
    height, width = band.shape
    if height % 2 or width % 2:
        return np.pad(band, ((0, height % 2), (0, width % 2)), mode="edge")
    return np.ascontiguousarray(band)


def _mean_integer(band: NDArray[Any]) -> NDArray[Any]:
    wider = _WIDER.get(band.dtype.name)
    if wider is None:
        raise TypeError(f"images of {band.dtype} have no 2x2 mean; use uint8, uint16 or float32")
    # A pair of neighbours is read as one integer of twice the width: contiguous, so it vectorises;
    # which of the two is the low half does not matter to a sum.
    pairs = band.view(wider)
    low = wider(np.iinfo(band.dtype).max)
    bits = wider(8 * band.itemsize)
    total = pairs[0::2] & low
    total += pairs[0::2] >> bits
    total += pairs[1::2] & low
    total += pairs[1::2] >> bits
    total += wider(2)
    total >>= wider(2)
    return total.astype(band.dtype)


def _mean_float(band: NDArray[Any]) -> NDArray[Any]:
    corners = band[0::2, 0::2], band[0::2, 1::2], band[1::2, 0::2], band[1::2, 1::2]
    a, b, c, d = corners
    quarter = band.dtype.type(0.25)
    with np.errstate(invalid="ignore"):  # inf - inf
        mean = a * quarter + b * quarter + (c * quarter + d * quarter)
    unclear = np.isnan(mean)
    if unclear.any():
        values = np.stack([corner[unclear] for corner in corners]).astype(np.float64)
        there = ~np.isnan(values)
        count = there.sum(axis=0)
        with np.errstate(invalid="ignore", divide="ignore"):
            mean[unclear] = np.where(there, values, 0.0).sum(axis=0) / count
    return mean


def _mode(band: NDArray[Any]) -> NDArray[Any]:
    top, bottom = band[0::2], band[1::2]
    # Where two rows and two columns agree, as they do nearly everywhere, nothing is to decide.
    a, b = np.ascontiguousarray(top[:, 0::2]), np.ascontiguousarray(top[:, 1::2])
    if np.array_equal(top, bottom) and np.array_equal(a, b):
        return a
    c, d = np.ascontiguousarray(bottom[:, 0::2]), np.ascontiguousarray(bottom[:, 1::2])
    low0, high0 = np.minimum(a, b), np.maximum(a, b)
    low1, high1 = np.minimum(c, d), np.maximum(c, d)
    first, last = np.minimum(low0, low1), np.maximum(high0, high1)
    inner0, inner1 = np.maximum(low0, low1), np.minimum(high0, high1)
    second, third = np.minimum(inner0, inner1), np.maximum(inner0, inner1)
    # Sorted, equal values are neighbours: the first equal pair is the smallest value that occurs
    # at least twice, and three of a kind leave no other pair. Chosen by arithmetic, which wraps
    # around: choosing by a mask takes four times as long where the mask is noise.
    is_not_first = first != second
    is_second = second == third
    is_third = is_not_first & ~is_second & (third == last)
    second -= first
    third -= first
    second *= is_not_first & is_second
    third *= is_third
    first += second
    first += third
    return first
