"""What the stored samples mean: which are kept, and the exact change of dtype, if any.

uint8, uint16 and float32 stay as they are. Other kinds are widened where every value survives, and
refused where one might not; a palette becomes the colours that it stands for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilepipe.errors import SlideError
from tilepipe.slide.types import Pixels
from tilepipe.tiling import Box, Shape

_KEPT = (np.dtype(np.uint8), np.dtype(np.uint16), np.dtype(np.float32))
# float32 holds every integer up to 2^24 and every float16 exactly.
_WIDENED = (np.dtype(np.int8), np.dtype(np.int16), np.dtype(np.float16))
_FLOAT32_EXACT_BITS = 24

_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _MASK, _SEPARATED, _YCBCR = 0, 1, 2, 3, 4, 5, 6
_NAMES = {
    5: "CMYK inks",
    8: "CIE L*a*b*",
    9: "ICC L*a*b*",
    10: "ITU L*a*b*",
    32803: "a colour \
filter array",
    32844: "log luminance",
    32845: "log LUV",
    34892: "linear raw",
    51177: "depth",
}
# These decoders give RGB whatever the photometric tag says.
_RGB_DECODERS = {6, 7, 33003, 33004, 33005, 33007, 34712, 34892, 34933, 50001, 50002, 52546}


@dataclass(frozen=True, slots=True)
class Meaning:
    """How the stored samples of a page become the slide's channels."""

    samples: tuple[int, ...]
    """Stored samples to read, in order."""
    dtype: np.dtype[Any]
    channels: int
    """Per page."""
    rgb: bool
    palette: NDArray[np.uint8] | None
    """(3, colours): the colour of each index."""
    notes: tuple[str, ...]

    def convert(self, stored: Pixels) -> Pixels:
        """Channels (c, y, x) in the slide's dtype from stored samples (s, y, x)."""
        if self.palette is not None:
            return self.palette[:, stored[0].astype(np.intp)]
        return stored.astype(self.dtype, copy=False)


def read_meaning(
    path: str, keyframe: Any, n_samples: int, *, n_planes: int = 1, ids: bool = False
) -> Meaning:
    """Say what the samples of a page are; SlideError where they have no exact RGB or grey form.

    With ``ids`` they are numbers of classes or objects: integers of any width, and of a palette
    the indices.
    """
    notes: list[str] = []
    photometric = int(keyframe.photometric)
    samples = _kept_samples(keyframe, photometric, n_samples, notes)
    # With several planes the palettes only say how to show each channel.
    if photometric == _PALETTE and keyframe.colormap is not None and n_planes == 1 and not ids:
        palette = _read_palette(path, keyframe)
        notes.append("palette indices replaced by their colours")
        return Meaning(samples[:1], np.dtype(np.uint8), 3, True, palette, tuple(notes))
    if photometric == _YCBCR and (
        int(keyframe.compression) not in _RGB_DECODERS or keyframe.shaped[0] > 1
    ):
        raise SlideError(f"{path}: holds raw YCbCr samples; convert it to RGB first")
    if photometric in _NAMES:
        raise SlideError(f"{path}: holds {_NAMES[photometric]}; convert it to RGB or grey first")
    packed = keyframe.bitspersample == 24 and keyframe.dtype == np.uint32
    if packed and keyframe.parent.byteorder == ">":
        # The library unpacks them to the wrong end of a number.
        raise SlideError(
            f"{path}: holds 24-bit samples in big-endian order, which cannot be read; write it in "
            "little-endian order or with 32 bits"
        )
    if photometric == _WHITE_IS_ZERO:
        notes.append("white is zero in this file; values kept as stored")
    if ids and keyframe.dtype is not None and keyframe.dtype.kind in "iu":
        dtype = np.dtype(keyframe.dtype).newbyteorder("=")
    else:
        dtype = exact_dtype(path, keyframe.dtype, keyframe.bitspersample, notes)
    rgb = photometric in (_RGB, _YCBCR) and len(samples) == 3
    return Meaning(samples, dtype, len(samples), rgb, None, tuple(notes))


def _kept_samples(
    keyframe: Any, photometric: int, n_samples: int, notes: list[str]
) -> tuple[int, ...]:
    """Stored samples without alpha."""
    extras = [int(extra) for extra in keyframe.extrasamples]
    first_extra = n_samples - len(extras)
    dropped = {first_extra + k for k, extra in enumerate(extras) if extra in (1, 2)}
    if not extras and photometric == _RGB and n_samples == 4:
        # Four samples called RGB without a word on the fourth: it has always been alpha.
        dropped = {3}
    if photometric == _PALETTE:
        dropped |= set(range(1, n_samples))
    kept = tuple(sample for sample in range(n_samples) if sample not in dropped)
    if dropped and kept:
        notes.append("alpha dropped")
        return kept
    return tuple(range(n_samples))


def exact_dtype(
    path: str, dtype: np.dtype[Any] | None, bits: int | tuple[int, ...], notes: list[str]
) -> np.dtype[Any]:
    """Dtype that holds every value: uint8, uint16 or float32; SlideError where none does."""
    if dtype is None:
        raise SlideError(f"{path}: samples of {bits} bits in an unknown format")
    native = np.dtype(dtype).newbyteorder("=")
    if native in _KEPT:
        if native.kind == "u" and isinstance(bits, int) and bits < native.itemsize * 8:
            scale = np.iinfo(native).max
            notes.append(
                f"warning: {bits}-bit samples are stored as they are; a network is shown "
                f"{(1 << bits) - 1} as {(1 << bits) - 1}/{scale}: widen them to {native} first for "
                "one that was trained on their full scale"
            )
        return native
    if native == np.bool_:
        notes.append(
            "warning: 1-bit samples stored as 0 and 1; a network is shown 1 as 1/255: write "
            "them as 0 and 255 for one that was trained on grey values"
        )
        return np.dtype(np.uint8)
    small = native.kind == "u" and isinstance(bits, int) and bits <= _FLOAT32_EXACT_BITS
    if native in _WIDENED or small:
        notes.append(f"{native} samples become float32, exactly")
        if native.kind in "iu":
            notes.append(
                f"warning: the full scale of {native} samples is not known; a network is shown the "
                "values as they are, not 0 to 1 as of uint8 and uint16"
            )
        return np.dtype(np.float32)
    raise SlideError(
        f"{path}: {native} samples cannot be stored exactly as uint8, uint16 or float32; "
        "convert the image to one of these first"
    )


def _read_palette(path: str, keyframe: Any) -> NDArray[np.uint8]:
    colors = np.asarray(keyframe.colormap)
    if colors.ndim != 2 or colors.shape[0] != 3:
        raise SlideError(f"{path}: a palette of shape {colors.shape}; want (3, colours)")
    wanted = 2 if np.dtype(keyframe.dtype) == np.bool_ else 1 << int(keyframe.bitspersample)
    if colors.shape[1] < wanted or keyframe.dtype.kind not in ("b", "u") or wanted > 1 << 16:
        raise SlideError(
            f"{path}: a palette of {colors.shape[1]} colours for {keyframe.bitspersample}-bit "
            "indices; the header is damaged"
        )
    # The specification says 16-bit colours; old writers put 8-bit ones.
    shift = 8 if colors.max() > 255 else 0
    return (colors >> shift).astype(np.uint8)


@dataclass(frozen=True, slots=True)
class Orientation:
    """The TIFF Orientation tag: how stored rows and columns lie in the image that is shown."""

    value: int = 1

    @property
    def swaps(self) -> bool:
        """Rows are stored as columns."""
        return self.value >= 5

    def shown(self, shape: Shape) -> Shape:
        """Return the shown sides (y, x) of a stored image."""
        return (shape[1], shape[0]) if self.swaps else shape

    def stored_box(self, box: Box, shape: Shape) -> Box:
        """Return the stored px of a shown ``box``; ``shape`` is the shown image's."""
        y0, x0, y1, x1 = box.y0, box.x0, box.y1, box.x1
        if self.value in (3, 4, 7, 8):  # shown upside down
            y0, y1 = shape[0] - y1, shape[0] - y0
        if self.value in (2, 3, 6, 7):  # shown mirrored
            x0, x1 = shape[1] - x1, shape[1] - x0
        return Box(x0, y0, x1, y1) if self.swaps else Box(y0, x0, y1, x1)

    def shown_box(self, box: Box, shape: Shape) -> Box:
        """Return the shown px of a stored ``box``; ``shape`` is the shown image's."""
        y0, x0, y1, x1 = box.y0, box.x0, box.y1, box.x1
        if self.swaps:
            y0, x0, y1, x1 = x0, y0, x1, y1
        if self.value in (3, 4, 7, 8):
            y0, y1 = shape[0] - y1, shape[0] - y0
        if self.value in (2, 3, 6, 7):
            x0, x1 = shape[1] - x1, shape[1] - x0
        return Box(y0, x0, y1, x1)

    def turn(self, stored: Pixels) -> Pixels:
        """Turn stored pixels (c, y, x) to how they are shown."""
        turned = stored.swapaxes(1, 2) if self.swaps else stored
        if self.value in (3, 4, 7, 8):
            turned = turned[:, ::-1]
        if self.value in (2, 3, 6, 7):
            turned = turned[:, :, ::-1]
        return np.ascontiguousarray(turned)
