"""``open_slide``: choose the reader by what the file holds, not by its name."""

from __future__ import annotations

import math
from pathlib import Path

from tilepipe.errors import SlideError
from tilepipe.slide import openslide_input
from tilepipe.slide.tiff_open import CACHE_BYTES, OverlapError, open_tiff
from tilepipe.slide.types import OnDamage, Slide
from tilepipe.slide.zarr_input import is_zarr, open_ome_zarr
from tilepipe.spec import at_home

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_OTHERS = (
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"BM", "a BMP image"),
    (b"\x89HDF", "an HDF5 file"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"%PDF", "a PDF document"),
    (b"\x00\x00\x00\x0cjP", "a JPEG 2000 image"),
    (b"ZISRAWFILE", "a Zeiss CZI file"),
)


def open_slide(
    path: str | Path,
    *,
    mpp: float | None = None,
    max_pixels: int = 2**40,
    on_damage: OnDamage = "error",
    cache_bytes: int = CACHE_BYTES,
    ids: bool = False,
) -> Slide:
    """Open an image for region reads.

    Parameters
    ----------
    path
        A TIFF of any kind, an OME-Zarr folder, or what OpenSlide reads if it is installed.
    mpp
        µm per level-0 px, instead of what the file says.
    max_pixels
        Largest believable level 0.
    on_damage
        ``error``: DamageError at the first damaged tile; ``fill``: fill and record it.
    cache_bytes
        Decoded tiles of a TIFF to keep, for reads of neighbouring boxes.
    ids
        The pixels of a TIFF are numbers, not colours: integers of any width stay what they are,
        and of a palette the indices are read.

    Raises
    ------
    SlideError
        Names the file, what is wrong, and what to do.
    """
    name = at_home(str(path))
    if mpp is not None and not (math.isfinite(mpp) and mpp > 0):
        raise SlideError(f"{name}: {mpp} µm is not a pixel size")
    if "://" in name:
        raise SlideError(
            f"{name}: slides are read from local disks; copy it first (an OME-Zarr on S3 can be "
            "segmented where it is: leave -o out, or give its own place as output)"
        )
    if Path(name).is_dir():
        if is_zarr(Path(name)):
            return open_ome_zarr(name, mpp=mpp, max_pixels=max_pixels, on_damage=on_damage)
        raise SlideError(f"{name}: is a folder without Zarr metadata; want a slide or an OME-Zarr")
    head = _read_head(name)
    if head[:4] in _TIFF:
        try:
            return open_tiff(
                name,
                mpp=mpp,
                max_pixels=max_pixels,
                on_damage=on_damage,
                cache_bytes=cache_bytes,
                ids=ids,
            )
        except OverlapError:
            if openslide_input.detect(name) is None:
                raise
    if openslide_input.detect(name) is not None:
        return openslide_input.open_with_openslide(name, mpp=mpp, max_pixels=max_pixels)
    wanted = "a TIFF, SVS, NDPI, SCN or OME-Zarr"
    if not openslide_input.is_installed():
        wanted += ", or install tilepipe[wsi] for MRXS and others"
    raise SlideError(f"{name}: is {_what(head)}; want {wanted}")


def is_tiff(path: str | Path) -> bool:
    """Tell whether a file begins as a TIFF does; False where there is none to be read."""
    try:
        return Path(path).is_file() and _read_head(str(path))[:4] in _TIFF
    except SlideError:
        return False


def _read_head(name: str) -> bytes:
    # A pipe would be waited for, maybe for good, and pixels are read from anywhere in a file.
    if Path(name).is_fifo() or Path(name).is_socket():
        raise SlideError(f"{name}: is a pipe; slides are read from files: write it to one first")
    try:
        with Path(name).open("rb") as file:
            return file.read(64)
    except OSError as error:
        raise SlideError(f"{name}: cannot be read: {error.strerror or error}") from error


def _what(head: bytes) -> str:
    if not head:
        return "an empty file"
    return next((what for magic, what in _OTHERS if head.startswith(magic)), "not a TIFF")
