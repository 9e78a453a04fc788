"""``OpenSlideSlide``: formats that only OpenSlide reads (MRXS, BIF, VMS …), if it is installed."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, Self

import numpy as np

from tilepipe.errors import DamageError, SlideError
from tilepipe.slide.damage import Damage
from tilepipe.slide.fingerprint import fingerprint_file
from tilepipe.slide.mpp import PixelSize
from tilepipe.slide.types import LevelInfo, Pixels, check_read, check_size
from tilepipe.tiling import Box


def detect(path: str) -> str | None:
    """Vendor name if OpenSlide is installed and reads the file; None otherwise."""
    try:
        import openslide
    except (ImportError, OSError):
        return None
    try:
        vendor: str | None = openslide.OpenSlide.detect_format(path)
    except Exception:
        return None
    return vendor


def is_installed() -> bool:
    """Tell whether the extra ``wsi`` is there."""
    try:
        import openslide  # noqa: F401
    except (ImportError, OSError):
        return False
    return True


def open_with_openslide(path: str, *, mpp: float | None, max_pixels: int) -> OpenSlideSlide:
    """Open a slide; SlideError with OpenSlide's own words."""
    try:
        return OpenSlideSlide(path, mpp=mpp, max_pixels=max_pixels)
    except SlideError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise SlideError(f"{path}: OpenSlide cannot read it: {said}") from error


class OpenSlideSlide:
    """RGB uint8; where the scanner saw nothing, the slide's background colour."""

    format = "openslide"
    dtype: np.dtype[Any] = np.dtype(np.uint8)
    stored_dtype: np.dtype[Any] = np.dtype(np.uint8)
    channels = 3
    channel_names: tuple[str, ...] = ("red", "green", "blue")
    channel_colors: tuple[str | None, ...] = ("FF0000", "00FF00", "0000FF")
    rgb = True

    def __init__(self, path: str, *, mpp: float | None, max_pixels: int) -> None:
        import openslide

        self.path = path
        self._slide = openslide.OpenSlide(path)
        properties = self._slide.properties
        shapes = [(height, width) for width, height in self._slide.level_dimensions]
        check_size(path, shapes[0], max_pixels)
        self.levels = tuple(
            LevelInfo(
                shape=shape,
                downsample=(shapes[0][0] / shape[0], shapes[0][1] / shape[1]),
                tile=_tile(properties, number),
                compression="openslide",
            )
            for number, shape in enumerate(shapes)
        )
        background = properties.get("openslide.background-color", "FFFFFF")
        self._background = np.array(list(bytes.fromhex(background)), np.uint8)
        size = PixelSize((mpp, mpp), "given") if mpp is not None else _pixel_size(properties)
        self.mpp, self.mpp_source = size.mpp, size.source
        self.notes: tuple[str, ...] = (f"read by OpenSlide ({self._slide.detect_format(path)})",)
        self.damage = Damage()
        self._lock = threading.Lock()

    def read(self, box: Box, *, level: int = 0) -> Pixels:
        """Pixels (3, y, x) of ``box``, level px; DamageError with OpenSlide's own words."""
        check_read(self, box, level)
        if box.area == 0:
            return np.empty((3, *box.shape), np.uint8)
        # OpenSlide takes the corner in level-0 px, and divides it by one number for both sides.
        down = self._slide.level_downsamples[level]
        corner = (round(box.x0 * down), round(box.y0 * down))
        try:
            with self._lock:
                region = self._slide.read_region(corner, level, (box.shape[1], box.shape[0]))
        except MemoryError:  # this machine's to lack, not the slide's
            raise
        except Exception as error:
            said = " ".join(str(error).split())[:200]
            raise DamageError(
                f"{self.path}: level {level}, {box}: OpenSlide cannot read it: {said}; "
                "copy the file again"
            ) from error
        pixels = np.asarray(region)
        colors = pixels[..., :3].copy()
        colors[pixels[..., 3] == 0] = self._background
        return np.ascontiguousarray(np.moveaxis(colors, -1, 0))

    def fingerprint(self) -> dict[str, Any]:
        """Size, mtime_ns and sampled content of the file, and of a folder of the same name."""
        facts = fingerprint_file(self.path)
        folder = Path(self.path).with_suffix("")
        if folder.is_dir():
            parts = sorted(each for each in folder.iterdir() if each.is_file())
            facts["parts"] = [[each.name, each.stat().st_size] for each in parts]
        return {**facts, "shape": [3, *self.levels[0].shape], "dtype": "uint8"}

    def close(self) -> None:
        """Close the file."""
        self._slide.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _tile(properties: Any, level: int) -> tuple[int, int] | None:
    height = properties.get(f"openslide.level[{level}].tile-height")
    width = properties.get(f"openslide.level[{level}].tile-width")
    return (int(height), int(width)) if height and width else None


def _pixel_size(properties: Any) -> PixelSize:
    y, x = properties.get("openslide.mpp-y"), properties.get("openslide.mpp-x")
    try:
        size = (float(y), float(x))
    except (TypeError, ValueError):
        return PixelSize(None, "unknown: OpenSlide finds no pixel size; pass --slide-mpp")
    return PixelSize(size, "OpenSlide mpp") if min(size) > 0 else PixelSize(None, "unknown")
