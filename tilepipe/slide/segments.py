"""``PagePixels``: region reads from one TIFF page, segment by segment (tile or strip).

Only the segments under a box are read, with ``os.pread``; each is decoded once and held in the
slide's cache. Raw strips are not decoded at all: the rows of the box are read where they lie.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilepipe.buffers import empty
from tilepipe.errors import DamageError
from tilepipe.slide import jpeg
from tilepipe.slide.cache import SegmentCache
from tilepipe.slide.codestream import STREAMS, declared_shape, holds_ycbcr, ycbcr_to_rgb
from tilepipe.slide.lerc import LERC, decode_lerc
from tilepipe.slide.types import Pixels
from tilepipe.tiling import Box, Shape

SEGMENT_LIMIT_BYTES = 512 << 20
"""Largest decoded tile or compressed strip; beyond it a header is not believed."""
_BAND_BYTES = 16 << 20
_GDAL_NODATA = 42113
_JPEG_CODES = {6, 7, 33007, 34892}


class SegmentError(ValueError):
    """One segment that cannot be decoded; the slide turns it into DamageError or a fill."""

    def __init__(self, index: int, box: Box, reason: str) -> None:
        super().__init__(reason)
        self.index, self.box, self.reason = index, box, reason


Repair = Callable[[SegmentError], None]


@dataclass
class PagePixels:
    """Pixels (samples, y, x) of one page in stored orientation and the file's own dtype."""

    page: Any
    """tifffile's page or frame; its keyframe tells the structure."""
    fd: int
    file_bytes: int
    cache: SegmentCache
    offsets: NDArray[np.int64]
    counts: NDArray[np.int64]
    key: tuple[int, int]
    """(level, plane): tells the pages of a slide apart in the cache."""
    fill: Any = 0
    """Value of filled tiles."""
    absent: Any = None
    """Value of tiles that the writer left out; None: what the file calls no data, else 0."""
    filled: set[int] = field(default_factory=set)
    """Damaged segments that the slide decided to fill."""

    def __post_init__(self) -> None:
        keyframe = self.page.keyframe
        separate, _, y, x, contiguous = keyframe.shaped
        self.shape: Shape = (y, x)
        self.n_samples: int = separate * contiguous
        self.separate = separate > 1
        self.dtype: np.dtype[Any] = np.dtype(keyframe.dtype)
        self.tiled = bool(keyframe.is_tiled)
        if self.tiled:
            self.side: Shape = (keyframe.tilelength, keyframe.tilewidth)
        else:
            self.side = (min(keyframe.rowsperstrip, y), x)
        self.grid: Shape = (-(-y // self.side[0]), -(-x // self.side[1]))
        self.samples_each: int = contiguous
        self.is_jpeg = int(keyframe.compression) in _JPEG_CODES
        photometric = int(keyframe.photometric)
        # Grey of several samples: nothing to transform, whatever a decoder would guess.
        self.several_greys = photometric in (0, 1) and contiguous > 1
        self.untransformed = (
            self.is_jpeg
            and not keyframe.is_jfif
            and (self.several_greys or (photometric == 2 and not keyframe.extrasamples))
        )
        if self.absent is None:
            self.absent = _no_data(keyframe)
        # Read now: the library's file is closed later.
        self.jpegtables: bytes | None = self.page.jpegtables if self.is_jpeg else None
        self.jpegheader: bytes | None = keyframe.jpegheader if self.is_jpeg else None
        self.stored_dtype = self.dtype.newbyteorder(keyframe.parent.byteorder)
        self.raw_rows = (
            not self.tiled
            and int(keyframe.compression) == 1
            and int(keyframe.predictor) == 1
            and int(keyframe.fillorder) == 1
            and keyframe.bitspersample == self.dtype.itemsize * 8
        )

    @property
    def segment_bytes(self) -> int:
        """Bytes of one whole decoded segment."""
        return self.side[0] * self.side[1] * self.samples_each * self.dtype.itemsize

    def segment_box(self, index: int) -> Box:
        """Return the px of the image under segment ``index``."""
        iy, ix = divmod(index % (self.grid[0] * self.grid[1]), self.grid[1])
        y0, x0 = iy * self.side[0], ix * self.side[1]
        y1, x1 = min(y0 + self.side[0], self.shape[0]), min(x0 + self.side[1], self.shape[1])
        return Box(y0, x0, y1, x1)

    def read(self, box: Box, samples: Sequence[int], *, repair: Repair) -> Pixels:
        """Pixels (len(samples), y, x) of ``box``, which lies inside the page.

        ``repair`` is called with each SegmentError: it raises, or the tile is filled.
        """
        out = empty((len(samples), *box.shape), self.dtype)
        if box.area == 0:
            return out
        per_plane = self.grid[0] * self.grid[1]
        if self.separate:
            for position, sample in enumerate(samples):
                self._read_plane(
                    out[position : position + 1], box, sample * per_plane, (0,), repair
                )
        else:
            self._read_plane(out, box, 0, samples, repair)
        return out

    def _read_plane(
        self, out: Pixels, box: Box, first: int, samples: Sequence[int], repair: Repair
    ) -> None:
        for index, place in self._touching(box):
            part = box.intersect(place)
            target = out[(slice(None), *part.shift(-box.y0, -box.x0).slices)]
            inside = part.shift(-place.y0, -place.x0)
            try:
                self._read_segment(target, first + index, inside, samples)
            except SegmentError as error:
                repair(error)
                target[...] = self.fill

    def _touching(self, box: Box) -> Iterator[tuple[int, Box]]:
        """Segments under ``box`` in reading order: (running number in the plane, px)."""
        sy, sx = self.side
        for iy in range(box.y0 // sy, (box.y1 - 1) // sy + 1):
            for ix in range(box.x0 // sx, (box.x1 - 1) // sx + 1):
                index = iy * self.grid[1] + ix
                yield index, self.segment_box(index)

    def _read_segment(self, target: Pixels, index: int, part: Box, samples: Sequence[int]) -> None:
        """Copy ``part`` (px from the segment's corner) of the ``samples`` into ``target``."""
        if index in self.filled:
            target[...] = self.fill
            return
        offset, count = int(self.offsets[index]), int(self.counts[index])
        if offset == 0 and count == 0:
            # A sparse file: the writer left the tile out on purpose.
            target[...] = self.absent
            return
        self._check_extent(index, offset, count)
        if self.raw_rows:
            self._read_raw(target, index, part, samples)
            return
        segment = self.cache.get((*self.key, index), lambda: self._decode(index))
        for position, sample in enumerate(samples):
            target[position] = segment[(*part.slices, sample)]

    def _check_extent(self, index: int, offset: int, count: int) -> None:
        if offset <= 0 or count <= 0:
            raise self._error(index, f"has {count} bytes at offset {offset}")
        if offset + count > self.file_bytes:
            raise self._error(
                index,
                f"lies at bytes {offset} to {offset + count} of a file of {self.file_bytes} bytes",
            )

    def _error(self, index: int, reason: str) -> SegmentError:
        return SegmentError(index, self.segment_box(index), reason)

    def _read_raw(self, target: Pixels, index: int, part: Box, samples: Sequence[int]) -> None:
        """Copy rows of a raw strip, at most 16 MiB of the file at a time."""
        place = self.segment_box(index)
        pixel = self.samples_each * self.dtype.itemsize
        row = self.shape[1] * pixel
        start = int(self.offsets[index])
        if int(self.counts[index]) < place.shape[0] * row:
            raise self._error(
                index, f"has {self.counts[index]} bytes, its rows need {place.shape[0] * row}"
            )
        # A narrow box of very long rows is read row by row, otherwise whole rows at once.
        narrow = part.shape[1] * 8 < self.shape[1] and row > 1 << 16
        columns = (part.x0, part.x1) if narrow else (0, self.shape[1])
        step = 1 if narrow else max(1, _BAND_BYTES // row)
        width = columns[1] - columns[0]
        for y in range(part.y0, part.y1, step):
            rows = min(step, part.y1 - y)
            data = self._pread(index, start + y * row + columns[0] * pixel, rows * width * pixel)
            band = np.frombuffer(data, self.stored_dtype).reshape(rows, width, self.samples_each)
            inside = band[:, part.x0 - columns[0] : part.x1 - columns[0]]
            for position, sample in enumerate(samples):
                target[position, y - part.y0 : y - part.y0 + rows] = inside[..., sample]

    def _pread(self, index: int, offset: int, count: int) -> bytes:
        try:
            data = os.pread(self.fd, count, offset)
        except OSError as error:
            raise self._error(index, f"cannot be read: {error.strerror or error}") from error
        if len(data) != count:
            raise self._error(index, f"ends after {len(data)} of {count} bytes")
        return data

    def _decode(self, index: int) -> Pixels:
        """Pixels (y, x, samples) of one whole segment; SegmentError."""
        data = self._pread(index, int(self.offsets[index]), int(self.counts[index]))
        try:
            segment = self._decode_jpeg(data, index) if self.is_jpeg else None
            if segment is None:
                segment = self._decode_other(data, index)
        except SegmentError:
            raise
        except Exception as error:
            if isinstance(error, MemoryError) and _asked_bytes(error) <= SEGMENT_LIMIT_BYTES:
                raise  # this machine's to lack, not the tile's
            raise self._error(index, f"cannot be decoded: {_first_line(error)}") from error
        place = self.segment_box(index)
        if (
            segment.ndim != 3
            or segment.shape[0] < place.shape[0]
            or segment.shape[1] < place.shape[1]
            or segment.shape[2] != self.samples_each
        ):
            raise self._error(
                index,
                f"decodes to {segment.shape}, not to {(*place.shape, self.samples_each)}",
            )
        if self.dtype == np.bool_ and segment.dtype == np.uint8:
            segment = segment.astype(np.bool_)  # CCITT decoders give bytes
        if segment.dtype != self.dtype:
            raise self._error(index, f"decodes to {segment.dtype}, not to {self.dtype}")
        return segment

    def _decode_jpeg(self, data: bytes, index: int) -> Pixels | None:
        """Decode strictly; None where only the lenient decoder knows the kind of JPEG."""
        keyframe = self.page.keyframe
        stream = jpeg.whole_stream(data, tables=self.jpegtables, header=self.jpegheader)
        frame = jpeg.check_structure(stream)
        place = self.segment_box(index)
        remaining = (self.shape[0] - place.y0, self.shape[1] - place.x0)
        if not jpeg.fits(frame, self.side, remaining, tiled=self.tiled):
            raise self._error(
                index,
                f"holds a JPEG of {frame.height} x {frame.width} px (y, x), "
                f"the tile is {self.side[0]} x {self.side[1]}",
            )
        extra = frame.components == 3 and keyframe.extrasamples and not self.several_greys
        plain = frame.turbo and frame.components == self.samples_each and self.dtype == np.uint8
        if extra or not plain:
            jpeg.check_strict(stream, frame)
            return None
        return jpeg.decode_strict(stream, frame, untransformed=self.untransformed)

    def _decode_other(self, data: bytes, index: int) -> Pixels:
        keyframe = self.page.keyframe
        arguments: dict[str, Any] = {}
        if self.is_jpeg:
            arguments = {"jpegtables": self.jpegtables, "jpegheader": self.jpegheader}
        code = int(keyframe.compression)
        declared = declared_shape(data) if code in STREAMS else None
        if declared is not None and declared[0] * declared[1] > 4 * self.side[0] * self.side[1]:
            raise self._error(
                index,
                f"holds an image of {declared[0]} x {declared[1]} px (y, x), "
                f"the tile is {self.side[0]} x {self.side[1]}",
            )
        if code == LERC and int(keyframe.predictor) == 1:  # only tifffile writes it with another
            swapped = not self.stored_dtype.isnative
            return decode_lerc(data, samples=self.samples_each, swapped=swapped)
        try:
            decoded, _, _ = keyframe.decode(data, index, **arguments)
        except Exception:
            if self.tiled or self.segment_box(index).shape[0] == self.side[0]:
                raise
            # The last strip: GDAL writes whole ones where it fills what was never written.
            decoded, _, _ = keyframe.decode(data, 0, **arguments)
        if decoded is None or decoded.ndim != 4 or decoded.shape[0] != 1:
            raise self._error(index, "decodes to nothing")
        pixels = np.asarray(decoded[0])
        if self.dtype == np.uint8 and holds_ycbcr(
            data, compression=code, photometric=int(keyframe.photometric)
        ):
            return ycbcr_to_rgb(pixels)
        return pixels


def _no_data(keyframe: Any) -> Any:
    """Return the value of what is not stored, as the file says it and GDAL reads it; else 0.

    Not the library's: to that any text is true of bits, and int16 has no 300.
    """
    text = str(keyframe.tags.valueof(_GDAL_NODATA, "0")).strip().replace(",", ".")
    dtype = np.dtype(keyframe.dtype)
    if dtype == np.bool_:
        return text == "1"
    try:
        value = float(text)
    except ValueError:
        return 0
    if dtype.kind not in "iu":
        with np.errstate(over="ignore"):
            return np.asarray(value).astype(dtype)[()]
    limits = np.iinfo(dtype)
    # Rounded, and the nearest that the dtype has.
    return 0 if math.isnan(value) else math.floor(min(max(value, limits.min), limits.max) + 0.5)


def _asked_bytes(error: MemoryError) -> int:
    """Return what numpy could not get, 0 where it was not numpy that asked."""
    shape, dtype = getattr(error, "shape", None), getattr(error, "dtype", None)
    return math.prod(shape) * np.dtype(dtype).itemsize if shape is not None else 0


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:200]


def damage_error(path: str, level: int, error: SegmentError) -> DamageError:
    """Name file, level, tile and pixel box of a damaged segment, and the way out."""
    return DamageError(
        f"{path}: level {level}, tile {error.index} ({error.box}) {error.reason}; "
        "copy the file again, or give run or ingest --on-damage fill to go on without this tile"
    )
