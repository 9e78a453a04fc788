"""Annotated images: pairs by name, and pixels of any file that tilepipe reads."""

from __future__ import annotations

import csv
import hashlib
import re
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from tilepipe.errors import TrainError
from tilepipe.slide.pixels import Orientation
from tilepipe.tiling import Box, Shape

PILLOW_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp"})
SUFFIXES = PILLOW_SUFFIXES | {".tif", ".tiff", ".zarr", ".svs", ".ndpi", ".scn", ".npy"}
_TEXT = "utf-8-sig"
"""UTF-8, with the mark in front that spreadsheets write or without."""
IN_MEMORY_PX = 64 << 20
"""Images up to this many px are read once and kept."""


@dataclass(frozen=True)
class Raster:
    """Pixels of one image or label file: (c, y, x), read by boxes."""

    path: str
    extent: Shape
    channels: int
    dtype: np.dtype[Any]
    read: Callable[[Box], NDArray[Any]] = field(repr=False)
    """Box inside the extent -> (c, y, x)."""

    @property
    def in_memory(self) -> bool:
        """Whether the image is small enough to be kept."""
        return self.extent[0] * self.extent[1] <= IN_MEMORY_PX


def open_raster(path: Path, *, ids: bool = False) -> Raster:
    """Open an image, or with ``ids`` a label file; TrainError (or the reader's own) says why not.

    Pixels of an image are what is seen: palettes become colours, CMYK becomes RGB, alpha is left
    out, and black and white are 0 and 255. Ids are the numbers in the file: of a palette the
    indices, of black and white 0 and 1. What EXIF marks as turned is read upright, both.
    """
    suffix = path.suffix.lower()
    if suffix in PILLOW_SUFFIXES:
        planes = _read_pillow(path, ids=ids)
    elif suffix == ".npy":
        planes = _read_npy(path)
    else:
        return _of_slide(path, ids=ids)
    if planes.dtype == bool:
        planes = planes.astype(np.uint8) * np.uint8(1 if ids else 255)
    return of_array(planes, path=str(path))


# What Pillow calls its pixels -> what is seen of them. Conversions drop alpha and blend nothing.
_SEEN = {"P": "RGB", "PA": "RGB", "CMYK": "RGB", "YCbCr": "RGB", "RGBA": "RGB", "LA": "L"}
_LOSSY = ("JPEG", "MPO")
# Planes of grey or colour and alpha -> without it.
_WITHOUT_ALPHA = {2: 1, 4: 3}


def _read_pillow(path: Path, *, ids: bool) -> NDArray[Any]:
    """Read (c, y, x) pixels, or the ids, of a file that Pillow reads."""
    try:
        with _without_warnings(), Image.open(path) as image:
            lossy = image.format in _LOSSY
            pixels = _deep_colour(path)
            if pixels is None:
                pixels = np.asarray(image if ids else _seen(image))
            # Not by exif_transpose: of a turned image it writes all of EXIF anew, and fails of an
            # odd tag that says nothing of the pixels.
            marked: Any = image.getexif().get(ExifTags.Base.Orientation)
    except Image.DecompressionBombError as error:
        raise TrainError(
            f"{path}: is too large for an image that is read as a whole; save it as a tiled TIFF"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # of damaged bytes Pillow raises what comes
        raise TrainError(f"{path}: cannot be read as an image: {error}") from error
    if ids and lossy:
        raise TrainError(
            f"{path}: labels as JPEG, which keeps no ids but numbers near them; round or threshold "
            "them, and save PNG or TIFF"
        )
    planes = pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)
    upright = Orientation(marked if marked in range(1, 9) else 1)
    return upright.turn(planes[: _WITHOUT_ALPHA.get(planes.shape[0])])


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Let Pillow say nothing of large images, which are read, and of what is odd in EXIF."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _deep_colour(path: Path) -> NDArray[Any] | None:
    """Pixels of a PNG of which Pillow drops half the bits (it has no colour of 16); else None."""
    from tilepipe.slide.png import decode_deep_colour, is_deep_colour

    with path.open("rb") as stream:
        head = stream.read(26)
        return decode_deep_colour(head + stream.read()) if is_deep_colour(head) else None


def _seen(image: Image.Image) -> Image.Image:
    if image.mode not in _SEEN:
        return image
    # By way of RGBA: a palette may hold its alpha in a form that RGB does not take.
    coloured = image.convert("RGBA") if image.mode in ("P", "PA") else image
    return coloured.convert(_SEEN[image.mode])


def _read_npy(path: Path) -> NDArray[Any]:
    try:
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
    except MemoryError:
        raise
    except Exception as error:  # of a damaged header numpy raises what comes
        raise TrainError(f"{path}: cannot be read as a numpy array: {error}") from error
    if not isinstance(loaded, np.ndarray):
        raise TrainError(f"{path}: holds several arrays; save one of (c, y, x) or (y, x) alone")
    return loaded[None] if loaded.ndim == 2 else loaded


def _of_slide(path: Path, *, ids: bool) -> Raster:
    from tilepipe.slide import open_slide

    slide = open_slide(path, ids=ids)
    dtype = np.dtype(slide.dtype)
    # The reader has small integers as float32; ids are wanted as they are in the file
    # (test_train_images.py::test_ids_of_any_integer_kind).
    widened = dtype.kind == "f" and slide.stored_dtype.kind in "iu"
    stored = slide.stored_dtype if ids and widened else dtype
    raster = Raster(
        path=str(path),
        extent=slide.levels[0].shape,
        channels=slide.channels,
        dtype=stored,
        read=slide.read if stored == dtype else lambda box: slide.read(box).astype(stored),
    )
    # A slide is an open file, and a process may have a thousand: each validation opens all anew.
    weakref.finalize(raster, slide.close)
    return raster


def of_array(planes: NDArray[Any], *, path: str = "array") -> Raster:
    """Wrap a (c, y, x) array."""
    if planes.ndim != 3 or min(planes.shape) < 1:
        raise TrainError(f"{path}: got an array of shape {planes.shape}; (c, y, x) wanted")
    extent = (int(planes.shape[1]), int(planes.shape[2]))
    # scipy labels no parts of, and torch takes no, numbers whose bytes are the other way round.
    native = planes.dtype.newbyteorder("=")
    return Raster(
        path=path,
        extent=extent,
        channels=int(planes.shape[0]),
        dtype=native,
        read=lambda box: planes[(slice(None), *box.slices)].astype(native, copy=False),
    )


@dataclass(frozen=True)
class Pair:
    """One annotated image."""

    name: str
    image: Path
    labels: Path
    kind: str = ""


def open_pair(pair: Pair) -> tuple[Raster, Raster]:
    """Open image and labels; TrainError unless they have one extent."""
    image, labels = open_raster(pair.image), open_raster(pair.labels, ids=True)
    if image.extent != labels.extent:
        raise TrainError(
            f"{pair.image}: has {image.extent} px (y, x), its labels {pair.labels} have "
            f"{labels.extent}; labels are of the image's size"
        )
    return image, labels


def _by_name(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise TrainError(f"{folder}: no such folder")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in SUFFIXES or path.name.startswith("."):
            continue
        name = path.name[: -len(path.suffix)].removesuffix(".ome")
        if name in found:
            raise TrainError(f"{folder}: {found[name].name} and {path.name} have one name")
        found[name] = path
    return found


def find_pairs(
    images: Path,
    labels: Path,
    *,
    kinds: Mapping[str, str] | None = None,
) -> tuple[Pair, ...]:
    """Pair images and labels by file name without suffix; TrainError names what has no partner."""
    pictures, truths = _by_name(images), _by_name(labels)
    if images.samefile(labels):
        raise TrainError(
            f"{labels}: is the folder of the images, too: each would be its own labels; put labels "
            "into a folder of their own"
        )
    if not pictures:
        raise TrainError(f"{images}: no images (looked for {', '.join(sorted(SUFFIXES))})")
    alone = sorted(set(pictures) - set(truths))
    if alone:
        raise TrainError(
            f"{images}: {len(alone)} of {len(pictures)} images have no labels in {labels}, "
            f"first {alone[0]!r}; labels have the image's name"
        )
    return tuple(
        Pair(name, pictures[name], truths[name], (kinds or {}).get(name, ""))
        for name in sorted(pictures)
    )


def read_kinds(path: Path) -> dict[str, str]:
    """Read a CSV with columns ``id`` (file name without suffix) and ``kind``."""
    try:
        with path.open(newline="", encoding=_TEXT) as file:
            rows = [(row["id"], row["kind"]) for row in csv.DictReader(file)]
    except (OSError, KeyError, UnicodeDecodeError, csv.Error) as error:
        raise TrainError(f"{path}: a CSV with columns id and kind wanted: {error!r}") from error
    kinds: dict[str, str] = {}
    for name, kind in rows:
        # A row that is too short has None there.
        if not isinstance(name, str) or not isinstance(kind, str):
            raise TrainError(f"{path}: the row of {name!r} has no kind; each row is id,kind")
        if kinds.setdefault(name, kind) != kind:
            raise TrainError(
                f"{path}: {name!r} is of kind {kinds[name]!r} in one row and {kind!r} in another; "
                "leave one of them"
            )
    return kinds


def read_names(path: Path) -> tuple[str, ...]:
    """Read names, one a line; ``#`` at its start or behind a space starts a comment."""
    try:
        lines = path.read_text(encoding=_TEXT).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TrainError(f"{path}: a list of names, one a line, wanted: {error}") from error
    # A name may hold one: of case#3 no more than case would be left, which may be another image.
    stripped = (re.split(r"(?:^|\s)#", line, maxsplit=1)[0].strip() for line in lines)
    return tuple(line for line in stripped if line)


def split(
    pairs: Sequence[Pair], *, share: float, seed: int
) -> tuple[tuple[Pair, ...], tuple[Pair, ...]]:
    """Split into (rest, held back), the same share of every kind, by ``seed``.

    Each kind gives at least one image if it has more than one.
    """
    held: set[str] = set()
    for kind in sorted({pair.kind for pair in pairs}):
        names = sorted(pair.name for pair in pairs if pair.kind == kind)
        # Order by a hash of name and seed: adding an image does not reshuffle the others.
        names.sort(key=lambda name: hashlib.sha256(_as_bytes(f"{seed}/{name}")).hexdigest())
        count = round(share * len(names))
        if share > 0 and len(names) > 1:
            count = max(1, min(count, len(names) - 1))
        held.update(names[:count])
    rest = tuple(pair for pair in pairs if pair.name not in held)
    return rest, tuple(pair for pair in pairs if pair.name in held)


def _as_bytes(text: str) -> bytes:
    """Return the bytes of what file names are part of, which need not be UTF-8."""
    return text.encode(errors="surrogateescape")


def data_hash(pairs: Sequence[Pair]) -> str:
    """sha256 over names and bytes of all files of the pairs (names and sizes for folders)."""
    digest = hashlib.sha256()
    for pair in pairs:
        for path in (pair.image, pair.labels):
            digest.update(_as_bytes(f"{pair.name}\0"))
            if path.is_dir():
                for part in sorted(path.rglob("*")):
                    digest.update(_as_bytes(f"{part.relative_to(path)} {part.stat().st_size}\0"))
            else:
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
