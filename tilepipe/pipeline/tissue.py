"""The tissue mask of a job: found once, while the network is still loaded, and kept in the store.

So every process, every part and every later run skips the same tiles, and none of them reads the
slide for it again; ``tilepipe/tissue/<label>.png`` shows what was taken for tissue.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from math import prod
from pathlib import Path

from tilepipe.errors import SlideError, StoreError
from tilepipe.pipeline.events import Note, OnEvent
from tilepipe.pipeline.source import Source
from tilepipe.slide import TissueMask, tissue_level, tissue_mask
from tilepipe.slide.tissue import Image
from tilepipe.spec import JobSpec
from tilepipe.store import TISSUE, Store, open_files
from tilepipe.tiling import Box, Shape, TilePlan

_MOST_BYTES = 64 << 20
_LEAST_SHARE = 0.25
_MANY_PX = 1 << 28
"""They take a second or more to be looked through for tissue."""
Find = Callable[[], TissueMask]


def given_tissue(extent: Shape, spec: JobSpec) -> TissueMask | None:
    """Read the mask image that the settings name, None if they name none; SlideError."""
    if spec.tissue in ("off", "auto"):
        return None
    return TissueMask.from_image(spec.tissue, extent)


def asked_tissue(spec: JobSpec) -> str:
    """Return what the settings ask for: ``off``, ``auto``, or the sha256 of a mask image."""
    if spec.tissue in ("off", "auto"):
        return spec.tissue
    try:
        with Path(spec.tissue).open("rb") as file:
            return f"mask {hashlib.file_digest(file, 'sha256').hexdigest()}"
    except OSError as error:
        raise SlideError(f"{spec.tissue}: not a mask image: {error.strerror or error}") from error


def look_for_tissue(source: Source, spec: JobSpec, on_event: OnEvent) -> Find | None:
    """Start to look for tissue beside other work, unless the output has a mask already.

    Returns what waits for the mask, and raises SlideError if a mask image cannot be used; None if
    the settings skip nothing.
    """
    if spec.tissue == "off":
        return None
    slide = source.image
    given = given_tissue(slide.levels[0].shape, spec)
    if given is not None:
        return lambda: given
    if any(True for _ in open_files(source.output).entries(TISSUE)):
        return lambda: _find(slide)
    height, width = slide.levels[tissue_level(slide)].shape
    if _takes_long(slide):
        text = f"no coarse level to look for tissue in: {width} x {height} px are read for it first"
        on_event(Note(source.name, text))
    found: Future[TissueMask] = Future()

    def look() -> None:
        try:
            found.set_result(_find(slide))
        except BaseException as error:
            found.set_exception(error)

    # A daemon: a mistake in the settings ends the command at once.
    threading.Thread(target=look, name="tilepipe-tissue", daemon=True).start()
    return found.result


def forecast_tissue(source: Source, spec: JobSpec) -> TissueMask | None:
    """Return the mask that a job will have; None if it skips nothing, or looking takes long."""
    if spec.tissue == "off":
        return None
    image = source.image
    given = given_tissue(image.levels[0].shape, spec)
    return given or (None if _takes_long(image) else _find(image))


def _takes_long(slide: Image) -> bool:
    return slide.rgb and prod(slide.levels[tissue_level(slide)].shape) >= _MANY_PX


def _find(slide: Image) -> TissueMask:
    found = tissue_mask(slide)
    if found is None:
        return TissueMask.everywhere(slide.levels[0].shape, "no bare glass: all is tissue")
    return found


def keep_tissue(store: Store, label: str, find: Find, *, anew: bool) -> TissueMask:
    """Return the mask that the store has for a label, or find it and put it there."""
    key = _key(label)
    if not anew:
        with suppress(StoreError):  # a run stopped before it, a torn file: the same is found again
            return read_tissue(store, label)
    mask = find()
    store.files.put(key, mask.to_png())
    return mask


def tissue_share(mask: TissueMask, *, plan: TilePlan, downsample: int) -> Callable[[Box], float]:
    """Return what tells how much of a box of a level has to be computed, for the schedule.

    0 where the network sees no tissue, else at least ``_LEAST_SHARE``: a unit that takes little of
    the device is still read and kept in memory until its turn.
    """

    def share(box: Box) -> float:
        seen = plan.footprint(box).enlarged(downsample)
        return max(_LEAST_SHARE, mask.share_of(seen)) if mask.any(seen) else 0.0

    return share


def read_tissue(store: Store, label: str) -> TissueMask:
    """Read the mask of a label; StoreError if there is none, or it is damaged."""
    key = _key(label)
    raw = store.files.get(key, limit_bytes=_MOST_BYTES)
    try:
        if raw is None:
            raise SlideError("missing")
        return TissueMask.from_png(raw)
    except SlideError as error:
        raise StoreError(
            f"{store.files.location}: {key}: {error}; run the same command again, it is made anew"
        ) from error


def _key(label: str) -> str:
    return f"{TISSUE}/{label}.png"
