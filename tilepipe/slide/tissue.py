"""``tissue_mask``: where a bright-field slide shows tissue and where bare glass, coarsely.

Conservative on purpose: what is skipped is never segmented, so pale tissue counts as tissue and the
mask is grown by its own pixel size.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tilepipe.errors import SlideError
from tilepipe.slide.open import is_tiff, open_slide
from tilepipe.slide.types import LevelInfo, Pixels
from tilepipe.threads import cores, several_at_once
from tilepipe.tiling import Box, Shape

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

_WANTED_PX = 1024
"""Sides of the mask are about this, at most twice."""
_GLASS_BRIGHT = 0.8
_GLASS_SATURATION = 0.08
_GLASS_SHARE = 0.02
_THRESHOLD_RANGE = (0.04, 0.12)
_PALE = 0.03
"""How much more saturated than the glass around it the palest tissue is."""
_DARK = 0.6
_BOX_PX = 2048
_SAMPLES = 4
_MOST_AT_ONCE = 8
_KEPT_PX = 8192
"""Sides of a mask that was read as a slide, at most: 8 MB as it is kept, a bit a px."""


class Image(Protocol):
    """What tissue is looked for in: a slide, or the image of a store."""

    @property
    def rgb(self) -> bool:
        """Whether the three channels are red, green and blue."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """Dtype of the pixels."""
        ...

    @property
    def levels(self) -> Sequence[LevelInfo]:
        """The levels, finest first."""
        ...

    def read(self, box: Box, *, level: int = 0) -> Pixels:
        """Pixels (c, y, x) of a box inside a level."""
        ...


@dataclass(frozen=True, slots=True)
class TissueMask:
    """Which coarse pixels hold tissue."""

    mask: NDArray[np.bool_]
    """(y, x)."""
    downsample: tuple[float, float]
    """Level-0 px per mask px, (y, x)."""
    note: str

    def any(self, box: Box) -> bool:
        """Tell whether a box of level-0 px touches tissue; one mask px around it counts."""
        return bool(self._under(box).any())

    def share_of(self, box: Box) -> float:
        """Share of a box of level-0 px that is tissue, one mask px around it as well."""
        under = self._under(box)
        return float(under.mean()) if under.size else 0.0

    def _under(self, box: Box) -> NDArray[np.bool_]:
        down_y, down_x = self.downsample
        y0, y1 = int(box.y0 / down_y) - 1, int(np.ceil(box.y1 / down_y)) + 1
        x0, x1 = int(box.x0 / down_x) - 1, int(np.ceil(box.x1 / down_x)) + 1
        return self.mask[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)]

    @property
    def share(self) -> float:
        """Share of the slide that is tissue."""
        return float(self.mask.mean())

    @classmethod
    def from_image(cls, path: str | Path, extent: Shape) -> TissueMask:
        """Read a mask image (not 0 is tissue) over ``extent`` px.

        A TIFF of any size is read as slides are, in boxes of bounded memory: it holds numbers, and
        0 is what is stored as 0, whether that is to be shown black or white. Of others it is what
        Pillow reads.

        Of a palette image the index counts, of colours any of them, of alpha nothing.

        SlideError if it cannot be read or its aspect is not that of the slide.
        """
        read = _of_tiff if is_tiff(path) else _of_picture
        pixels, downsample = read(path, extent)
        told = f"mask image {Path(path).name}: tissue on {pixels.mean():.0%} of the slide"
        return cls(pixels, downsample, told)

    @classmethod
    def everywhere(cls, extent: Shape, note: str) -> TissueMask:
        """A mask of one px: all of ``extent`` counts."""
        return cls(np.ones((1, 1), np.bool_), (float(extent[0]), float(extent[1])), note)

    def to_png(self) -> bytes:
        """Return the mask as a PNG of one bit a px; its text says the rest."""
        from PIL import Image
        from PIL.PngImagePlugin import PngInfo

        text = PngInfo()
        text.add_text("downsample", " ".join(repr(float(down)) for down in self.downsample))
        text.add_text("note", self.note)
        stream = io.BytesIO()
        Image.fromarray(self.mask).save(stream, "PNG", pnginfo=text)
        return stream.getvalue()

    @classmethod
    def from_png(cls, raw: bytes) -> TissueMask:
        """Read what ``to_png`` wrote, as untrusted input; SlideError if it is not that."""
        from PIL import Image, UnidentifiedImageError

        try:
            with _large_allowed(), Image.open(io.BytesIO(raw), formats=["PNG"]) as image:
                pixels = np.asarray(image.convert("L")) > 0
                text = dict(image.info)
            down_y, down_x = (float(down) for down in str(text["downsample"]).split())
            if not (isfinite(down_y) and isfinite(down_x) and min(down_y, down_x) > 0):
                raise ValueError(f"downsample {down_y}, {down_x}")
        except (OSError, UnidentifiedImageError, ValueError, KeyError, SyntaxError,
                Image.DecompressionBombError) as error:  # fmt: skip
            raise SlideError(f"not a tissue mask of tilepipe: {error}") from error
        return cls(pixels, (down_y, down_x), str(text.get("note", "")))


@contextmanager
def _large_allowed() -> Iterator[None]:
    """Keep Pillow from warning of masks that it reads all the same."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def _of_picture(path: str | Path, extent: Shape) -> tuple[NDArray[np.bool_], tuple[float, float]]:
    """Return which px of a picture are not 0, and how many px of ``extent`` lie under one."""
    from PIL import Image, UnidentifiedImageError

    try:
        with _large_allowed(), Image.open(path) as image:
            down = _downsample(path, (image.height, image.width), extent)
            return _not_0(image), down
    except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError) as error:
        hint = "; save it as a TIFF" if "bomb" in str(error) else ""
        raise SlideError(f"{path}: not a mask image: {error}{hint}") from error


def _of_tiff(path: str | Path, extent: Shape) -> tuple[NDArray[np.bool_], tuple[float, float]]:
    """Return the same of a TIFF, made smaller by a whole number; a px counts if any under it does.

    Pillow inverts what is to be shown white where it is 0, as bilevel masks of tifffile and masks
    of ImageJ are, and takes the first of several channels.
    """
    try:
        slide = open_slide(path, ids=True)
    except SlideError as error:
        raise SlideError(f"not a mask image: {error}") from error
    with slide:
        shape = slide.levels[0].shape
        down_y, down_x = _downsample(path, shape, extent)
        factor = -(-max(shape) // _KEPT_PX)
        found = np.zeros(Box.of_shape(shape).reduced(factor).shape, np.bool_)

        def look(box: Box) -> None:
            seen = (np.nan_to_num(slide.read(box)) != 0).any(axis=0)
            starts_y, starts_x = (np.arange(0, side, factor) for side in seen.shape)
            rows = np.logical_or.reduceat(seen, starts_y, axis=0)
            found[box.reduced(factor).slices] = np.logical_or.reduceat(rows, starts_x, axis=1)

        _in_boxes(shape, factor, look)
    return found, (down_y * factor, down_x * factor)


def _downsample(path: str | Path, shape: Shape, extent: Shape) -> tuple[float, float]:
    """Return how many px of ``extent`` lie under one of a mask; SlideError for another aspect."""
    down_y, down_x = extent[0] / shape[0], extent[1] / shape[1]
    if not 0.9 < down_y / down_x < 1.1:
        raise SlideError(
            f"{path}: a mask of {shape[0]} x {shape[1]} px (y, x) has another "
            f"aspect than the slide of {extent[0]} x {extent[1]} px"
        )
    return down_y, down_x


def _not_0(image: PillowImage) -> NDArray[np.bool_]:
    """Tell which pixels (y, x) are not 0, whatever kind they are; NaN is 0."""
    # Pillow would turn indices into the brightness of their colours, and round 0.5 to 0.
    if image.mode in ("CMYK", "YCbCr", "LAB", "HSV"):
        image = image.convert("RGB")
    bands = image.getbands()
    pixels = np.asarray(image).reshape(image.height, image.width, len(bands))
    colours = pixels[..., [band not in ("A", "a", "X") for band in bands]]
    return np.asarray((np.nan_to_num(colours) != 0).any(axis=-1))


def tissue_level(slide: Image) -> int:
    """Return the level that tissue is looked for in: the coarsest of at least 1024 px a side."""
    sides = [max(level.shape) for level in slide.levels]
    return max((k for k, side in enumerate(sides) if side >= _WANTED_PX), default=0)


def tissue_mask(slide: Image) -> TissueMask | None:
    """Find tissue on a bright-field slide; None where there is no glass to tell it from.

    Reads the coarsest level of at least 1024 px a side; where there is none, the finest one in
    boxes of bounded memory, several at once.
    """
    if not slide.rgb or slide.dtype != np.uint8:
        return None
    number = tissue_level(slide)
    coarse, factor = _coarse(slide, number)
    value = coarse.max(0).astype(np.float32)
    saturation = (value - coarse.min(0)) / np.maximum(value, 1.0)
    value /= 255.0
    glass = (value > _GLASS_BRIGHT) & (saturation < _GLASS_SATURATION)
    if glass.mean() < _GLASS_SHARE:
        return None
    threshold = float(np.clip(_otsu(saturation), *_THRESHOLD_RANGE))
    # Where there is strong stain, Otsu parts it from pale tissue; that must stay, too.
    pale = min(threshold, max(_THRESHOLD_RANGE[0], _stands_out(saturation, glass)))
    mask = _grown((saturation > threshold) | (value < _DARK) | _in_company(saturation > pale))
    level = slide.levels[number]
    down_y, down_x = (down * factor for down in level.downsample)
    note = f"tissue on {mask.mean():.0%} of the slide (saturation above {pale:.3f})"
    return TissueMask(mask, (down_y, down_x), note)


def _coarse(slide: Image, number: int) -> tuple[Pixels, int]:
    """Level ``number`` made smaller by an integer factor, read in boxes of bounded memory.

    Each coarse pixel is the mean of at most 4 x 4 samples of its square: as good as all of them
    for glass or no glass, and ten times as fast.
    """
    shape = slide.levels[number].shape
    factor = max(1, max(shape) // _WANTED_PX)
    step = max(1, factor // _SAMPLES)
    factor = factor // step * step
    coarse = np.empty((3, *Box.of_shape(shape).reduced(factor).shape), np.uint8)

    def look(box: Box) -> None:
        samples = slide.read(box, level=number)[:, ::step, ::step]
        coarse[(slice(None), *box.reduced(factor).slices)] = _block_mean(samples, factor // step)

    _in_boxes(shape, factor, look)
    return coarse, factor


def _in_boxes(shape: Shape, factor: int, look: Callable[[Box], None]) -> None:
    """Look at all of a level in boxes that begin at multiples of ``factor``, several at once."""
    side = max(1, _BOX_PX // factor) * factor
    boxes = Box.of_shape(shape).split((side, side))
    at_once = min(_MOST_AT_ONCE, cores())
    for _ in several_at_once(look, boxes, at_once=at_once, name="tilepipe-tissue"):
        pass


def _block_mean(pixels: Pixels, factor: int) -> Pixels:
    """Mean of ``factor`` x ``factor`` px; at the far borders of what is there."""
    if factor == 1:
        return pixels
    starts_y = np.arange(0, pixels.shape[1], factor)
    starts_x = np.arange(0, pixels.shape[2], factor)
    sums = np.add.reduceat(pixels, starts_y, axis=1, dtype=np.uint32)
    sums = np.add.reduceat(sums, starts_x, axis=2)
    high = np.minimum(factor, pixels.shape[1] - starts_y)
    wide = np.minimum(factor, pixels.shape[2] - starts_x)
    return (sums / (high[:, None] * wide[None, :])).astype(np.uint8)


def _stands_out(saturation: NDArray[np.float32], glass: NDArray[np.bool_]) -> float:
    """Return the saturation above which no glass of this slide is: its colour and its noise."""
    clear = saturation[glass]
    colour = float(np.median(clear))
    noise = 1.4826 * float(np.median(np.abs(clear - colour)))  # the deviation of normal noise
    return colour + max(6 * noise, _PALE)


def _in_company(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Keep what has as many others as not in the 5 x 5 px around it: grains of dust have not."""
    padded = np.pad(mask, 2, mode="edge").astype(np.uint8)
    y, x = mask.shape
    rows = np.add.reduce([padded[k : y + k] for k in range(5)], dtype=np.uint8)
    around = np.add.reduce([rows[:, k : x + k] for k in range(5)], dtype=np.uint8)
    return np.asarray(mask & (around > 12))


def _otsu(values: NDArray[np.float32]) -> float:
    """Threshold that separates two classes best (Otsu 1979), values in 0..1."""
    counts, edges = np.histogram(values, bins=256, range=(0.0, 1.0))
    centres = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    sums = np.cumsum(counts * centres)
    valid = (below > 0) & (above > 0)
    if not valid.any():
        return 0.0
    mean_below = sums[valid] / below[valid]
    mean_above = (sums[-1] - sums[valid]) / above[valid]
    between = below[valid] * above[valid] * (mean_below - mean_above) ** 2
    return float(centres[valid][int(np.argmax(between))])


def _grown(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Grow by one px on each side, corners too."""
    padded = np.pad(mask, 1)
    rows = padded[:-2] | padded[1:-1] | padded[2:]
    return rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]
