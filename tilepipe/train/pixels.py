"""Pixels of annotated images as training sees them: the numbers that ``run`` sees."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilepipe.errors import TrainError
from tilepipe.infer.network import divisor_of
from tilepipe.slide.shown import shown
from tilepipe.spec import LARGEST_PIXEL
from tilepipe.tiling import Box
from tilepipe.train.ids import read_labels
from tilepipe.train.images import Pair, Raster, open_pair
from tilepipe.train.targets import make_target

_SMALL_INTEGERS = (np.dtype(np.int8), np.dtype(np.int16))
_BYTES = 255.0
"""Full scale of uint8."""
_SPAN_SHARE = 0.005
_SPAN_SIDE_PX = 256


def read_pixels(raster: Raster, box: Box) -> NDArray[Any]:
    """(c, y, x) pixels of a box; TrainError where they are no numbers to learn from."""
    pixels = raster.read(box)
    if pixels.dtype.kind != "f":
        return pixels
    # NaN passes through the smallest and the largest, and is below nothing.
    lowest, highest = float(pixels.min()), float(pixels.max())
    if not -LARGEST_PIXEL <= lowest <= highest <= LARGEST_PIXEL:
        raise TrainError(
            f"{raster.path}: holds NaN, infinity or numbers beyond {LARGEST_PIXEL:g}; give these "
            "pixels a value, or leave the image out with --exclude"
        )
    return pixels


def to_share(pixels: NDArray[Any], *, channels: int) -> NDArray[np.float32]:
    """(c, y, x) pixels -> (channels, y, x) float32 as ``run`` gives them to the normalisation.

    uint8 and uint16 become shares of full scale; other kinds have none and stay as they are. A
    grey image fills every channel of a colour network; colour becomes luminance for one channel.
    Raises TrainError where channels cannot be matched.
    """
    whole = divisor_of(pixels.dtype) != 1.0 or pixels.dtype in _SMALL_INTEGERS
    if not whole and pixels.dtype.kind != "f":
        raise TrainError(f"images of dtype {pixels.dtype}; uint8, uint16, int16 or float wanted")
    divisor = divisor_of(pixels.dtype)
    planes = shown(pixels if divisor != 1.0 else pixels.astype(np.float32), channels)
    if planes.shape[0] != channels:
        raise TrainError(f"images of {planes.shape[0]} channels for a network of {channels}")
    return planes.astype(np.float32) / np.float32(divisor)


def span_of(pixels: NDArray[Any]) -> tuple[float, float] | None:
    """Between which numbers of ``to_share`` nearly all (c, y, x) pixels lie; None for uint8.

    What is a small and a large change only the image can tell where numbers have no full scale,
    and where it says nothing: cameras of 10 to 14 bits fill a corner of uint16, and a shift by some
    hundredths of full scale would leave of their images nothing but black.
    A few hot or dead pixels do not tell: the outermost 0.5 % to each side are left out.
    """
    divisor = divisor_of(pixels.dtype)
    if divisor == _BYTES:
        return None
    steps = tuple(max(1, side // _SPAN_SIDE_PX) for side in pixels.shape[1:])
    some = pixels[:, :: steps[0], :: steps[1]].astype(np.float64) / divisor
    low, high = (float(v) for v in np.quantile(some, (_SPAN_SHARE, 1 - _SPAN_SHARE)))
    if low == high:
        low, high = float(some.min()), float(some.max())
    return (low, high) if low < high else (low, low + 1 / divisor)


def check_pair(pair: Pair, *, channels: int, n_classes: int | None) -> int:
    """Return the channels of a pair's image.

    Raises TrainError for a pair that could not be learnt from or compared with, by its file.

    ``n_classes`` is None where ids are cells. Of images too large to be kept only one pixel and
    one id are looked at, of others all ids, and all pixels of floats: these may be no numbers.
    """
    image, labels = open_pair(pair)
    whole, first = Box.of_shape(image.extent), Box(0, 0, 1, 1)
    pixels = read_pixels(image, whole if image.dtype.kind == "f" and image.in_memory else first)
    try:
        to_share(pixels[:, :1, :1], channels=channels)
    except TrainError as error:
        raise TrainError(f"{pair.image}: {error}") from error
    ids = read_labels(labels, whole if labels.in_memory else first)
    if n_classes is not None:
        make_target(ids, "classes", n_classes=n_classes, source=labels.path)
    return image.channels
