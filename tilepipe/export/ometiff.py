"""``write_ome_tiff``: an image or mask pyramid as tiled BigTIFF with OME metadata."""

from __future__ import annotations

import itertools
import re
import struct
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tilepipe.errors import ExportError
from tilepipe.export.sink import whole_path
from tilepipe.spec import LabelClass, class_at
from tilepipe.steps import Count, Tell, ignore
from tilepipe.store import Level, Store, channel_colors
from tilepipe.tiling import Box

Compression = Literal["deflate", "lzw", "jpeg", "none"]
Fill = Literal["constant", "edge"]
"""What a tile has beyond the level: 0, or its last px once more."""
_NARROWED = {"int64": np.int32, "uint64": np.uint32, "float16": np.float32}
"""What OME-TIFF has no name for, and as what it is written; an id that does not fit is an error."""
_CODECS = {"deflate": "zlib", "lzw": "lzw", "jpeg": "jpeg", "none": None}
TILE_PX = 512
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Control characters, and the bytes of a file's name that are no text."""


def write_ome_tiff(
    path: Path,
    store: Store,
    *,
    label: str | None = None,
    compression: Compression = "deflate",
    overwrite: bool = False,
    tell: Tell = ignore,
) -> int:
    """Write the label ``label``, or the image where it is None; returns the number of levels.

    Every level has the pixels of the store's level. Masks of bytes carry their class colours as a
    palette, so that any viewer shows them, and keep their class ids as values. Coarser levels are
    SubIFDs of the first one, as OME-TIFF wants, and named again in the main chain of directories
    for readers that look for a pyramid there (OpenSlide); the pixels are stored once.

    Raises ExportError; then nothing is left at ``path``.
    """
    import tifffile

    if label is None:
        levels = [store.image(index) for index in range(store.n_levels)]
        classes: Sequence[LabelClass] = ()
    else:
        found = store.label(label)
        levels = [found.level(index) for index in range(found.n_levels)]
        classes = found.classes
    rgb = label is None and store.rgb
    if compression == "jpeg" and not (rgb and store.dtype == np.uint8):
        raise ExportError(
            f"{path}: JPEG is for 8-bit RGB images; use --compression deflate for this one"
        )
    options: dict[str, Any] = {
        "tile": (TILE_PX, TILE_PX),
        "compression": _CODECS[compression],
        "software": "tilepipe",
        "photometric": "rgb" if rgb else "minisblack",
    }
    if compression == "jpeg":
        options["compressionargs"] = {"level": 90}
    # JPEG mixes neighbours: beside black, the last px of a slide would be darker.
    fill: Fill = "edge" if compression == "jpeg" else "constant"
    if label is not None and levels[0].dtype == np.uint8:
        options |= {"photometric": "palette", "colormap": palette(classes)}
    dtype = np.dtype(_NARROWED.get(levels[0].dtype.name, levels[0].dtype))
    planes = 0 if rgb or label is not None else store.channels
    told = Count(tell, "levels", max(1, planes) * sum(prod(level.shape) for level in levels))
    with whole_path(path, overwrite=overwrite) as part:
        with tifffile.TiffWriter(part, bigtiff=True, byteorder="<", ome=True) as tiff:
            for index, level in enumerate(levels):
                lead, last = ((planes,) if planes else ()), ((3,) if rgb else ())
                first = index == 0
                tiff.write(
                    _tiles(level, rgb=rgb, planes=planes, dtype=dtype, fill=fill, told=told),
                    shape=(*lead, *level.shape, *last),
                    dtype=dtype,
                    subifds=len(levels) - 1 if first else None,
                    subfiletype=0 if first else 1,
                    metadata=_ome(store, level, label, rgb=rgb) if first else None,
                    **_resolution(store, level),
                    **options,
                )
        if planes < 2:
            _chain_levels(part)
    return len(levels)


def _chain_levels(path: Path) -> None:
    """Name the SubIFDs of the only page in the main chain too, by their "next" offsets."""
    import tifffile

    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        offsets = [page.offset, *(page.subifds or ())]
    with path.open("r+b") as file:
        for here, following in itertools.pairwise(offsets):
            # BigTIFF directory: 8 bytes of count, 20 per tag, then where the next one is.
            file.seek(here)
            (tags,) = struct.unpack("<Q", file.read(8))
            file.seek(here + 8 + 20 * tags)
            file.write(struct.pack("<Q", following))


def _tiles(
    level: Level, *, rgb: bool, planes: int, dtype: np.dtype[Any], fill: Fill, told: Count
) -> Iterator[NDArray[Any]]:
    """Tiles in file order, filled up to the full size at the far borders."""
    whole = Box.of_shape(level.shape)
    for plane in range(max(planes, 1)):
        for box in whole.split((TILE_PX, TILE_PX)):
            pixels = _narrowed(level.read(box), dtype, level)
            if rgb:
                pixels = np.moveaxis(pixels[:3], 0, -1)
            elif planes:
                pixels = pixels[plane]
            if box.shape != (TILE_PX, TILE_PX):
                beyond = [(0, TILE_PX - side) for side in box.shape] + [(0, 0)] * rgb
                pixels = np.pad(pixels, beyond, mode=fill)
            told.add(box.area)  # nobody comes back after the last one
            yield np.ascontiguousarray(pixels)


def _narrowed(pixels: NDArray[Any], dtype: np.dtype[Any], level: Level) -> NDArray[Any]:
    if pixels.dtype == dtype:
        return pixels
    narrow = pixels.astype(dtype)
    if dtype.kind in "iu" and not np.array_equal(narrow, pixels):
        raise ExportError(
            f"array {level.key} holds {pixels.min()} to {pixels.max()}, which do not fit into the "
            f"{dtype} that OME-TIFF has; number its objects anew, or export another form"
        )
    return narrow


def palette(classes: Sequence[LabelClass]) -> NDArray[np.uint16]:
    """Class colours as a TIFF colour map (3, 256)."""
    colors = [class_at(value, classes).color[:3] for value in range(256)]
    return np.array(colors, dtype=np.uint16).T * np.uint16(257)


def _resolution(store: Store, level: Level) -> dict[str, Any]:
    if store.mpp is None:
        return {}
    y, x = (side * level.downsample for side in store.mpp)
    return {"resolution": (1e4 / x, 1e4 / y), "resolutionunit": "CENTIMETER"}


def _ome(store: Store, level: Level, label: str | None, *, rgb: bool) -> dict[str, Any]:
    several = label is None and not rgb
    facts: dict[str, Any] = {"axes": "YXS" if rgb else "CYX" if several else "YX"}
    facts["Name"] = _in_xml(label or Path(store.location).name.removesuffix(".zarr"))
    if store.mpp is not None:
        y, x = (side * level.downsample for side in store.mpp)
        facts |= {
            "PhysicalSizeX": x,
            "PhysicalSizeXUnit": "µm",
            "PhysicalSizeY": y,
            "PhysicalSizeYUnit": "µm",
        }
    if several:
        facts["Channel"] = {
            "Name": [_in_xml(name) for name in store.channel_names],
            "Color": [_ome_color(color) for color in channel_colors(store)],
        }
    return facts


def _in_xml(text: str) -> str:
    """Return a name with what XML has no character for written out as an escape."""
    return _NO_XML.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _ome_color(rrggbb: str) -> int:
    """Return an opaque colour as OME has it: RGBA as a signed number of 32 bits."""
    return int.from_bytes(bytes.fromhex(f"{rrggbb}ff"), signed=True)
