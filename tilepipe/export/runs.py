"""Connected regions of equal value, found from the horizontal runs of a mask.

A run is a stretch of one row with one value. Two runs belong together when they have the same
value and touch along an edge (4-connected: pixels that meet only at a corner are two objects, so
every region is one valid polygon).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Regions:
    """The ``n`` regions of a mask, numbered from 1; index 0 of the tables is region 1."""

    ids: NDArray[np.int32]
    """(y, x): region number of each pixel, 0 for background."""
    values: NDArray[np.integer[Any]]
    """(n,) class id (or instance id) of each region."""
    areas_px: Ints
    """(n,)"""
    sums: NDArray[np.float64]
    """(n, 2) sums of the y and x of pixel centres; divided by the area, the centroid."""
    boxes: Ints
    """(n, 4) y0, x0, y1, x1, half-open."""

    def __len__(self) -> int:
        return len(self.values)

    def sums_of(self, weights: NDArray[Any]) -> list[float]:
        """Return the sum over each region of (y, x) weights; whole numbers are summed exactly."""
        sums = np.bincount(self.ids.reshape(-1), weights.reshape(-1), minlength=len(self) + 1)
        listed: list[float] = sums[1:].tolist()
        return listed


def find_regions(mask: NDArray[Any]) -> Regions:
    """Regions of a (y, x) mask of integers; value 0 is background and belongs to none."""
    height, width = mask.shape
    if mask.size == 0:
        return _no_regions(mask)
    starts = np.empty(mask.shape, dtype=bool)
    starts[:, 0] = True
    np.not_equal(mask[:, 1:], mask[:, :-1], out=starts[:, 1:])
    first = np.flatnonzero(starts)
    run_of_pixel = np.cumsum(starts, dtype=np.int32).reshape(mask.shape) - np.int32(1)
    # Ids that 63 bits do not hold stay as they are: as int64 they would be below 0.
    wide = np.uint64 if mask.dtype == np.uint64 else np.int64
    run_value = mask.reshape(-1)[first].astype(wide)
    run_y, run_x0 = np.divmod(first, width)
    run_x1 = np.append(first[1:], mask.size) - run_y * width

    # One pair of touching runs shows at the first column of the later run to start.
    touching = (mask[1:] == mask[:-1]) & (starts[1:] | starts[:-1]) & (mask[1:] != 0)
    upper, lower = run_of_pixel[:-1][touching], run_of_pixel[1:][touching]
    n_runs = len(first)
    graph = coo_matrix((np.ones(len(upper), dtype=bool), (upper, lower)), shape=(n_runs, n_runs))
    _, component = connected_components(graph, directed=False)

    solid = run_value != 0
    kept, region_of_run = np.unique(component[solid], return_inverse=True)
    n = len(kept)
    if n == 0:
        return _no_regions(mask)
    lookup = np.zeros(n_runs, dtype=np.int32)
    lookup[solid] = region_of_run + 1
    y, x0, x1 = run_y[solid], run_x0[solid], run_x1[solid]
    length = x1 - x0
    values = np.zeros(n, dtype=wide)
    values[region_of_run] = run_value[solid]
    sums = np.stack(
        [
            np.bincount(region_of_run, weights=length * (y + 0.5), minlength=n),
            np.bincount(region_of_run, weights=length * (x0 + x1) / 2, minlength=n),
        ],
        axis=1,
    ).astype(np.float64)
    boxes = np.empty((n, 4), dtype=np.int64)
    boxes[:, :2] = max(height, width)
    boxes[:, 2:] = 0
    np.minimum.at(boxes[:, 0], region_of_run, y)
    np.minimum.at(boxes[:, 1], region_of_run, x0)
    np.maximum.at(boxes[:, 2], region_of_run, y + 1)
    np.maximum.at(boxes[:, 3], region_of_run, x1)
    areas = np.bincount(region_of_run, weights=length, minlength=n).astype(np.int64)
    return Regions(lookup[run_of_pixel], values, areas, sums, boxes)


def _no_regions(mask: NDArray[Any]) -> Regions:
    none = np.zeros(0, dtype=np.int64)
    no_sums = np.zeros((0, 2), dtype=np.float64)
    return Regions(np.zeros(mask.shape, dtype=np.int32), none, none, no_sums, none.reshape(0, 4))
