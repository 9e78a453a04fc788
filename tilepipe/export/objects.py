"""``iter_objects``: the objects of a mask of any size, one after another, in bounded memory.

The mask is read region by region in reading order. An object inside one region is handed out at
once; one that touches a border waits as fragments until no later region can touch it, at most for
a row of regions below its last pixel. So memory holds one region and the objects across one line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tilepipe.export.polygons import Polygon, merge_polygons, split_holes, trace_regions
from tilepipe.export.probability import ProbabilityOf
from tilepipe.export.runs import Regions, find_regions
from tilepipe.steps import Count, Tell, ignore
from tilepipe.tiling import Box, Shape


class MaskLevel(Protocol):
    """One level of a mask pyramid, as the store gives it."""

    @property
    def shape(self) -> Shape:
        """Sides (y, x) in px."""
        ...

    def read(self, box: Box) -> NDArray[Any]:
        """Return the class ids (y, x) of a box."""
        ...


@dataclass(slots=True)
class MaskObject:
    """A connected region of one class: its measures and, if asked for, its outline."""

    value: int
    """Class id, or instance id."""
    area_px: int
    sum_y: float
    sum_x: float
    box: Box
    """Level px."""
    sum_weight: float = 0.0
    """Sum of its pixels' weights, where they were weighed."""
    fragments: list[Polygon] = field(default_factory=list)
    inner_holes: Polygon = field(default_factory=list)
    """Holes away from every border of regions: joining fragments cannot change them."""
    apart: list[MaskObject] = field(default_factory=list)
    """Further pieces of the same instance that do not touch this one; measures include them."""

    @property
    def centroid(self) -> tuple[float, float]:
        """Mean (y, x) of the pixel centres, level px."""
        return self.sum_y / self.area_px, self.sum_x / self.area_px

    @property
    def mean_probability(self) -> float:
        """Mean of its pixels' probabilities, where these were the weights."""
        return self.sum_weight / self.area_px / 255

    def polygons(self) -> list[Polygon]:
        """Return the outline: rings of integer (x, y) pixel corners; the first is the outside."""
        merged = merge_polygons(self.fragments)
        if self.inner_holes:
            # The fragments of one piece touch along edges, so they join to one polygon.
            merged = [[*merged[0], *self.inner_holes], *merged[1:]]
        return [*merged, *(polygon for piece in self.apart for polygon in piece.polygons())]

    def absorb(self, other: MaskObject) -> None:
        """Take over another fragment that touches this one."""
        self._measure(other)
        self.fragments += other.fragments
        self.inner_holes += other.inner_holes

    def join(self, other: MaskObject) -> None:
        """Take over a piece of the same instance that lies apart."""
        self._measure(other)
        self.apart.append(other)

    def _measure(self, other: MaskObject) -> None:
        self.area_px += other.area_px
        self.sum_y += other.sum_y
        self.sum_x += other.sum_x
        self.sum_weight += other.sum_weight
        a, b = self.box, other.box
        self.box = Box(min(a.y0, b.y0), min(a.x0, b.x0), max(a.y1, b.y1), max(a.x1, b.x1))


def iter_objects(
    level: MaskLevel,
    *,
    outlines: bool = False,
    region_px: int = 2048,
    within: Box | None = None,
    probability: ProbabilityOf | None = None,
    tell: Tell = ignore,
) -> Iterator[MaskObject]:
    """Yield every 4-connected object of ``level`` once; the order is fixed for a region size.

    ``within`` limits the search to a box, as if the mask ended there. ``probability`` tells that
    of a region's pixels, which is summed over each object. ``tell`` hears of the regions read.
    """
    whole = Box.of_shape(level.shape) if within is None else within
    tracker = _Tracker(whole)
    told = Count(tell, "objects", whole.area)
    for y0 in range(whole.y0, whole.y1, region_px):
        row = Box(y0, whole.x0, min(y0 + region_px, whole.y1), whole.x1)
        for box in row.split((region_px, region_px)):
            mask = level.read(box)
            regions = find_regions(mask)
            polygons = trace_regions(regions, box) if outlines else None
            weights = regions.sums_of(probability(box, mask)) if probability is not None else None
            yield from tracker.add(box, mask, regions, polygons, weights)
            told.add(box.area)
        yield from tracker.end_row(last=row.y1 == whole.y1)


def iter_instances(
    level: MaskLevel,
    *,
    outlines: bool = False,
    region_px: int = 2048,
    probability: ProbabilityOf | None = None,
    tell: Tell = ignore,
) -> Iterator[MaskObject]:
    """Yield every object of an instance mask once: all pixels of one id, connected or not.

    The mask is read twice: how many pieces an id has is counted first, so that only ids in
    several pieces wait in memory for their last one.
    """
    pieces: Counter[int] = Counter()

    def tell_count(what: str, done: int, total: int) -> None:
        del what
        tell("pieces of objects", done, total)

    for one in iter_objects(level, region_px=region_px, tell=tell_count):
        pieces[one.value] += 1
    missing = {value: count for value, count in pieces.items() if count > 1}
    del pieces
    begun: dict[int, MaskObject] = {}
    for one in iter_objects(
        level, outlines=outlines, region_px=region_px, probability=probability, tell=tell
    ):
        if one.value not in missing:
            yield one
            continue
        if one.value in begun:
            begun[one.value].join(one)
        else:
            begun[one.value] = one
        missing[one.value] -= 1
        if missing[one.value] == 0:
            yield begun.pop(one.value)


class _Tracker:
    """Joins fragments across the borders of regions (union-find over those that touch one)."""

    def __init__(self, whole: Box) -> None:
        self._whole = whole
        self._parents: dict[int, int] = {}
        self._open: dict[int, MaskObject] = {}
        self._next_id = 1
        width = whole.shape[1]
        # The last line of the row above, and the last column of the region to the left.
        self._above = np.zeros((2, width), dtype=np.int64)
        self._below = np.zeros((2, width), dtype=np.int64)
        self._left: NDArray[np.int64] | None = None

    def add(
        self,
        box: Box,
        mask: NDArray[Any],
        regions: Regions,
        polygons: list[Polygon] | None,
        weights: list[float] | None,
    ) -> Iterator[MaskObject]:
        """Take a region in; hand out the objects that lie inside it."""
        ids = regions.ids
        base = self._next_id - 1
        self._next_id += len(regions)
        crossing = np.zeros(len(regions) + 1, dtype=bool)
        for touches, line in (
            (box.y0 > self._whole.y0, ids[0]),
            (box.y1 < self._whole.y1, ids[-1]),
            (box.x0 > self._whole.x0, ids[:, 0]),
            (box.x1 < self._whole.x1, ids[:, -1]),
        ):
            if touches:
                crossing[line] = True
        values, areas = regions.values.tolist(), regions.areas_px.tolist()
        sums = (regions.sums + regions.areas_px[:, None] * (box.y0, box.x0)).tolist()
        boxes = regions.boxes.tolist()
        for index, value in enumerate(values):
            y0, x0, y1, x1 = boxes[index]
            found = MaskObject(
                value=value,
                area_px=areas[index],
                sum_y=sums[index][0],
                sum_x=sums[index][1],
                box=Box(y0, x0, y1, x1).shift(box.y0, box.x0),
                sum_weight=0.0 if weights is None else weights[index],
                fragments=[] if polygons is None else [polygons[index]],
            )
            if crossing[index + 1]:
                if found.fragments:
                    fragment, found.inner_holes = split_holes(found.fragments[0], box)
                    found.fragments = [fragment]
                key = base + index + 1
                self._parents[key] = key
                self._open[key] = found
            else:
                yield found
        self._join_neighbours(box, mask, ids, base)

    def _join_neighbours(
        self, box: Box, mask: NDArray[Any], ids: NDArray[np.int32], base: int
    ) -> None:
        columns = slice(box.x0 - self._whole.x0, box.x1 - self._whole.x0)
        if box.y0 > self._whole.y0:
            self._join(self._above[:, columns], _line(mask[0], ids[0], base))
        if box.x0 > self._whole.x0 and self._left is not None:
            self._join(self._left, _line(mask[:, 0], ids[:, 0], base))
        self._below[:, columns] = _line(mask[-1], ids[-1], base)
        self._left = _line(mask[:, -1], ids[:, -1], base)

    def _join(self, there: NDArray[np.int64], here: NDArray[np.int64]) -> None:
        same = (there[0] == here[0]) & (here[0] != 0)
        if not same.any():
            return
        for a, b in np.unique(np.stack([there[1][same], here[1][same]]), axis=1).T.tolist():
            root, other = self._find(a), self._find(b)
            if root != other:
                self._parents[other] = root
                self._open[root].absorb(self._open.pop(other))

    def _find(self, key: int) -> int:
        while (parent := self._parents[key]) != key:
            self._parents[key] = self._parents[parent]
            key = parent
        return key

    def end_row(self, *, last: bool) -> Iterator[MaskObject]:
        """Hand out what no later region can touch."""
        below = self._below
        roots: set[int] = set()
        if not last:
            keys, places = np.unique(below[1], return_inverse=True)
            found = [self._find(key) if key else 0 for key in keys.tolist()]
            roots = set(found) - {0}
            below[1] = np.array(found, dtype=np.int64)[places]
        for key in [key for key in self._open if key not in roots]:
            yield self._open.pop(key)
        self._parents = {root: root for root in roots}
        self._above, self._below = below, self._above
        self._below[:] = 0
        self._left = None


def _line(values: NDArray[Any], ids: NDArray[np.int32], base: int) -> NDArray[np.int64]:
    """(2, n): class ids and object keys along a border; 0 where background."""
    keys = ids.astype(np.int64)
    keys[keys != 0] += base
    return np.stack([values.astype(np.int64), keys])
