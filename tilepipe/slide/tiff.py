"""``TiffSlide``: the levels of an opened TIFF as one Slide."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from tilepipe.errors import SlideError
from tilepipe.slide.cache import SegmentCache
from tilepipe.slide.damage import Damage, DamagedTile
from tilepipe.slide.fingerprint import fingerprint_file
from tilepipe.slide.mpp import PixelSize
from tilepipe.slide.pixels import Meaning, Orientation
from tilepipe.slide.segments import PagePixels, SegmentError, damage_error
from tilepipe.slide.types import LevelInfo, OnDamage, Pixels, check_read
from tilepipe.tiling import Box, Shape


@dataclass(frozen=True, slots=True)
class TiffLevel:
    """One level: a page per channel, or one page with all of them."""

    pages: tuple[PagePixels, ...]
    compression: str

    @property
    def stored_shape(self) -> Shape:
        """Sides (y, x) as stored."""
        return self.pages[0].shape


def facts_of(descriptor: int) -> tuple[int, int]:
    """Return size and time of an open file, which change when it is written to."""
    found = os.fstat(descriptor)
    return found.st_size, found.st_mtime_ns


class TiffSlide:
    """A TIFF that was checked by ``open_tiff``; reads are thread-safe."""

    def __init__(
        self,
        path: str,
        *,
        kind: str,
        levels: tuple[TiffLevel, ...],
        meaning: Meaning,
        orientation: Orientation,
        pixel_size: PixelSize,
        channel_names: tuple[str, ...],
        channel_colors: tuple[str | None, ...],
        notes: tuple[str, ...],
        on_damage: OnDamage,
        cache: SegmentCache,
        descriptors: Mapping[str, int],
        facts: Sequence[tuple[int, int]],
    ) -> None:
        self.path = path
        self.format = kind
        self.dtype = meaning.dtype
        self.stored_dtype = np.dtype(levels[0].pages[0].dtype)
        self.channels = meaning.channels * len(levels[0].pages)
        self.channel_names = channel_names
        self.channel_colors = channel_colors
        self.rgb = meaning.rgb and self.channels == 3
        self.mpp = pixel_size.mpp
        self.mpp_source = pixel_size.source
        self.notes = notes
        self.damage = Damage()
        self.cache = cache
        self._levels = levels
        self._meaning = meaning
        self.orientation = orientation
        self._on_damage = on_damage
        self._descriptors = dict(descriptors)
        self._facts = list(facts)
        self._others = sorted(set(descriptors) - {str(Path(path).resolve())})
        self._lock = threading.Lock()
        self.levels = tuple(self._level_info(level) for level in levels)

    def _level_info(self, level: TiffLevel) -> LevelInfo:
        shown = self.orientation.shown
        full, shape = shown(self._levels[0].stored_shape), shown(level.stored_shape)
        page = level.pages[0]
        return LevelInfo(
            shape=shape,
            downsample=(full[0] / shape[0], full[1] / shape[1]),
            tile=shown(page.side) if page.tiled else None,
            compression=level.compression,
            piece_bytes=0 if page.raw_rows else page.segment_bytes,
        )

    @property
    def n_decodes(self) -> int:
        """Tiles and strips decoded so far."""
        return self.cache.loads

    def read(self, box: Box, *, level: int = 0) -> Pixels:
        """Pixels (c, y, x) of ``box``, level px; DamageError, SlideError outside the level."""
        check_read(self, box, level)
        if not self._descriptors:
            raise SlideError(f"{self.path}: was closed")
        stored = self.orientation.stored_box(box, self.levels[level].shape)
        try:
            parts = [self._read_page(page, stored, level) for page in self._levels[level].pages]
        finally:
            # Afterwards: what was read before anything was written is of the file that was opened.
            self._check_same()
        converted = [self._meaning.convert(part) for part in parts]
        pixels = converted[0] if len(converted) == 1 else np.concatenate(converted)
        return pixels if self.orientation.value == 1 else self.orientation.turn(pixels)

    def _check_same(self) -> None:
        """Raise SlideError if pixels that were just read, or are damaged, may be another file's."""
        if self._look() != self._facts:
            raise SlideError(
                f"{self.path}: was changed by another program while it was read; what is done is "
                "of the file as it was: restore that and run the same command again, or begin "
                "anew with --overwrite once the file stays as it is"
            )

    def _look(self) -> list[tuple[int, int]]:
        """Look at the files that are open; another file of the same name is not seen."""
        return [facts_of(descriptor) for descriptor in self._descriptors.values()]

    def _read_page(self, page: PagePixels, box: Box, level: int) -> Pixels:
        def repair(stored: SegmentError) -> None:
            # All lanes that waited for a tile get one error: it is left as it is.
            box = self.orientation.shown_box(stored.box, self.levels[level].shape)
            error = SegmentError(stored.index, box, stored.reason)
            if self._on_damage == "error":
                raise damage_error(self.path, level, error) from stored
            with self._lock:
                if error.index not in page.filled:
                    # Told before others take the fill for pixels.
                    self.damage.add(DamagedTile(level, error.index, error.box, error.reason))
                    page.filled.add(error.index)

        return page.read(box, self._meaning.samples, repair=repair)

    def fingerprint(self) -> dict[str, Any]:
        """Size, mtime_ns, sha256 of sampled content, shape (c, y, x) and dtype."""
        facts = fingerprint_file(self.path)
        if self._others:
            # OME-TIFF may spread its planes over several files.
            facts["parts"] = [fingerprint_file(other) for other in self._others]
        shape = [self.channels, *self.levels[0].shape]
        return {**facts, "shape": shape, "dtype": str(self.dtype)}

    def close(self) -> None:
        """Close the file."""
        descriptors, self._descriptors = self._descriptors, {}
        for descriptor in descriptors.values():
            os.close(descriptor)
        self.cache.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
