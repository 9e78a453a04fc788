"""Which predicted and true objects share how many pixels, in one pass over images of any size.

Connected components (4-connected) are labelled box by box; objects that touch across a box border
are joined afterwards by union-find. Memory: one box, one row of the image, one number per object.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from tilepipe.tiling import Box, Shape

Read = Callable[[Box], NDArray[Any]]
"""Box inside the extent -> (y, x) ids; 0 = background."""


def shared_px(first: NDArray[Any], second: NDArray[Any]) -> dict[tuple[int, int], int]:
    """Count the px of each pair of ids of two arrays of one shape, in the order of the pairs.

    Ids mostly lie in runs, and it is runs that are sorted: to sort the pairs of all px, as arrays
    of two, was nine tenths of ``evaluate``.
    """
    starts, pairs = _changes(np.stack([first.ravel(), second.ravel()]).astype(np.int64, copy=False))
    lengths = np.diff(starts, append=first.size)
    order = np.lexsort(pairs[::-1])
    firsts, pairs = _changes(pairs[:, order])
    counts = np.add.reduceat(lengths[order], firsts) if firsts.size else firsts
    return {(a, b): count for a, b, count in zip(*pairs.tolist(), counts.tolist(), strict=True)}


def _changes(pairs: NDArray[np.int64]) -> tuple[NDArray[np.intp], NDArray[np.int64]]:
    """Return where (2, n) pairs are not as before them, and which they are there."""
    differ = (pairs[:, 1:] != pairs[:, :-1]).any(0)
    starts = np.flatnonzero(np.concatenate([np.ones(min(1, pairs.shape[1]), bool), differ]))
    return starts, pairs[:, starts]


class Objects:
    """Objects of one image, read in boxes in reading order."""

    def __init__(self, extent: Shape, *, are_instances: bool) -> None:
        self.are_instances = are_instances
        self._parents: list[int] = [0]
        self._above = np.zeros(extent[1], np.int64)
        self._left = np.zeros(0, np.int64)

    def number(self, ids: NDArray[Any], box: Box) -> NDArray[np.int64]:
        """Return provisional (y, x) object numbers of a box; ``root`` makes them final."""
        if self.are_instances:
            return ids.astype(np.int64)
        labels, count = ndimage.label(ids != 0)
        first = len(self._parents)
        numbers: NDArray[np.int64] = np.where(labels > 0, labels.astype(np.int64) + first - 1, 0)
        self._parents.extend(range(first, first + count))
        if box.y0 > 0:
            self._join(numbers[0], self._above[box.x0 : box.x1])
        if box.x0 > 0:
            self._join(numbers[:, 0], self._left)
        self._above[box.x0 : box.x1] = numbers[-1]
        self._left = numbers[:, -1].copy()
        return numbers

    def _join(self, here: NDArray[np.int64], there: NDArray[np.int64]) -> None:
        both = (here > 0) & (there > 0)
        if not both.any():
            return
        for a, b in np.unique(np.stack([here[both], there[both]]), axis=1).T.tolist():
            first, second = self.root(a), self.root(b)
            self._parents[max(first, second)] = min(first, second)

    def root(self, number: int) -> int:
        """Return the final number of a provisional one."""
        if self.are_instances:
            return number
        while self._parents[number] != number:
            self._parents[number] = self._parents[self._parents[number]]
            number = self._parents[number]
        return number


@dataclass(slots=True)
class Overlap:
    """Areas and shared areas of objects, px."""

    predicted: dict[int, int] = field(default_factory=dict)
    truth: dict[int, int] = field(default_factory=dict)
    shared: dict[tuple[int, int], int] = field(default_factory=dict)
    """(true, predicted) numbers; predicted 0 = background."""


class OverlapCounter:
    """Adds up the overlap of two images box by box; boxes come in reading order."""

    def __init__(
        self, extent: Shape, *, predicted_instances: bool = False, truth_instances: bool = False
    ) -> None:
        self._predicted = Objects(extent, are_instances=predicted_instances)
        self._truth = Objects(extent, are_instances=truth_instances)
        self._table: dict[tuple[int, int], int] = {}

    def add(self, predicted: NDArray[Any], truth: NDArray[Any], box: Box) -> None:
        """Take in a box of both images."""
        mine = self._predicted.number(predicted, box)
        theirs = self._truth.number(truth, box)
        touched = (mine > 0) | (theirs > 0)
        if not touched.any():
            return
        for pair, count in shared_px(theirs[touched], mine[touched]).items():
            self._table[pair] = self._table.get(pair, 0) + count

    def result(self) -> Overlap:
        """Return the overlap of whole objects."""
        total = Overlap()
        for (t, p), count in self._table.items():
            true, found = self._truth.root(t), self._predicted.root(p)
            if true:
                total.truth[true] = total.truth.get(true, 0) + count
                total.shared[true, found] = total.shared.get((true, found), 0) + count
            if found:
                total.predicted[found] = total.predicted.get(found, 0) + count
        return total
