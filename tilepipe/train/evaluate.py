"""``evaluate``: a mask against the truth, read by boxes; stores or images of any size."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from tilepipe.errors import SlideError, TrainError
from tilepipe.spec import class_at, distinct_names
from tilepipe.steps import Count, Tell, ignore
from tilepipe.tiling import Box, Shape
from tilepipe.train.cells import THRESHOLDS, match
from tilepipe.train.em import rand_error_of, warping_error
from tilepipe.train.ids import check_ids, check_ids_dtype, read_labels
from tilepipe.train.images import SUFFIXES, open_raster
from tilepipe.train.metrics import (
    ClassScore,
    class_score,
    confusion,
    merge_foreground,
    pixel_error,
)
from tilepipe.train.overlap import OverlapCounter
from tilepipe.train.targets import separate

if TYPE_CHECKING:
    from tilepipe.store import Label, Store

Kind = Literal["auto", "classes", "instances"]
_WHITE = 255
"""What many programs write for the foreground of a mask."""
IN_MEMORY_PX = 64 << 20
"""Warping error and border separation look at whole images up to this size."""


@dataclass(frozen=True)
class LabelImage:
    """Ids of a label image: (y, x), read by boxes."""

    source: str
    extent: Shape
    dtype: np.dtype[Any]
    read: Callable[[Box], NDArray[Any]]
    class_names: tuple[str, ...] = ()
    stored: tuple[Store, Label] | None = None
    """Where it lies in a store; None of an image."""

    def resolve(self, kind: Kind) -> Literal["classes", "instances"]:
        """Decide what ids mean: ``auto`` takes ids wider than 8 bit as instances."""
        if kind != "auto":
            return kind
        return "classes" if self.dtype.itemsize == 1 else "instances"


@dataclass(frozen=True)
class Evaluation:
    """What ``evaluate`` found; shares are 0-1, NaN where there is no case."""

    extent: Shape
    compared: str
    """``classes``, or ``foreground`` where one side holds instances."""
    classes: dict[str, ClassScore]
    foreground: ClassScore
    pixel_error: float
    rand_error: float
    """Foreground-restricted, 1 - F-score."""
    warping_error: float | None
    """None for instances, and where the image is too large to be looked at whole."""
    f1: dict[str, float]
    """IoU threshold -> instance F1."""
    ap: dict[str, float]
    mean_ap: float
    objects_truth: int
    objects_predicted: int
    notes: tuple[str, ...] = ()
    """What was made of the ids, or is odd about them."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values; NaN becomes null."""
        plain = _plain(asdict(self))
        if not isinstance(plain, dict):
            raise TypeError("an evaluation is a mapping")
        return plain


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float) and math.isnan(value):
        return None
    return value


def open_labels(location: str | Path, *, name: str | None = None) -> LabelImage:
    """Open the ids of a store's label (``name``, or its only one) or of a label image.

    Raises TrainError where there is no such label or no ids, StoreError or SlideError where it is
    unreadable; reading raises TrainError for what is no id.
    """
    path = Path(location)
    if "://" in str(location) or path.is_dir():
        return _of_store(str(location), name)
    if path.suffix.lower() not in SUFFIXES:
        raise SlideError(f"{path}: neither a store nor an image ({', '.join(sorted(SUFFIXES))})")
    if name is not None:
        raise TrainError(
            f"{path}: an image holds no label called {name!r}; leave out --label (--truth-label)"
        )
    raster = open_raster(path, ids=True)
    check_ids_dtype(raster.dtype, source=str(path))
    return LabelImage(
        str(path),
        raster.extent,
        raster.dtype,
        lambda box: read_labels(raster, box),
    )


def _of_store(location: str, name: str | None) -> LabelImage:
    from tilepipe.store import open_store

    store = open_store(location)
    if name is None:
        if not store.labels:
            raise TrainError(
                f"{location}: holds no label; a mask is made by `tilepipe run`, and ids that are "
                "an image are compared as a TIFF, PNG or .npy"
            )
        if len(store.masks) != 1:
            raise TrainError(
                f"{location}: labels {', '.join(store.labels)}; say which with --label "
                "(--truth-label)"
            )
        name = store.masks[0]
    label = store.label(name)
    level = label.level(0)
    return LabelImage(
        source=f"{location}:{name}",
        extent=level.shape,
        dtype=np.dtype(level.dtype),
        read=lambda box: check_ids(level.read(box), source=f"{location}:{name}"),
        class_names=tuple(entry.name for entry in label.classes),
        stored=(store, label),
    )


def evaluate(
    predicted: LabelImage,
    truth: LabelImage,
    *,
    predicted_kind: Kind = "auto",
    truth_kind: Kind = "auto",
    border: int | None = None,
    box_px: int = 2048,
    tell: Tell = ignore,
) -> Evaluation:
    """Compare two label images.

    Parameters
    ----------
    predicted, truth
        Of one extent.
    predicted_kind, truth_kind
        Whether ids are classes or instances. Instances of classes are the 4-connected parts of
        what is not class 0.
    border
        Class of ``predicted`` that separates cells: they are then made by ``separate``.
    box_px
        Side of what is read at once.
    tell
        Hears how much is compared.

    Raises TrainError where the two cannot be compared.
    """
    if predicted.extent != truth.extent:
        raise TrainError(
            f"{predicted.source} has {predicted.extent} px (y, x), {truth.source} has "
            f"{truth.extent}; only images of one size can be compared"
        )
    kinds = predicted.resolve(predicted_kind), truth.resolve(truth_kind)
    by_class = kinds == ("classes", "classes")
    area = truth.extent[0] * truth.extent[1]
    if border is not None and (kinds[0] != "classes" or area > IN_MEMORY_PX):
        raise TrainError(
            f"{predicted.source}: a border class separates class maps up to {IN_MEMORY_PX} px; "
            "compare the instances that `tilepipe run --instances` writes"
        )
    counter = OverlapCounter(
        truth.extent,
        predicted_instances=kinds[0] == "instances" or border is not None,
        truth_instances=kinds[1] == "instances",
    )
    whole = Box.of_shape(truth.extent)
    cells = None if border is None else separate(predicted.read(whole), border=border)
    n_classes = 256 if by_class else 2
    counts = np.zeros((n_classes, n_classes), np.int64)
    classes_held: set[int] = set()
    told = Count(tell, "compared", area)
    for box in whole.split((box_px, box_px)):
        mine, theirs = predicted.read(box), truth.read(box)
        if by_class:
            _check_classes(mine, n_classes, source=predicted.source)
            _check_classes(theirs, n_classes, source=truth.source)
            counts += confusion(mine, theirs, n_classes)
        else:
            counts += confusion(mine != 0, theirs != 0, 2)
            if kinds[0] != kinds[1]:
                held = mine if kinds[0] == "classes" else theirs
                classes_held.update(np.unique(held).tolist())
        counter.add(mine if cells is None else cells[box.slices], theirs, box)
        told.add(box.area)
    notes: tuple[str, ...] = ()
    if by_class:
        named = _named_otherwise(counts, predicted, truth)
        counts, notes = _alike(counts, predicted, truth)
        notes += named
    overlap = counter.result()
    if not by_class:
        sides = (predicted, predicted_kind, overlap.predicted), (truth, truth_kind, overlap.truth)
        notes = _perhaps_classes(sides, classes_held)
    found = match(
        overlap.predicted, overlap.truth, {key: n for key, n in overlap.shared.items() if key[1]}
    )
    warping = None
    if by_class and area <= IN_MEMORY_PX:
        warping = warping_error(predicted.read(whole) != 0, truth.read(whole) != 0)
    return Evaluation(
        extent=truth.extent,
        compared="classes" if by_class else "foreground",
        classes=_scores(counts, predicted, truth, by_class=by_class),
        foreground=class_score(merge_foreground(counts), 1),
        pixel_error=pixel_error(counts),
        rand_error=rand_error_of(overlap.shared),
        warping_error=warping,
        f1={f"{t:.2f}": found.f1(index) for index, t in enumerate(THRESHOLDS)},
        ap={f"{t:.2f}": found.ap(index) for index, t in enumerate(THRESHOLDS)},
        mean_ap=found.mean_ap,
        objects_truth=found.truth,
        objects_predicted=found.predicted,
        notes=notes,
    )


def _alike(
    counts: NDArray[np.int64], predicted: LabelImage, truth: LabelImage
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Count 255 as class 1 where one side is a 0/255 mask and the other holds 0 and 1.

    As they are, such two never agree but on the background; any others that do not are noted.
    """
    ids = [{int(k) for k in np.flatnonzero(counts.sum(axis=axis)) if k} for axis in (0, 1)]
    if not ids[0] or not ids[1] or ids[0] & ids[1]:
        return counts, ()
    sources = predicted.source, truth.source
    for side, source in enumerate(sources):
        if ids[side] == {_WHITE} and ids[1 - side] == {1}:
            merged = counts.copy()
            ours = merged if side else merged.T  # row = truth
            ours[1] += ours[_WHITE]
            ours[_WHITE] = 0
            return merged, (
                f"{source}: a mask of 0 and {_WHITE}; {_WHITE} is counted as class 1, which is "
                f"what {sources[1 - side]} holds",
            )
    held = [", ".join(map(str, sorted(found))) for found in ids]
    return counts, (
        f"{sources[0]} holds classes {held[0]} and {sources[1]} holds {held[1]}: none but 0 is in "
        "both, so the scores of each are 0; renumber one of them if they mean the same",
    )


def _named_otherwise(
    counts: NDArray[np.int64], predicted: LabelImage, truth: LabelImage
) -> tuple[str, ...]:
    """Note the classes that both sides name, and not alike: perhaps one counts in another order."""
    both = zip(predicted.class_names, truth.class_names, strict=False)
    differ = [
        f"{value} is {mine!r} and {theirs!r}"
        for value, (mine, theirs) in enumerate(both)
        if value
        and (counts[value].any() or counts[:, value].any())
        and mine.casefold() != theirs.casefold()
        and class_at(value).name not in (mine, theirs)  # which is no name
    ]
    if not differ:
        return ()
    return (
        f"classes that {predicted.source} and {truth.source} call by other names: "
        f"{', '.join(differ)}; ids are compared, so renumber one of them if the order differs",
    )


def _perhaps_classes(
    sides: tuple[tuple[LabelImage, Kind, dict[int, int]], ...], classes: set[int]
) -> tuple[str, ...]:
    """Note ids that are cells by their dtype alone, and look like a mask of wide integers.

    So do a single id, and those that the other side, of ``classes``, has as well, where the other
    side has more objects.
    """
    notes = []
    for index, (image, kind, objects) in enumerate(sides):
        of_type = kind == "auto" and image.resolve(kind) == "instances"
        alike = len(objects) == 1 or set(objects) <= classes
        if of_type and alike and 0 < len(objects) < len(sides[1 - index][2]):
            notes.append(
                f"{image.source}: ids of dtype {image.dtype} are taken for cells, of which it has "
                f"{len(objects)}; if they are classes, say "
                f"{('--pred-kind', '--truth-kind')[index]} classes"
            )
    return tuple(notes)


def _check_classes(ids: NDArray[Any], n_classes: int, *, source: str) -> None:
    highest = int(ids.max(initial=0))
    if highest >= n_classes:
        raise TrainError(
            f"{source}: holds class id {highest}; classes are 0 to {n_classes - 1}; if the ids are "
            "cells, say --pred-kind instances (--truth-kind)"
        )


def _scores(
    counts: NDArray[np.int64], predicted: LabelImage, truth: LabelImage, *, by_class: bool
) -> dict[str, ClassScore]:
    named = (predicted.class_names or truth.class_names)[: len(counts)]
    names = distinct_names([*named, *(f"class {k}" for k in range(len(named), len(counts)))])
    scores = {}
    for value in range(len(counts)):
        if not counts[value].any() and not counts[:, value].any():
            continue
        if by_class:
            name = names[value]
        else:
            name = "foreground" if value else "background"
        scores[name] = class_score(counts, value)
    return scores
