"""LERC tiles: what is not valid in them is NaN or transparent, and bands may lie apart."""

from __future__ import annotations

from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray

LERC = 34887


def decode_lerc(data: bytes, *, samples: int, swapped: bool) -> NDArray[Any]:
    """Pixels (y, x, samples) of a LERC tile, as libtiff gives them; the decoder's error if none.

    Numbers that are not valid are NaN; where the mask is the alpha sample, it becomes one.
    ``swapped``: of a big-endian file, where libtiff hands LERC numbers with their bytes swapped.
    """
    pixels, valid = imagecodecs.lerc_decode(data, masks=True)
    if swapped:
        pixels = pixels.byteswap()
    masks_apart = valid is not None and valid.ndim == 3
    if masks_apart or (pixels.ndim == 3 and pixels.shape[2] not in (samples, samples - 1)):
        # Bands with masks of their own lie one after the other.
        pixels = np.moveaxis(pixels, 0, 2)
    if masks_apart:
        valid = np.moveaxis(valid, 0, 2)
    pixels = np.atleast_3d(pixels)
    valid = np.atleast_3d(valid) if valid is not None else np.ones((1, 1, 1), np.bool_)
    if pixels.dtype.kind == "f":
        return np.where(valid, pixels, pixels.dtype.type(np.nan))
    if pixels.shape[2] == samples - 1:
        opaque = np.where(valid, np.iinfo(pixels.dtype).max, 0).astype(pixels.dtype)
        opaque = np.broadcast_to(opaque, (*pixels.shape[:2], 1))
        return np.concatenate([pixels, opaque], axis=2)
    return pixels
