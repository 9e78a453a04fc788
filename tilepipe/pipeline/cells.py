"""``find_cells``: the objects of one unit of a mask, and what their neighbours must know of them.

The rule is that of ``tilepipe.train.separate`` on a whole image (test_instances.py holds the two
equal): objects are the 4-connected regions of a class; with a class ``border``, a border pixel
joins the nearest object within ``REACH_PX``, and an 8-connected blob of border without any object
in it is an object itself. A unit is read with a halo as wide as that reach. What cannot be known
from it alone - where an object goes on, whether a blob has an object elsewhere - is left open and
told to ``join_cells``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilepipe.spec import LabelClass
from tilepipe.tiling import Box, Shape
from tilepipe.tiling.growth import grow_into
from tilepipe.tiling.regions import label_regions

REACH_PX = 3.0
LEAST_PX = 12
"""With a border class, objects smaller than this are dropped, as in training."""
Ints = NDArray[np.int64]
Ids = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Rule:
    """What makes an object."""

    border: int | None
    """Class value of the ring between objects; None: there is none."""
    reach_px: float = REACH_PX
    least_px: int = 1

    @classmethod
    def of_classes(cls, classes: Sequence[LabelClass]) -> Rule:
        """Return the rule for the classes of a mask: by their border if one is called so."""
        for value, entry in enumerate(classes):
            if value and entry.name.lower() == "border":
                return cls(value, least_px=LEAST_PX)
        return cls(None)

    @property
    def halo_px(self) -> int:
        """Px read around a unit."""
        return 1 if self.border is None else ceil(self.reach_px)

    @property
    def layers(self) -> int:
        """Kinds of regions that cross borders: objects, and blobs of objects and border."""
        return 1 if self.border is None else 2

    def to_json(self) -> dict[str, Any]:
        """Return the rule as a label's record tells it."""
        if self.border is None:
            return {"connectivity": 4, "text": "4-connected regions of each class"}
        return {
            "connectivity": 4,
            "border": self.border,
            "reach_px": self.reach_px,
            "least_px": self.least_px,
            "text": f"4-connected regions of each class; pixels of class {self.border} join the "
            f"nearest within {self.reach_px:g} px, blobs of them alone are objects; under "
            f"{self.least_px} px dropped",
        }


@dataclass(frozen=True, slots=True)
class Cells:
    """The objects of a unit. Ids of regions that cross its border come first, from 1."""

    ids: Ids
    """(y, x) of the unit: open objects 1 … n, then closed ones; 0 = none."""
    blobs: Ids
    """(y, x) of the unit: open blobs that hold no object here; all 0 without a border class."""
    areas: Ints
    """(n,) px of the open objects inside the unit."""
    firsts: Ints
    """(n,) the first px of each in the whole image, counted in reading order; LAST if none."""
    blob_areas: Ints
    """(m,) of the open blobs."""
    blob_firsts: Ints
    blob_seeded: NDArray[np.bool_]
    """(m,) whether an object of the blob lies in sight."""
    doubtful: Ints
    """(d, 4) open blob, object, px, first px: the object's if the blob holds an object elsewhere,
    the blob's if it does not."""
    closed: Ints
    """(c,) first px of the closed objects, in the order of their ids."""
    edges: tuple[Ids, ...]
    """Open ids of both layers along the sides of the unit, see ``edge_boxes``."""


LAST = np.iinfo(np.int64).max


def edge_boxes(box: Box, extent: Shape, halo_px: int) -> dict[str, Box]:
    """Return the strips along the inner sides of a unit that its neighbours see too, level px."""
    whole = Box.of_shape(extent)
    seen = box.grow(halo_px).intersect(whole)
    strips: dict[str, Box] = {}
    for side, edge, inner in (("north", box.y0, box.y0 > 0), ("south", box.y1, box.y1 < extent[0])):
        if inner:
            strips[side] = Box(
                max(0, edge - halo_px), seen.x0, min(edge + halo_px, extent[0]), seen.x1
            )
    for side, edge, inner in (("west", box.x0, box.x0 > 0), ("east", box.x1, box.x1 < extent[1])):
        if inner:
            strips[side] = Box(
                seen.y0, max(0, edge - halo_px), seen.y1, min(edge + halo_px, extent[1])
            )
    return strips


def find_cells(mask: NDArray[Any], box: Box, extent: Shape, rule: Rule) -> Cells:
    """Find the objects of the unit ``box`` of a mask of ``extent`` (y, x) px.

    ``mask`` holds the class ids of the box grown by ``rule.halo_px`` and clipped to the extent.
    """
    from scipy import ndimage  # a third of a second of every start; few jobs ask for objects

    seen = box.grow(rule.halo_px).intersect(Box.of_shape(extent))
    strips = [
        strip.shift(-seen.y0, -seen.x0).slices
        for strip in edge_boxes(box, extent, rule.halo_px).values()
    ]
    own = box.shift(-seen.y0, -seen.x0).slices
    seeds, values = label_regions(mask, without=() if rule.border is None else (rule.border,))
    n_seeds = len(values)
    crossing = _crossing(seeds, n_seeds, strips)
    blobs = np.zeros_like(seeds)
    grown = seeds
    seeded = blob_crossing = np.zeros(1, np.bool_)
    if rule.border is not None:
        ring = mask == rule.border
        found, n_blobs = ndimage.label(ring | (seeds != 0), structure=np.ones((3, 3)))
        blobs = np.asarray(found, np.int32)
        seeded = np.zeros(n_blobs + 1, np.bool_)
        seeded[blobs[seeds != 0]] = True
        seeded[0] = False
        blob_crossing = _crossing(blobs, n_blobs, strips)
        # A blob all of which is seen and that holds no object is one itself: nothing grows there.
        alone = ~seeded & ~blob_crossing
        grown = grow_into(seeds, ring & ~alone[blobs], reach_px=rule.reach_px)
    layout = _Place(own, box, extent)
    unsure = blob_crossing & ~seeded
    in_doubt = layout.table(grown, blobs, unsure[blobs] & (grown != seeds) & (grown != 0))
    crossing[in_doubt[:, 1]] = True
    certain = np.where(unsure[blobs], 0, grown) if rule.border is not None else grown
    areas, firsts = layout.measure(certain, n_seeds)
    blob_areas, blob_firsts = layout.measure(blobs, len(seeded) - 1)

    kept = ~crossing & (areas >= rule.least_px)
    kept[0] = False
    alone = ~blob_crossing & ~seeded & (blob_areas >= rule.least_px)
    alone[0] = False
    n_open, n_kept = int(crossing.sum()), int(kept.sum())
    numbers = np.zeros(n_seeds + 1, np.int32)
    numbers[crossing] = np.arange(1, n_open + 1)
    numbers[kept] = np.arange(n_open + 1, n_open + n_kept + 1)
    blob_numbers = np.zeros(len(seeded), np.int32)
    blob_numbers[blob_crossing] = np.arange(1, int(blob_crossing.sum()) + 1)
    ids = np.asarray(numbers[grown[own]], np.int32)
    if alone.any():
        extra = np.zeros(len(seeded), np.int32)
        extra[alone] = np.arange(1, int(alone.sum()) + 1) + n_open + n_kept
        ids = np.where(alone[blobs[own]], extra[blobs[own]], ids).astype(np.int32)
    in_doubt[:, 0] = blob_numbers[in_doubt[:, 0]]
    in_doubt[:, 1] = numbers[in_doubt[:, 1]]
    edges = [numbers[seeds[strip]] * crossing[seeds[strip]] for strip in strips]
    if rule.border is not None:
        edges += [blob_numbers[blobs[strip]] for strip in strips]
    return Cells(
        ids=ids,
        blobs=np.where(unsure[blobs[own]], blob_numbers[blobs[own]], 0).astype(np.int32),
        areas=areas[crossing],
        firsts=firsts[crossing],
        blob_areas=blob_areas[blob_crossing],
        blob_firsts=blob_firsts[blob_crossing],
        blob_seeded=seeded[blob_crossing],
        doubtful=in_doubt,
        closed=np.concatenate([firsts[kept], blob_firsts[alone]]),
        edges=tuple(edge.astype(np.int32) for edge in edges),
    )


def _crossing(ids: Ids, count: int, strips: Sequence[tuple[slice, slice]]) -> NDArray[np.bool_]:
    crossing = np.zeros(count + 1, np.bool_)
    for strip in strips:
        crossing[ids[strip]] = True
    crossing[0] = False
    return crossing


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a unit lies: areas count inside it, first pixels in the whole image."""

    own: tuple[slice, slice]
    box: Box
    extent: Shape

    def measure(self, ids: Ids, count: int) -> tuple[Ints, Ints]:
        """(count + 1,) areas and first px of ids inside the unit."""
        flat = ids[self.own].ravel()
        areas = np.bincount(flat, minlength=count + 1).astype(np.int64)
        firsts = np.full(count + 1, LAST)
        there = np.flatnonzero(flat)[::-1]
        # Of repeated indices the last assignment stays: the first pixel, as they come reversed.
        firsts[flat[there]] = self._global(there)
        return areas, firsts

    def table(self, grown: Ids, blobs: Ids, where: NDArray[np.bool_]) -> Ints:
        """(d, 4) blob, id, px, first px of the pairs that occur inside the unit at ``where``."""
        there = np.flatnonzero(where[self.own].ravel())
        if not there.size:
            return np.zeros((0, 4), np.int64)
        pairs = np.stack([blobs[self.own].ravel()[there], grown[self.own].ravel()[there]], axis=1)
        found, first, count = np.unique(pairs, axis=0, return_index=True, return_counts=True)
        return np.column_stack([found, count, self._global(there[first])]).astype(np.int64)

    def _global(self, places: NDArray[Any]) -> Ints:
        y, x = np.divmod(places.astype(np.int64), self.box.shape[1])
        return (y + self.box.y0) * self.extent[1] + x + self.box.x0
