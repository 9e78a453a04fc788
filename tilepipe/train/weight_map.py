"""The U-Net paper's weight map: w(x) = w_c(x) + w0 * exp(-(d1(x) + d2(x))^2 / (2 sigma^2)).

d1 and d2 are the distances (px, Euclidean, to the nearest pixel of a cell; 0 inside it) from x to
the nearest and the second-nearest cell. Where d2 is so large that the second term is below
``NEGLIGIBLE`` it is 0. So each cell matters only inside its bounding box grown by the *influence
radius*, and there an exact distance transform gives its distances: the sum over cells of box areas
instead of cells x image. The map of a piece needs only labels within that radius of the piece.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from tilepipe.errors import TrainError
from tilepipe.tiling import Box, Shape

Float64 = NDArray[np.float64]
NEGLIGIBLE = 1e-11
"""A border term below this is written as 0."""


def influence_px(*, w0: float = 10.0, sigma: float = 5.0) -> int:
    """Return the distance in px beyond which a second cell adds less than ``NEGLIGIBLE``.

    >>> influence_px()
    38
    """
    if sigma <= 0 or w0 < 0:
        raise TrainError(f"weight map: got w0 {w0}, sigma {sigma}; w0 >= 0 and sigma > 0 px wanted")
    if w0 <= NEGLIGIBLE:
        return 0
    return math.ceil(sigma * math.sqrt(2 * math.log(w0 / NEGLIGIBLE)))


def two_distances(instances: NDArray[Any], *, reach_px: int) -> tuple[Float64, Float64]:
    """Distances to the nearest and second-nearest cell, exact up to ``reach_px``, else infinite.

    Parameters
    ----------
    instances
        (y, x) integer ids, 0 = background; one id is one cell, however many parts it has.
    reach_px
        Distances above this are returned as infinity.

    Returns
    -------
    Two (y, x) float64 arrays d1 <= d2, in px.
    """
    near = np.full(instances.shape, np.inf)
    second = np.full(instances.shape, np.inf)
    ids, compact = np.unique(instances, return_inverse=True)
    if ids.size and ids[0] != 0:
        compact = compact + 1
    compact = compact.reshape(instances.shape).astype(np.int32)
    height, width = instances.shape
    for number, place in enumerate(ndimage.find_objects(compact), start=1):
        rows, columns = place
        window = (
            slice(max(0, rows.start - reach_px), min(height, rows.stop + reach_px)),
            slice(max(0, columns.start - reach_px), min(width, columns.stop + reach_px)),
        )
        distance = ndimage.distance_transform_edt(compact[window] != number)
        first = near[window]
        second[window] = np.minimum(second[window], np.maximum(first, distance))
        near[window] = np.minimum(first, distance)
    near[near > reach_px] = np.inf
    second[second > reach_px] = np.inf
    return near, second


def border_term(instances: NDArray[Any], *, w0: float = 10.0, sigma: float = 5.0) -> Float64:
    """Return w0 * exp(-(d1 + d2)^2 / (2 sigma^2)) of (y, x) integer ids, (y, x) float64."""
    reach = influence_px(w0=w0, sigma=sigma)
    near, second = two_distances(instances, reach_px=reach)
    term: Float64 = np.zeros(instances.shape)
    two = np.isfinite(second)
    term[two] = w0 * np.exp(-((near[two] + second[two]) ** 2) / (2 * sigma**2))
    return term


def weight_map(
    instances: NDArray[Any],
    *,
    class_weights: tuple[float, float] | None = None,
    w0: float = 10.0,
    sigma: float = 5.0,
) -> Float64:
    """Return the paper's map of (y, x) integer cell ids, (y, x) float64.

    ``class_weights`` are w_c of background and of cells; None balances the two so that each class
    has the same sum and their mean over the image is 1 (1 and 1 where one class is absent).
    """
    cells = instances != 0
    background, cell = balanced(float(cells.mean())) if class_weights is None else class_weights
    return np.where(cells, cell, background) + border_term(instances, w0=w0, sigma=sigma)


def balanced(share: float) -> tuple[float, float]:
    """Weights (background, cell) that give both classes the same sum for a ``share`` of cells.

    >>> balanced(0.25)
    (0.6666666666666666, 2.0)
    """
    if not 0 < share < 1:
        return 1.0, 1.0
    return 0.5 / (1 - share), 0.5 / share


def iter_weight_map(
    read: Callable[[Box], NDArray[Any]],
    extent: Shape,
    *,
    class_weights: tuple[float, float],
    w0: float = 10.0,
    sigma: float = 5.0,
    piece_px: int = 1024,
) -> Iterator[tuple[Box, Float64]]:
    """Yield the weight map of a label image of any size, piece by piece.

    ``read`` returns the (y, x) ids of a box inside the extent. Each piece equals that part of
    ``weight_map`` of the whole; memory depends on ``piece_px`` only.
    """
    whole = Box.of_shape(extent)
    reach = influence_px(w0=w0, sigma=sigma)
    for piece in whole.split((piece_px, piece_px)):
        window = piece.grow(reach).intersect(whole)
        values = weight_map(read(window), class_weights=class_weights, w0=w0, sigma=sigma)
        yield piece, values[piece.shift(-window.y0, -window.x0).slices]
