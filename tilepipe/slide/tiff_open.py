"""``open_tiff``: believe a TIFF's header only as far as the file bears it out."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from tilepipe.errors import DamageError, SlideError
from tilepipe.slide.cache import SegmentCache
from tilepipe.slide.chain import check_chain
from tilepipe.slide.channels import read_channels
from tilepipe.slide.levels import choose_series, find_planes, plane_numbers, sides, true_levels
from tilepipe.slide.mpp import PixelSize, read_mpp
from tilepipe.slide.pixels import Orientation, read_meaning
from tilepipe.slide.segments import PagePixels, SegmentError, damage_error
from tilepipe.slide.tables import check_segments, first_missing
from tilepipe.slide.tiff import TiffLevel, TiffSlide, facts_of
from tilepipe.slide.types import OnDamage, check_size

CACHE_BYTES = 128 << 20
MAX_CHANNELS = 1024
_SCANNED = {"svs", "ndpi", "scn", "philips", "qptiff"}

# What tifffile has to say about a file is said by our own errors and notes.
logging.getLogger("tifffile").addHandler(logging.NullHandler())
logging.getLogger("tifffile").propagate = False


class OverlapError(SlideError):
    """Tiles that overlap: only OpenSlide knows how they lie."""


def open_tiff(
    path: str,
    *,
    mpp: float | None,
    max_pixels: int,
    on_damage: OnDamage,
    cache_bytes: int = CACHE_BYTES,
    ids: bool = False,
) -> TiffSlide:
    """Open and check a TIFF of any kind that tifffile knows.

    Raises SlideError naming the file and what is wrong with it, whatever the library raised.
    """
    opener = _Opener(path, mpp, max_pixels, on_damage, cache_bytes, ids=ids)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return opener.open()
    except SlideError:
        opener.close()
        raise
    except OSError as error:
        opener.close()
        raise SlideError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:
        opener.close()
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise SlideError(f"{path}: the TIFF structure is damaged: {said}") from error


class _Opener:
    """Steps of opening one file, and the descriptors to close if one of them fails."""

    def __init__(
        self,
        path: str,
        mpp: float | None,
        max_pixels: int,
        on_damage: OnDamage,
        cache_bytes: int,
        *,
        ids: bool = False,
    ) -> None:
        self.ids = ids
        self.path, self.mpp, self.max_pixels, self.on_damage = path, mpp, max_pixels, on_damage
        self.cache = SegmentCache(cache_bytes)
        self.descriptors: dict[str, int] = {}
        self.facts: list[tuple[int, int]] = []
        self.notes: list[str] = []

    def close(self) -> None:
        for descriptor in self.descriptors.values():
            os.close(descriptor)
        self.descriptors.clear()

    def open(self) -> TiffSlide:
        beyond = check_chain(self.path, self._descriptor(str(Path(self.path).resolve())))
        if beyond is not None:
            self.notes.append(beyond)
        with tifffile.TiffFile(self.path) as tiff:
            series = choose_series(self.path, tiff, self.notes)
            if series.kind == "bif":
                raise OverlapError(
                    f"{self.path}: Ventana BIF tiles overlap; install tilepipe[wsi] to read it"
                )
            keyframe = series.keyframe
            check_size(self.path, sides(series), self.max_pixels)
            numbers = plane_numbers(self.path, series, self.notes)
            level0 = self._level(series, 0, numbers)
            page = level0.pages[0]
            if page.n_samples * len(numbers) > MAX_CHANNELS:
                raise SlideError(
                    f"{self.path}: declares {page.n_samples * len(numbers)} channels, more than "
                    f"{MAX_CHANNELS}; the header is damaged, or choose some of them"
                )
            meaning = read_meaning(
                self.path, keyframe, page.n_samples, n_planes=len(numbers), ids=self.ids
            )
            if len(numbers) > 1 and meaning.channels > 1:
                raise SlideError(
                    f"{self.path}: {len(numbers)} channels of {meaning.channels} samples each "
                    f"(axes {series.axes}); write the channels as single samples"
                )
            orientation = self._orientation(keyframe)
            levels = [level0]
            for level in true_levels(tiff, series, self.notes)[1:]:
                try:
                    levels.append(self._level(level, len(levels), numbers))
                except SlideError as error:
                    reason = str(error).removeprefix(f"{self.path}: ")
                    self.notes.append(f"an overview is ignored: {reason}")
            names, colors = read_channels(series, meaning=meaning, n_planes=len(numbers))
            slide = TiffSlide(
                self.path,
                kind=_kind(series.kind, keyframe),
                levels=tuple(levels),
                meaning=meaning,
                orientation=orientation,
                pixel_size=self._pixel_size(series, orientation),
                channel_names=names,
                channel_colors=colors,
                notes=(*meaning.notes, *self.notes),
                on_damage=self.on_damage,
                cache=self.cache,
                descriptors=self.descriptors,
                facts=self.facts,
            )
        if slide.rgb and meaning.palette is None:
            for each in (page for level in levels for page in level.pages):
                # Damage on a bright-field slide looks like glass, not like ink.
                each.fill = np.iinfo(each.dtype).max if each.dtype.kind in "iu" else 1
                if slide.format in _SCANNED:
                    # Scanners leave out tiles of bare glass.
                    each.absent = each.fill
        self._check_complete(level0, slide)
        return slide

    def _descriptor(self, source: str) -> int:
        if source not in self.descriptors:
            opened = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
            self.descriptors[source] = opened
            # Before its structure is read, which pixels written later would not fit.
            self.facts.append(facts_of(opened))
        return self.descriptors[source]

    def _level(self, series: Any, number: int, numbers: tuple[int, ...]) -> TiffLevel:
        pages = []
        for k, plane in enumerate(find_planes(self.path, series, numbers)):
            descriptor = self._descriptor(str(Path(plane.page.parent.filehandle.path).resolve()))
            pixels = PagePixels(
                page=plane.page,
                fd=descriptor,
                file_bytes=os.fstat(descriptor).st_size,
                cache=self.cache,
                offsets=plane.offsets,
                counts=plane.counts,
                key=(number, k),
            )
            check_segments(self.path, pixels)
            self._check_decoder(plane.page)
            pages.append(pixels)
        kinds = {(page.shape, page.n_samples, page.dtype) for page in pages}
        if len(kinds) > 1:
            raise SlideError(f"{self.path}: channels of different sizes or dtypes")
        return TiffLevel(tuple(pages), _compression_name(series.keyframe.compression))

    def _check_decoder(self, page: Any) -> None:
        try:
            # Decoders that cannot work say so even without data.
            page.keyframe.decode(None, 0)
        except Exception as error:
            said = " ".join(str(error).split())[:200]
            raise SlideError(f"{self.path}: this kind of TIFF cannot be decoded: {said}") from error

    def _orientation(self, keyframe: Any) -> Orientation:
        value = keyframe.tags.valueof(274, 1)
        orientation = Orientation(value if value in range(1, 9) else 1)
        if orientation.value != 1:
            self.notes.append(f"turned upright (Orientation {orientation.value})")
        return orientation

    def _pixel_size(self, series: Any, orientation: Orientation) -> PixelSize:
        if self.mpp is not None:
            return PixelSize((self.mpp, self.mpp), "given")
        size = read_mpp(series)
        if size.mpp is not None and orientation.swaps:
            return PixelSize((size.mpp[1], size.mpp[0]), size.source)
        return size

    def _check_complete(self, level0: TiffLevel, slide: TiffSlide) -> None:
        """Refuse a file that was cut off, before hours are spent on its first half."""
        if self.on_damage == "fill":
            return
        for page in level0.pages:
            found = first_missing(page)
            if found is not None:
                first, reason = found
                box = slide.orientation.shown_box(page.segment_box(first), slide.levels[0].shape)
                error: DamageError = damage_error(self.path, 0, SegmentError(first, box, reason))
                raise error


def _compression_name(compression: Any) -> str:
    name = getattr(compression, "name", str(compression)).lower()
    return "none" if name == "1" else name


def _kind(kind: str, keyframe: Any) -> str:
    if kind in ("svs", "ndpi", "ome", "scn", "philips", "imagej", "qpi"):
        return {"qpi": "qptiff"}.get(kind, kind)
    if keyframe.is_philips:
        return "philips"
    return "geotiff" if keyframe.is_geotiff else "tiff"
