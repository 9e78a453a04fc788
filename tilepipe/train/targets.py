"""What a network is taught: class ids from labels, and cells back from class ids.

Targets made from instance labels:

- ``foreground``: 0 background, 1 inside a cell;
- ``foreground+border``: 0 background, 1 nucleus, 2 border. The border is a ring *inside* each cell:
  its pixels within ``ring_px`` of anything that is not that cell. Nucleus and border together are
  the annotated cell, so foreground metrics merge them, and ``separate`` grows nuclei back into
  their ring. A cell that would keep less than ``CORE_SHARE`` of its pixels has a thinner ring.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from tilepipe.errors import TrainError
from tilepipe.spec import LabelClass
from tilepipe.tiling.growth import grow_into

Target = Literal["classes", "foreground", "foreground+border"]
TARGETS: tuple[Target, ...] = ("classes", "foreground", "foreground+border")
MOST_CLASSES = 255
"""What a network can have."""
CORE_SHARE = 0.3
"""The least share of a cell that stays nucleus before its ring is made thinner."""

BORDER_CLASSES = (
    LabelClass(name="background", color=(0, 0, 0, 0)),
    LabelClass(name="nucleus", color=(0, 160, 135, 255)),
    LabelClass(name="border", color=(230, 75, 53, 255)),
)
FOREGROUND_CLASSES = (
    LabelClass(name="background", color=(0, 0, 0, 0)),
    LabelClass(name="foreground", color=(0, 160, 135, 255)),
)


def edge_distance(instances: NDArray[Any], *, reach_px: int) -> NDArray[np.float64]:
    """Distance (px) of each cell pixel to the nearest pixel that is not its cell; 0 outside.

    The image's own border is not an edge: a cell cut by it goes on beyond. Values above
    ``reach_px`` are only known to be above it. (y, x) integer ids -> (y, x) float64.
    """
    padded = np.pad(instances, 1, mode="edge")
    inner = slice(1, -1)
    differs = np.zeros(instances.shape, dtype=bool)
    for dy, dx in ((-1, 0), (1, 0), (0, -1), (0, 1)):
        rows = slice(1 + dy, padded.shape[0] - 1 + dy)
        columns = slice(1 + dx, padded.shape[1] - 1 + dx)
        differs |= padded[rows, columns] != padded[inner, inner]
    if not differs.any():
        return np.where(instances != 0, np.inf, 0.0)
    # Most cells touch nothing: one transform of the background serves them all, exactly.
    edges = ndimage.distance_transform_edt(instances != 0) if (instances == 0).any() else None
    result = np.full(instances.shape, np.inf) if edges is None else edges
    compact = _compact(instances)
    touching = np.unique(compact[differs & (compact != 0) & _touches_other(compact)])
    places = ndimage.find_objects(compact)
    for number in touching:
        rows, columns = places[number - 1]
        window = (
            slice(max(0, rows.start - reach_px), rows.stop + reach_px),
            slice(max(0, columns.start - reach_px), columns.stop + reach_px),
        )
        own = compact[window] == number
        distance = ndimage.distance_transform_edt(own) if not own.all() else np.full(own.shape, 9e9)
        part = result[window]
        part[own] = np.minimum(part[own], distance[own])
    result[instances == 0] = 0.0
    return result


def _compact(instances: NDArray[Any]) -> NDArray[np.int32]:
    ids, numbers = np.unique(instances, return_inverse=True)
    if ids.size and ids[0] != 0:
        numbers = numbers + 1
    compact: NDArray[np.int32] = numbers.reshape(instances.shape).astype(np.int32)
    return compact


def _touches_other(compact: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Cell pixels with another cell among their 8 neighbours."""
    big = np.iinfo(np.int32).max
    highest = ndimage.maximum_filter(compact, size=3, mode="nearest")
    lowest = ndimage.minimum_filter(np.where(compact == 0, big, compact), size=3, mode="nearest")
    touches: NDArray[np.bool_] = (compact != 0) & ((highest != compact) | (lowest != compact))
    return touches


def border_target(instances: NDArray[Any], *, ring_px: float = 2.0) -> NDArray[np.uint8]:
    """Turn (y, x) cell ids into uint8 ids 0 background, 1 nucleus, 2 border (see the module)."""
    if not (instances != 0).any():
        return np.zeros(instances.shape, np.uint8)
    distance = edge_distance(instances, reach_px=int(np.ceil(ring_px)) + 1)
    compact = _compact(instances)
    numbers = np.arange(1, compact.max() + 1)
    area = ndimage.sum_labels(np.ones(compact.shape), compact, numbers)
    ring = np.zeros(numbers.size + 1)
    undecided = np.ones(numbers.size, dtype=bool)
    for width in np.arange(ring_px, 0, -0.5):
        core = ndimage.sum_labels((distance > width).astype(float), compact, numbers)
        fits = undecided & (core >= CORE_SHARE * area)
        ring[1:][fits] = width
        undecided &= ~fits
    target = (compact != 0).astype(np.uint8)
    target[(compact != 0) & (distance <= ring[compact])] = 2
    return target


def make_target(
    labels: NDArray[Any],
    target: Target,
    *,
    n_classes: int,
    ring_px: float = 2.0,
    source: str = "labels",
) -> NDArray[np.uint8]:
    """Turn (y, x) labels, ids from 0, into (y, x) uint8 class ids.

    Raises TrainError, naming ``source``, where class ids exceed ``n_classes``.
    """
    if target == "foreground+border":
        return border_target(labels, ring_px=ring_px)
    if target == "foreground":
        return (labels != 0).astype(np.uint8)
    highest = int(labels.max(initial=0))
    if highest >= n_classes:
        raise TrainError(_too_many_classes(labels, highest, n_classes, source=source))
    return labels.astype(np.uint8)


def _too_many_classes(labels: NDArray[Any], highest: int, n_classes: int, *, source: str) -> str:
    found = np.unique(labels).tolist()
    shown = ", ".join(str(value) for value in found[:10]) + (", ..." if len(found) > 10 else "")
    more = f"pass --classes {highest + 1}, or " if highest < MOST_CLASSES else ""
    return (
        f"{source}: holds class ids {shown}; the network has {n_classes} classes, so ids are 0 to "
        f"{n_classes - 1}; renumber the ids, {more}pass --target foreground if all but 0 is one "
        "class or the ids are instances"
    )


def separate(
    classes: NDArray[Any],
    *,
    border: int | None = 2,
    min_area_px: int = 12,
    grow_px: float = 3.0,
) -> NDArray[np.int32]:
    """Turn class ids into cells: each connected nucleus, grown back into the border around it.

    ``tilepipe run --instances`` makes the same of a mask, unit by unit (``pipeline/cells.py``).

    Parameters
    ----------
    classes
        (y, x) class ids.
    border
        The class of a cell's ring (None: there is none). Any other but 0 is one of insides.
    min_area_px
        Cells smaller than this after growing are dropped.
    grow_px
        A border pixel joins the nearest nucleus within this distance; border pixels farther from
        any nucleus stay background, unless they form a blob without one: that is a cell too.

    Returns
    -------
    (y, x) int32 ids 1 ... n in reading order of their first pixel, 0 = background.
    """
    seeds, count = np.zeros(classes.shape, np.int32), 0
    for value in np.unique(classes):
        if value not in (0, border):
            found, more = ndimage.label(classes == value)
            seeds[found != 0] = found[found != 0] + count
            count += more
    if border is not None:
        ring = classes == border
        blobs, _ = ndimage.label(ring | (seeds != 0), structure=np.ones((3, 3)))
        seeded = np.zeros(int(blobs.max(initial=0)) + 1, dtype=bool)
        seeded[np.unique(blobs[seeds != 0])] = True
        # A cell too small for a nucleus: all ring.
        orphans = np.where(seeded[blobs], 0, blobs)
        extra = _compact(orphans)
        seeds = grow_into(seeds, ring & (orphans == 0), reach_px=grow_px)
        seeds = np.where(extra > 0, extra + count, seeds).astype(np.int32)
    area = np.bincount(seeds.ravel())
    keep = area >= min_area_px
    keep[0] = False
    kept = np.where(keep[seeds], seeds, 0).ravel()
    values, first = np.unique(kept, return_index=True)
    values, first = values[values != 0], first[values != 0]
    numbers = np.zeros(area.size, np.int32)
    numbers[values[np.argsort(first)]] = np.arange(1, values.size + 1, dtype=np.int32)
    return numbers[seeds]


def foreground(classes: NDArray[Any], target: Target) -> NDArray[np.bool_]:
    """Return where class ids say cell: nucleus and border merged (any class but 0)."""
    del target
    return np.asarray(classes != 0)
