"""``OmeZarrSlide``: a foreign OME-Zarr image (0.4 or 0.5) on a local disk, as a Slide."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from tilepipe.blosc import HEADER_BYTES, frame_bytes, is_blosc
from tilepipe.errors import DamageError, SlideError, no_image_said
from tilepipe.replaced import is_another, mark_of
from tilepipe.slide.channels import default_channels
from tilepipe.slide.damage import Damage, DamagedTile
from tilepipe.slide.fingerprint import fingerprint_folder
from tilepipe.slide.mpp import PixelSize, um_per
from tilepipe.slide.pixels import exact_dtype
from tilepipe.slide.types import LevelInfo, OnDamage, Pixels, check_read, check_size
from tilepipe.tiling import Box

MOST_CHUNK_BYTES = 2 << 30
"""Largest decoded chunk, as where an image is segmented in place."""


def is_zarr(folder: Path) -> bool:
    """Tell whether a folder has the metadata of a zarr group or array."""
    return any((folder / name).is_file() for name in ("zarr.json", ".zgroup", ".zattrs", ".zarray"))


def _is_array(folder: Path) -> bool:
    """Tell whether a Zarr folder is an array: a level of an image, say, not an image."""
    if (folder / "zarr.json").is_file():
        found = json.loads((folder / "zarr.json").read_bytes())
        return isinstance(found, dict) and found.get("node_type") == "array"
    return (folder / ".zarray").is_file()


def open_ome_zarr(
    path: str, *, mpp: float | None, max_pixels: int, on_damage: OnDamage = "error"
) -> OmeZarrSlide:
    """Open the image of an OME-Zarr folder; SlideError says what is missing or damaged."""
    try:
        return OmeZarrSlide(path, mpp=mpp, max_pixels=max_pixels, on_damage=on_damage)
    except SlideError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise SlideError(f"{path}: the OME-Zarr metadata is damaged: {said}") from error


class OmeZarrSlide:
    """The first multiscales image of a group; axes (c, y, x), any t and z of length 1."""

    format = "ome-zarr"

    def __init__(
        self, path: str, *, mpp: float | None, max_pixels: int, on_damage: OnDamage
    ) -> None:
        import zarr  # heavy: only for Zarr inputs

        self.path = path
        self._on_damage = on_damage
        if _is_array(Path(path)):
            raise SlideError(
                f"{path}: is a Zarr array, not an OME-Zarr image; give the group that it lies in, "
                "the one with the multiscales metadata"
            )
        # Consolidated metadata may tell of arrays that were replaced since.
        group = zarr.open_group(path, mode="r", use_consolidated=False)
        attributes = dict(group.attrs)
        found = attributes.get("ome", attributes)
        ome: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
        multiscales = ome.get("multiscales")
        if not multiscales:
            raise SlideError(f"{path}: {no_image_said(path, ome)}")
        image = multiscales[0]
        self._axes = _axis_names(path, image)
        sets = image["datasets"]
        arrays = [group[entry["path"]] for entry in sets]
        if any(
            not isinstance(array, zarr.Array) or array.ndim != len(self._axes) for array in arrays
        ):
            raise SlideError(f"{path}: levels that are not arrays of axes {self._axes}")
        self._y, self._x = self._axes.index("y"), self._axes.index("x")
        self._c = self._axes.index("c") if "c" in self._axes else None
        first: Any = arrays[0]
        check_size(path, (first.shape[self._y], first.shape[self._x]), max_pixels)
        for axis, size in zip(self._axes, first.shape, strict=True):
            if axis not in "cyx" and size != 1:
                raise SlideError(
                    f"{path}: {size} planes along {axis} (shape {first.shape}); "
                    "write the plane to be segmented to an image of its own"
                )
        notes: list[str] = []
        if len(multiscales) > 1:
            notes.append(f"{len(multiscales)} multiscales in the group; the first one is used")
        self.stored_dtype = np.dtype(first.dtype).newbyteorder("=")
        self.dtype = exact_dtype(path, first.dtype, first.dtype.itemsize * 8, notes)
        self.channels = 1 if self._c is None else int(first.shape[self._c])
        self._arrays = self._true_levels(arrays, notes)
        self._folders = [Path(path) / array.path for array in self._arrays]
        self._marks = [mark_of(folder) for folder in self._folders]
        self._check_chunks()
        self.notes = tuple(notes)
        self.levels = tuple(self._level_info(array) for array in self._arrays)
        self.channel_names, self.channel_colors, self.rgb = _read_omero(
            ome.get("omero"), self.channels, self.dtype
        )
        size = (
            PixelSize((mpp, mpp), "given") if mpp is not None else self._pixel_size(image, sets[0])
        )
        self.mpp, self.mpp_source = size.mpp, size.source
        self.damage = Damage()
        self._lock = threading.Lock()

    def _check_chunks(self) -> None:
        """Refuse what would take absurd memory to read one pixel of."""
        for array in self._arrays:
            if math.prod(array.chunks) * array.dtype.itemsize > MOST_CHUNK_BYTES:
                raise SlideError(
                    f"{self.path}: array {array.path} has chunks of {array.chunks} {array.dtype}; "
                    f"the limit is {MOST_CHUNK_BYTES >> 30} GiB: write it anew in smaller chunks"
                )

    def _true_levels(self, arrays: Sequence[Any], notes: list[str]) -> tuple[Any, ...]:
        kept = [arrays[0]]
        for array in arrays[1:]:
            y, x = array.shape[self._y], array.shape[self._x]
            finer = kept[-1].shape
            channels = 1 if self._c is None else array.shape[self._c]
            smaller = 0 < y <= finer[self._y] and 0 < x <= finer[self._x]
            if smaller and channels == self.channels and array.dtype == arrays[0].dtype:
                kept.append(array)
            else:
                notes.append(f"level {array.path} is ignored: it is not the image made smaller")
        return tuple(kept)

    def _level_info(self, array: Any) -> LevelInfo:
        full = self._arrays[0].shape
        y, x = int(array.shape[self._y]), int(array.shape[self._x])
        tile = array.shards or array.chunks
        return LevelInfo(
            shape=(y, x),
            downsample=(full[self._y] / y, full[self._x] / x),
            tile=(int(tile[self._y]), int(tile[self._x])),
            compression="zarr",
            piece_bytes=self._piece_bytes(array),
        )

    def _piece_bytes(self, array: Any) -> int:
        chunk = math.prod(array.chunks) * array.dtype.itemsize
        # zarr decodes those of all channels at once.
        return chunk if self._c is None else chunk * -(-self.channels // array.chunks[self._c])

    def _pixel_size(self, image: Mapping[str, Any], dataset: Mapping[str, Any]) -> PixelSize:
        scale = [1.0] * len(self._axes)
        steps = [
            *dataset.get("coordinateTransformations", ()),
            *image.get("coordinateTransformations", ()),
        ]
        for step in steps:
            if step.get("type") == "scale":
                scale = [a * float(b) for a, b in zip(scale, step["scale"], strict=True)]
        sides = []
        for index in (self._y, self._x):
            axis = image.get("axes", [])[index] if image.get("axes") else {}
            per = um_per(str(axis.get("unit"))) if isinstance(axis, Mapping) else None
            size = scale[index] * per if per is not None else math.nan
            sides.append(size)
        if all(math.isfinite(size) and size > 0 for size in sides):
            return PixelSize((sides[0], sides[1]), "OME-Zarr scale")
        return PixelSize(None, "unknown: the OME-Zarr axes have no length unit; pass --slide-mpp")

    def read(self, box: Box, *, level: int = 0) -> Pixels:
        """Pixels (c, y, x) of ``box``, level px; DamageError where a chunk cannot be decoded.

        SlideError where another program has begun the image anew since it was opened.
        """
        check_read(self, box, level)
        pixels = self._read_or_fill(box, level)
        self._check_same(level)
        return pixels

    def _check_same(self, level: int) -> None:
        """Raise SlideError if what was just read may be of another array, or of none."""
        if is_another(mark_of(self._folders[level]), self._marks[level]):
            raise SlideError(
                f"{self.path}: level {level} was begun anew by another program, or taken away, "
                "while it was read; what is done is of the image as it was: restore that and run "
                "the same command again, or begin anew with --overwrite once it stays as it is"
            )

    def _read_or_fill(self, box: Box, level: int) -> Pixels:
        try:
            return self._read_stored(box, level)
        except MemoryError:  # this machine's to lack, not the chunk's
            raise
        except Exception as error:
            self._check_same(level)
            said = " ".join(str(error).split())[:200] or type(error).__name__
            if self._on_damage == "fill":
                return self._read_around(box, level)
            raise DamageError(
                f"{self.path}: level {level}, {box}: cannot be decoded: {said}; copy it again, "
                "or give run or ingest --on-damage fill to go on without the damaged chunks"
            ) from error

    def _read_stored(self, box: Box, level: int) -> Pixels:
        index: list[slice | int] = [0] * len(self._axes)
        index[self._y], index[self._x] = box.slices
        if self._c is not None:
            index[self._c] = slice(None)
        self._check_files(self._arrays[level], box)
        pixels = np.asarray(self._arrays[level][tuple(index)])
        kept = [axis for axis in self._axes if axis in "cyx"]
        order = [kept.index(axis) for axis in "cyx" if axis in kept]
        pixels = pixels.transpose(order)
        if self._c is None:
            pixels = pixels[np.newaxis]
        return np.ascontiguousarray(pixels.astype(self.dtype, copy=False))

    def _check_files(self, array: Any, box: Box) -> None:
        """Raise ValueError if a shard under ``box`` is an empty file, or a chunk was cut off.

        An empty shard is fill value to zarr, and Blosc decodes what lies in memory behind a frame
        that was cut off. Others find it themselves: of a shard that was cut off the index is gone.
        """
        if array.shards is None and not is_blosc(array):
            return
        stored = array.shards or array.chunks
        spans = [range(1)] * len(self._axes)
        for axis, low, high in ((self._y, box.y0, box.y1), (self._x, box.x0, box.x1)):
            spans[axis] = range(low // stored[axis], -(-high // stored[axis]))
        if self._c is not None:
            spans[self._c] = range(-(-self.channels // stored[self._c]))
        for place in itertools.product(*spans):
            name = array.metadata.encode_chunk_key(place)
            with (
                contextlib.suppress(FileNotFoundError),  # all of it has the fill value
                (Path(self.path) / array.path / name).open("rb") as file,
            ):
                found = os.fstat(file.fileno()).st_size
                wanted = 1 if array.shards is not None else frame_bytes(file.read(HEADER_BYTES))
                if found == 0:
                    raise ValueError(f"{name} is an empty file")
                if found < wanted:
                    raise ValueError(f"chunk {name} was cut off, it has {found} of {wanted} bytes")

    def _read_around(self, box: Box, level: int) -> Pixels:
        """Read chunk by chunk; fill and record those that cannot be decoded."""
        bright = self.rgb and self.dtype == np.uint8
        out = np.full((self.channels, *box.shape), 255 if bright else 0, self.dtype)
        array = self._arrays[level]
        high, wide = (int(array.chunks[axis]) for axis in (self._y, self._x))
        columns = -(-self.levels[level].shape[1] // wide)
        for iy in range(box.y0 // high, -(-box.y1 // high)):
            for ix in range(box.x0 // wide, -(-box.x1 // wide)):
                place = Box(iy * high, ix * wide, (iy + 1) * high, (ix + 1) * wide)
                part = place.intersect(box)
                try:
                    pixels = self._read_stored(part, level)
                except MemoryError:
                    raise
                except Exception as error:
                    said = " ".join(str(error).split())[:200] or type(error).__name__
                    whole = place.intersect(Box.of_shape(self.levels[level].shape))
                    tile = DamagedTile(level, iy * columns + ix, whole, said)
                    with self._lock:
                        if tile not in self.damage:
                            self.damage.add(tile)
                    continue
                out[(slice(None), *part.shift(-box.y0, -box.x0).slices)] = pixels
        return out

    def fingerprint(self) -> dict[str, Any]:
        """Hash level 0: its metadata and up to 64 evenly spaced chunk files, names and content."""
        try:
            found = fingerprint_folder(Path(self.path) / self._arrays[0].path)
        except OSError as error:
            raise SlideError(f"{self.path}: cannot be read: {error.strerror or error}") from error
        shape = [self.channels, *self.levels[0].shape]
        return {**found, "shape": shape, "dtype": str(self.dtype)}

    def close(self) -> None:
        """Nothing is held open between reads."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _axis_names(path: str, image: Mapping[str, Any]) -> tuple[str, ...]:
    axes = image.get("axes")
    if not axes:
        return ("t", "c", "z", "y", "x")  # OME-Zarr up to 0.2
    names = tuple(str(axis["name"] if isinstance(axis, Mapping) else axis) for axis in axes)
    if "y" not in names or "x" not in names or len(set(names)) != len(names):
        raise SlideError(f"{path}: axes {names}; want y and x, and c if there are channels")
    return names


def _read_omero(
    omero: Any, count: int, dtype: np.dtype[Any]
) -> tuple[tuple[str, ...], tuple[str | None, ...], bool]:
    """Names, colours and whether the channels are red, green and blue."""
    entries = omero.get("channels") if isinstance(omero, Mapping) else None
    colors: tuple[str | None, ...] = (None,) * count
    if isinstance(entries, list) and len(entries) == count:
        colors = tuple(_hex(entry.get("color")) for entry in entries)
    rgb = colors == ("FF0000", "00FF00", "0000FF") or (
        count == 3 and dtype == np.uint8 and colors == (None,) * 3
    )
    names, default_colors = default_channels(count, rgb=rgb)
    if isinstance(entries, list) and len(entries) == count:
        names = tuple(
            str(entry.get("label") or name) for entry, name in zip(entries, names, strict=True)
        )
    return (
        names,
        tuple(color or other for color, other in zip(colors, default_colors, strict=True)),
        rgb,
    )


def _hex(color: Any) -> str | None:
    text = str(color or "").lstrip("#").upper()
    valid = len(text) == 6 and all(letter in "0123456789ABCDEF" for letter in text)
    return text if valid else None
