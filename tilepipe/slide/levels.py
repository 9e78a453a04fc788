"""Which pages of a TIFF are its image: the series, its planes, and the levels that are true."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilepipe.errors import SlideError
from tilepipe.slide.ome import channels_in_turn, is_damaged
from tilepipe.tiling import Shape

_STACKS = {
    "Z": "a stack of focal planes",
    "T": "a time series",
    "Q": "an array with an unnamed axis",
    "P": "several positions",
    "M": "a mosaic",
    "A": "several angles",
    "H": "a lifetime image",
}
_PLAIN = {"generic", "uniform", "shaped"}
_WHOLE_SLIDE = {"svs", "ndpi", "scn", "philips", "bif", "qpi", "sis", "avs"}
# An overview may be off by a pixel or two from the rounded size, or by the writer's padding.
_SLACK_PX = 2
_SLACK_SHARE = 0.02


@dataclass(frozen=True, slots=True)
class Plane:
    """One page's place in the file."""

    page: Any
    offsets: NDArray[np.int64]
    counts: NDArray[np.int64]


def choose_series(path: str, tiff: Any, notes: list[str]) -> Any:
    """Return the series of the image: the first of full resolution, of SCN the largest."""
    series = list(tiff.series)
    if not series:
        raise SlideError(f"{path}: holds no image")
    number = 0
    if series[0].kind == "scn":
        # Leica puts the macro photograph first.
        number = max(range(len(series)), key=lambda k: math.prod(series[k].shape))
    elif series[0].kind == "ome":
        # The file may be one of a set that has an image in each.
        number = next((k for k, each in enumerate(series) if _is_in(tiff, each)), 0)
    elif series[0].kind in _PLAIN:
        if is_damaged(tiff):
            notes.append(
                "warning: its OME-XML is damaged, so what it tells of channels, planes and µm/px "
                "is not known; copy the file again"
            )
        _check_imagej(path, tiff)
        number = next((k for k, each in enumerate(series) if _subfile(each) & 5 == 0), 0)
        if number > 0:
            notes.append("the file begins with a smaller copy or a mask of its image")
    others = [each for k, each in enumerate(series) if k != number and _subfile(each) & 5 == 0]
    kind = series[number].kind
    if others and kind not in _WHOLE_SLIDE:
        other_file = kind == "ome" and number > 0
        of = "set of files; the first one of this file" if other_file else "file; the first one"
        notes.append(f"{len(others) + 1} images in the {of} is used")
    return series[number]


def _check_imagej(path: str, tiff: Any) -> None:
    """Refuse what is left of a hyperstack: its other planes have no pages that could be missed."""
    meta = tiff.imagej_metadata if tiff.is_imagej else None
    declared = math.prod(int((meta or {}).get(key, 1)) for key in ("channels", "slices", "frames"))
    page = tiff.pages.first
    if declared > len(tiff.pages) * int(page.samplesperpixel):
        raise SlideError(
            f"{path}: its ImageJ header tells of {declared} planes, and they are not all in the "
            "file: it was cut off; copy it again"
        )


def _is_in(tiff: Any, series: Any) -> bool:
    """Tell whether a page of the series lies in this file."""
    return any(page is not None and page.parent is tiff for page in series._pages)


def _subfile(series: Any) -> int:
    """NewSubfileType: 1 reduced, 4 mask."""
    value = series.keyframe.tags.valueof(254, 0)
    return value if isinstance(value, int) else 0


def plane_numbers(path: str, series: Any, notes: list[str]) -> tuple[int, ...]:
    """Page numbers within ``series`` of the channels; SlideError for stacks and odd axes."""
    axes, shape = series.axes, series.shape
    if "Y" not in axes or "X" not in axes:
        raise SlideError(f"{path}: an array of axes {axes} and shape {shape} is not an image")
    lead: list[tuple[str, int]] = []
    for axis, size in zip(axes, shape, strict=True):
        if axis in "YXS":
            continue
        if size > 1 and axis not in "IC":
            what = _STACKS.get(axis, "more than one image")
            raise SlideError(
                f"{path}: {what} (axes {axes}, shape {shape}); write the plane to be segmented, "
                "y and x and channels, to a file of its own"
            )
        if size > 1 and axis == "I" and size == channels_in_turn(series):
            lead.append(("C", size))
            continue
        if size > 1 and axis == "I":
            notes.append(f"{size} pages of equal size; the first one is used")
        lead.append((axis, size))
    n_channels = next((size for axis, size in lead if axis == "C"), 1)
    if "S" not in axes and n_channels == int(series.keyframe.samplesperpixel):
        n_channels = 1  # the channels are the samples of one page
    sizes = [size for _, size in lead] or [1]
    index = [0] * len(sizes)
    numbers = []
    for channel in range(n_channels):
        for position, (axis, _) in enumerate(lead):
            index[position] = channel if axis == "C" else 0
        numbers.append(int(np.ravel_multi_index(index, sizes)))
    return tuple(numbers)


def find_planes(path: str, series: Any, numbers: tuple[int, ...]) -> tuple[Plane, ...]:
    """Return the pages with these numbers, also where a file lists one page for a whole stack."""
    keyframe = series.keyframe
    if keyframe.shaped[1] != 1:
        raise SlideError(
            f"{path}: a page of {keyframe.shaped[1]} focal planes; write one plane to a file"
        )
    page_sides, wanted = tuple(keyframe.shaped[2:4]), sides(series)
    if page_sides != wanted:
        raise SlideError(
            f"{path}: an image of {wanted[0]} x {wanted[1]} px (y, x) in pages of "
            f"{page_sides[0]} x {page_sides[1]} (axes {series.axes}, shape {series.shape}); write "
            "it with y and x in each page, the channels before them or as samples"
        )
    held = len(series._pages)
    planes = []
    for number in numbers:
        if number < held:
            page = series._pages[number]
        elif series.dataoffset is not None and int(keyframe.compression) == 1:
            planes.append(_behind(series, number))
            continue
        else:
            page = series[number]
        if page is None:
            raise SlideError(
                f"{path}: plane {number} lies in another file that is missing; put the files of "
                "the data set in one folder"
            )
        if len(numbers) > 1 and not page.is_virtual:
            # tifffile takes it for stored as the first one is, its predictor and strips, too.
            page = page.aspage()
        planes.append(
            Plane(
                page,
                np.asarray(page.dataoffsets, dtype=np.int64),
                np.asarray(page.databytecounts, dtype=np.int64),
            )
        )
    return tuple(planes)


def _behind(series: Any, number: int) -> Plane:
    """Plane ``number`` of raw images that follow the first one without a page of their own."""
    page = series._pages[0]
    keyframe = series.keyframe
    shift = np.int64(series.dataoffset + number * keyframe.nbytes - page.dataoffsets[0])
    separate, _, y, x, samples = keyframe.shaped
    row = x * samples * keyframe.dtype.itemsize
    rows = min(int(keyframe.rowsperstrip), y)
    strips = -(-y // rows)
    starts = np.arange(strips * separate, dtype=np.int64)
    offsets = (starts // strips) * (y * row) + (starts % strips) * (rows * row)
    counts = np.minimum(rows, y - (starts % strips) * rows) * row
    return Plane(page, offsets + page.dataoffsets[0] + shift, counts)


def sides(series: Any) -> Shape:
    """Sides (y, x) px of a series."""
    return series.shape[series.axes.index("Y")], series.shape[series.axes.index("X")]


def true_levels(tiff: Any, series: Any, notes: list[str]) -> list[Any]:
    """Levels that can be the same image smaller: same axes and dtype, same aspect, falling size.

    tifffile takes pages of equal ratio for a pyramid and leaves the others out, so overviews of
    other series are looked at too.
    """
    full = sides(series)
    found = list(series.levels[1:])
    if series.kind in _PLAIN:
        for other in tiff.series:
            if other is not series and _subfile(other) & 5 == 1:
                found += other.levels
        # Stable: pages of one size stay in the order of the file.
        found.sort(key=lambda level: -math.prod(level.shape))
    kept = [series]
    for level in found:
        reason = _why_not(series, kept[-1], level, full)
        if reason is None:
            kept.append(level)
        else:
            notes.append(f"an overview is ignored: {reason}")
    return kept


def _why_not(base: Any, finer: Any, level: Any, full: Shape) -> str | None:
    if level.axes != base.axes or level.dtype != base.dtype:
        return f"its axes or dtype are not those of level 0 ({level.axes}, {level.dtype})"
    if "Y" not in level.axes or "X" not in level.axes:
        return "it is not an image"
    y, x = sides(level)
    if min(y, x) < 1:
        return "it is empty"
    fine_y, fine_x = sides(finer)
    if y > fine_y or x > fine_x or y * x >= fine_y * fine_x:
        return f"its size {y} x {x} px is not smaller than that of the level before"
    if base.size // (full[0] * full[1]) != level.size // (y * x):
        return "it has another number of channels"
    # A pixel of the shorter side is many of the longer one: either may be as the other says.
    if not (_is_near(y, full[0] * x / full[1]) or _is_near(x, full[1] * y / full[0])):
        return f"its size {y} x {x} px has another aspect than {full[0]} x {full[1]} px"
    return None


def _is_near(side: int, wanted: float) -> bool:
    return abs(side - wanted) <= max(_SLACK_PX, _SLACK_SHARE * side)
