"""Checks of a finished store that need no network: checksums, pyramids, the slide itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilepipe.errors import MismatchError, StoreError, TilepipeError, VerifyError
from tilepipe.slide import Slide, open_slide
from tilepipe.slide.fingerprint import content
from tilepipe.steps import Count, Tell
from tilepipe.store import (
    Journal,
    Label,
    Level,
    Probabilities,
    Record,
    Store,
    checksum_of,
    reduce_image,
    reduce_label,
)
from tilepipe.threads import cores, several_at_once
from tilepipe.tiling import Box, Unit

_MOST_AT_ONCE = 4
_AT_ONCE_BYTES = 512 << 20
"""What the units that are checked at once may take, each with the four that lie under it."""


def check_levels(
    store: Store,
    pyramid: Label | Probabilities | None,
    journal: Journal,
    *,
    stages: tuple[str, str],
    tell: Tell,
) -> int:
    """Check every unit of the image's pyramid (None), a label's, or that of its probabilities.

    Level 0 against the journal's checksums, every coarser one against a fresh reduction of the one
    below, and against the journal too.

    Returns the number of units checked. Raises VerifyError with the first wrong box.
    """
    source: Callable[[int], Level] = store.image if pyramid is None else pyramid.level
    count = store.n_levels if pyramid is None else pyramid.n_levels
    what = "image" if pyramid is None else pyramid.what
    reduce = reduce_label if isinstance(pyramid, Label) else reduce_image
    highest = None  # of objects, whose ids are no classes
    if isinstance(pyramid, Label) and pyramid.classes and pyramid.level(0).dtype == np.uint8:
        highest = len(pyramid.classes) - 1
    told = Count(tell, what, sum(prod(source(index).shape) for index in range(count)))

    def check(index: int, recorded: Mapping[tuple[int, int], Record], unit: Unit) -> None:
        level = source(index)
        where = f"{what} level {index}, {unit.box}"
        pixels = _read(level, unit.box, where)
        record = recorded.get((unit.iy, unit.ix))
        if record is None:
            raise VerifyError(
                f"{store.location}: {where}: has no journal record; run the same job "
                "again, it does what is missing"
            )
        kept: Any = record.checksum
        if isinstance(pyramid, Probabilities):
            kept = record.facts.get("probabilities")
        if kept != checksum_of(pixels):
            raise VerifyError(
                f"{store.location}: {where}: the bytes are not those that were written "
                "(checksum differs); make them again with --overwrite"
            )
        if highest is not None and index == 0 and int(pixels.max()) > highest:
            raise VerifyError(
                f"{store.location}: {where}: holds class {int(pixels.max())}; the label has "
                f"classes 0 to {highest}"
            )
        if index:
            fine = source(index - 1)
            under = unit.box.enlarged(2).intersect(Box.of_shape(fine.shape))
            fresh = reduce(_read(fine, under, f"{what} level {index - 1}, {under}"))
            _same(store, fresh, pixels, unit.box, f"{what} level {index}", "the level below")

    checked = 0
    for index in range(count):
        level = source(index)
        recorded = _recorded(journal, stages[min(index, 1)], index, what)
        _check_units(level, partial(check, index, recorded), told)
        checked += len(level.grid)
    return checked


def _check_units(level: Level, check: Callable[[Unit], None], told: Count) -> None:
    """Check every unit of a level, several at once.

    Raises what is wrong with the first, in their order, that is wrong.
    """
    each_bytes = 5 * prod(level.lead) * level.unit_px**2 * level.dtype.itemsize
    at_once = max(1, min(_MOST_AT_ONCE, cores(), _AT_ONCE_BYTES // each_bytes))
    checked = several_at_once(check, level.grid, at_once=at_once, name="tilepipe-verify")
    for unit, _ in zip(level.grid, checked, strict=True):
        told.add(unit.box.area)


def _recorded(
    journal: Journal, stage: str, level: int, what: str
) -> Mapping[tuple[int, int], Record]:
    try:
        return journal.recorded(stage, level)
    except MismatchError as error:
        raise VerifyError(f"{what} level {level}: {error}") from error


def _read(level: Level, box: Box, where: str) -> NDArray[Any]:
    try:
        return level.read(box)
    except StoreError as error:
        raise VerifyError(f"{where}: cannot be read back: {error}") from error


def _same(
    store: Store,
    expected: NDArray[Any],
    found: NDArray[Any],
    box: Box,
    what: str,
    against: str,
) -> None:
    differs = expected != found
    if expected.dtype.kind == "f":
        differs &= ~(np.isnan(expected) & np.isnan(found))
    if differs.ndim == 3:
        differs = differs.any(axis=0)
    if differs.any():
        y, x = (int(values[0]) for values in np.nonzero(differs))
        raise VerifyError(
            f"{store.location}: {what}, {box}: {int(differs.sum())} pixels differ from {against}, "
            f"the first at y {box.y0 + y}, x {box.x0 + x}; make it again with --overwrite"
        )


def slide_of(record: Mapping[str, Any], path: str | None) -> tuple[Slide | None, str]:
    """Open the slide that a store was made from, if it is still there; and say what was found."""
    source = record.get("source")
    recorded = source.get("path") if isinstance(source, dict) else None
    where = path if path is not None else recorded
    if not isinstance(where, str):
        return None, "not recorded"
    if path is None and not Path(where).exists():
        return None, f"gone ({where})"
    try:
        slide = open_slide(
            where, on_damage="fill" if record.get("on_damage") == "fill" else "error"
        )
    except (TilepipeError, OSError) as error:
        if path is not None:
            raise
        return None, f"cannot be opened: {error}"
    kept = record.get("input")
    now = slide.fingerprint()
    if isinstance(kept, dict) and path is None and content(kept) != content(now):
        slide.close()
        return None, f"replaced by another file ({where})"
    return slide, where


def check_slide(store: Store, slide: Slide, *, tell: Tell) -> int:
    """Compare image level 0 with the slide, pixel by pixel; returns the units compared."""
    level = store.image(0)
    sides, there = (store.channels, *store.extent), (slide.channels, *slide.levels[0].shape)
    if sides != there:
        shapes = [" x ".join(map(str, each)) for each in (there, sides)]
        raise VerifyError(
            f"{store.location}: {slide.path} is not its slide: {shapes[0]} (c, y, x) instead of "
            f"{shapes[1]}; name the one that the store was made from with --slide"
        )

    def check(unit: Unit) -> None:
        where = f"image level 0, {unit.box}"
        expected = slide.read(unit.box)
        _same(
            store, expected, _read(level, unit.box, where), unit.box, "image level 0", "the slide"
        )

    _check_units(level, check, Count(tell, "the slide", prod(level.shape)))
    return len(level.grid)
