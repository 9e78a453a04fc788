"""What a slide is: its levels, and the Protocol that every reader fulfils."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from tilepipe.errors import SlideError
from tilepipe.slide.damage import Damage
from tilepipe.tiling import Box, Shape

OnDamage = Literal["error", "fill"]
Pixels = NDArray[Any]


@dataclass(frozen=True, slots=True)
class LevelInfo:
    """One level of a slide's pyramid; level 0 is the finest."""

    shape: Shape
    """Sides (y, x) in level px."""
    downsample: tuple[float, float]
    """Level-0 px per level px, (y, x); at least 1."""
    tile: Shape | None
    """Sides (y, x) of the file's own tiles in px; None for strips."""
    compression: str
    """Codec of the file, e.g. ``jpeg``; ``none`` for raw pixels."""
    piece_bytes: int = 0
    """Decoded bytes of what a read can only decode whole: a tile, a strip, chunks."""


@runtime_checkable
class Slide(Protocol):
    """An open input image. One per process: it holds a file descriptor and does not pickle."""

    path: str
    format: str
    """``svs``, ``ndpi``, ``ome``, ``geotiff``, ``tiff``, ``ome-zarr``, ``openslide``, …"""
    dtype: np.dtype[Any]
    """uint8, uint16 or float32, native byte order."""
    stored_dtype: np.dtype[Any]
    """Of the samples in the file, native byte order: ``dtype`` holds every value of it."""
    channels: int
    """After alpha was dropped."""
    channel_names: tuple[str, ...]
    channel_colors: tuple[str | None, ...]
    """``RRGGBB`` per channel where the file says one."""
    rgb: bool
    """The three channels are red, green and blue."""
    levels: tuple[LevelInfo, ...]
    mpp: tuple[float, float] | None
    """µm per level-0 px, (y, x)."""
    mpp_source: str
    """Where ``mpp`` came from, or why it is unknown."""
    notes: tuple[str, ...]
    """What the reader did to the pixels, e.g. ``alpha dropped``."""
    damage: Damage
    """Tiles filled so far (``on_damage="fill"``)."""

    def read(self, box: Box, *, level: int = 0) -> Pixels:
        """Pixels (c, y, x) of a box inside the level; DamageError where they are unreadable."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """Say in JSON which input this is: size, time, sampled content, shape, dtype."""
        ...

    def close(self) -> None:
        """Give the file descriptors back; reading afterwards is an error."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


def check_read(slide: Slide, box: Box, level: int) -> None:
    """Raise SlideError unless ``box`` lies inside level ``level`` of the slide."""
    if not 0 <= level < len(slide.levels):
        raise SlideError(
            f"{slide.path}: no level {level}; levels 0 to {len(slide.levels) - 1} exist"
        )
    shape = slide.levels[level].shape
    if not Box.of_shape(shape).contains(box):
        raise SlideError(
            f"{slide.path}: box {box} leaves level {level} of {shape[0]} x {shape[1]} px (y, x)"
        )


def check_size(path: str, shape: Shape, max_pixels: int) -> None:
    """Raise SlideError for an empty image or one that declares more than ``max_pixels``."""
    y, x = shape
    if y < 1 or x < 1:
        raise SlideError(f"{path}: an image of {y} x {x} px (y, x) has no pixels")
    if y * x > max_pixels:
        raise SlideError(
            f"{path}: declares {y} x {x} px = {y * x} pixels, more than the limit of {max_pixels}; "
            "pass a higher --max-pixels if the file is to be trusted"
        )
