"""``render_view``: a picture of a part of a slide with its mask over it."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from tilepipe.errors import ExportError
from tilepipe.export.sink import whole_path
from tilepipe.spec import LabelClass, class_at
from tilepipe.store import Label, Level, Store, channel_colors
from tilepipe.tiling import Box

UInt8 = NDArray[np.uint8]
Show = Literal["overlay", "mask", "image"]
_BLANK = 236
_BAND_PX = 1 << 24
"""Of a level, read at once."""
_DRAWN_PX = 1 << 20
"""Of a picture, drawn at once."""


def render_view(
    store: Store,
    label: Label | None,
    *,
    region: Box | None = None,
    longest_px: int = 2048,
    show: Show = "overlay",
    opacity: float = 0.5,
    outline: bool = False,
) -> UInt8:
    """Return (y, x, 3) uint8 of ``region`` (level-0 px; None is all), at most ``longest_px`` long.

    It is drawn from the finest level that fits, without resampling: one pixel of the picture is
    one of that level, or, of a pyramid without such a level, every so many of its coarsest. Raises
    ExportError for a region outside the slide and other settings that are none.
    """
    whole = Box.of_shape(store.extent)
    asked = whole if region is None else region
    if not whole.contains(asked) or asked.area == 0:
        raise ExportError(
            f"region {asked} is not inside the slide of {store.extent[0]} x {store.extent[1]} px "
            "(y, x); give Y0,X0,Y1,X1 in level-0 px"
        )
    if not 0 <= opacity <= 1:
        raise ExportError(f"opacity {opacity}: a number from 0 to 1 is wanted")
    if show not in get_args(Show):
        raise ExportError(f"show {show!r}: the choices are {', '.join(get_args(Show))}")
    if longest_px < 1:
        raise ExportError(f"a picture of {longest_px} px: its longest side is 1 px or more")
    if show != "image" and label is None:
        raise ExportError(f"{store.location}: no label to draw; use --show image")
    factor = _fitting(store, label, asked, longest_px, with_image=show != "mask")
    picture: UInt8
    if show != "mask" and store.has_image:
        level = _coarsest(_image_levels(store), factor)
        shape = asked.reduced(factor).shape
        if level.downsample == factor:
            shape = _inside(asked.reduced(factor), level).shape
        picture = _rgb(_sampled(level, asked, factor, shape), store)
    else:
        height, width = asked.reduced(factor).shape
        picture = np.full((height, width, 3), 0 if show == "mask" else _BLANK, dtype=np.uint8)
    if show == "image" or label is None:
        return picture
    levels = label.whole_levels()
    ids = _sampled(_coarsest(levels, factor), asked, factor, picture.shape[:2])
    drawn = _edges(ids) if outline else None
    for rows in _row_bands(ids.shape):
        colors, alpha = _color_table(label, ids[rows])
        strength = alpha * (1.0 if show == "mask" else opacity)
        if drawn is not None:
            strength *= drawn[rows]
        below = picture[rows]
        blended = below + (colors.astype(np.float32) - below) * strength[..., None]
        picture[rows] = (blended + 0.5).clip(0, 255).astype(np.uint8)
    return picture


def _row_bands(shape: Sequence[int]) -> Iterator[slice]:
    """Rows of a picture (y, x) that are drawn at once: floats take ten times what bytes do."""
    step = max(1, _DRAWN_PX // shape[1])
    return (slice(y0, y0 + step) for y0 in range(0, shape[0], step))


def _image_levels(store: Store) -> list[Level]:
    return store.whole_levels()


def _fitting(
    store: Store, label: Label | None, asked: Box, longest_px: int, *, with_image: bool
) -> int:
    """Return the smallest downsample at which the picture is at most ``longest_px`` long."""
    if store.has_image and with_image:
        factors = [level.downsample for level in _image_levels(store)]
    elif label is not None:
        factors = [level.downsample for level in label.whole_levels()]
    else:
        raise ExportError(f"{store.location}: holds labels only; use --show mask")
    for factor in factors:
        if max(asked.reduced(factor).shape) <= longest_px:
            return factor
    return factors[-1] * -(-max(asked.reduced(factors[-1]).shape) // longest_px)


def _rgb(pixels: NDArray[Any], store: Store) -> UInt8:
    picture = np.empty((*pixels.shape[1:], 3), dtype=np.uint8)
    if store.rgb and pixels.shape[0] >= 3:
        rgb = np.moveaxis(pixels[:3], 0, -1)
        if rgb.dtype == np.uint8:
            return np.ascontiguousarray(rgb)
        top = 65535.0 if rgb.dtype == np.uint16 else 1.0
        for rows in _row_bands(picture.shape):
            picture[rows] = (_finite(rgb[rows]) * (255 / top)).clip(0, 255).astype(np.uint8)
        return picture
    shown = [
        (plane, np.percentile(_finite(plane), [0.5, 99.7]), [*bytes.fromhex(color)])
        for plane, color in zip(pixels[:8], channel_colors(store), strict=False)
    ]
    for rows in _row_bands(picture.shape):
        total = np.zeros(picture[rows].shape, dtype=np.float32)
        for plane, (low, high), color in shown:
            share = ((_finite(plane[rows]) - low) / max(float(high - low), 1e-9)).clip(0, 1)
            total += share[..., None] * np.asarray(color, np.float32)
        picture[rows] = total.clip(0, 255).astype(np.uint8)
    return picture


def _finite(plane: NDArray[Any]) -> NDArray[np.float32]:
    return np.nan_to_num(plane.astype(np.float32))


def _coarsest(levels: Sequence[Level], factor: int) -> Level:
    """Return the coarsest level that is at least as fine as a downsample of ``factor``."""
    fine = (one for one in levels if one.downsample <= factor)
    return max(fine, key=lambda one: one.downsample, default=levels[0])


def _sampled(level: Level, asked: Box, factor: int, shape: tuple[int, int]) -> NDArray[Any]:
    """Pixels of ``asked`` on a grid of downsample ``factor``, each the nearest of ``level``.

    A level may be coarser or finer than the grid, or end short of it where another program rounds
    sides down. It is read in bands: of a mask without coarse levels that can be all of it.
    """
    start = asked.reduced(factor)
    rows = (np.arange(start.y0, start.y0 + shape[0]) * factor // level.downsample).clip(
        0, level.shape[0] - 1
    )
    columns = (np.arange(start.x0, start.x0 + shape[1]) * factor // level.downsample).clip(
        0, level.shape[1] - 1
    )
    x0, x1 = int(columns[0]), int(columns[-1]) + 1
    sampled = np.empty((*level.lead, *shape), level.dtype)
    rows_px = -(-int(rows[-1] - rows[0] + 1) // len(rows))
    step = max(1, _BAND_PX // ((x1 - x0) * rows_px))
    for top in range(0, len(rows), step):
        wanted = rows[top : top + step]
        y0, y1 = int(wanted[0]), int(wanted[-1]) + 1
        band = level.read(Box(y0, x0, y1, x1))
        sampled[..., top : top + step, :] = band[..., (wanted - y0)[:, None], columns - x0]
    return sampled


def _inside(box: Box, level: Level) -> Box:
    """Cut a box to a level; at least its last line, where that ends short of the slide."""
    height, width = level.shape
    y0, x0 = min(box.y0, height - 1), min(box.x0, width - 1)
    return Box(y0, x0, max(y0 + 1, min(box.y1, height)), max(x0 + 1, min(box.x1, width)))


def _color_table(label: Label, ids: NDArray[Any]) -> tuple[UInt8, NDArray[np.float32]]:
    """Colour (y, x, 3) and strength (y, x) of class ids; instances get colours of their own."""
    if ids.dtype != np.uint8:
        mixed = (ids.astype(np.uint64) * 2654435761) & 0xFFFFFF
        parts = [64 + ((mixed >> shift) & 0xFF) % 192 for shift in (16, 8, 0)]
        return np.stack(parts, axis=-1).astype(np.uint8), (ids > 0).astype(np.float32)
    colors, strength = class_tables(label.classes)
    return colors[ids], strength[ids]


def class_tables(classes: Sequence[LabelClass]) -> tuple[UInt8, NDArray[np.float32]]:
    """Tables over class ids: colour (256, 3) and opacity (256,) in 0-1."""
    table = np.array([class_at(value, classes).color for value in range(256)], dtype=np.uint8)
    return table[:, :3], np.divide(table[:, 3], 255, dtype=np.float32)


def _edges(ids: NDArray[Any]) -> NDArray[np.bool_]:
    edge = np.zeros(ids.shape, dtype=bool)
    down, right = ids[1:] != ids[:-1], ids[:, 1:] != ids[:, :-1]
    edge[1:] |= down
    edge[:-1] |= down
    edge[:, 1:] |= right
    edge[:, :-1] |= right
    return edge


def to_png(picture: UInt8) -> bytes:
    """Encode (y, x, 3) uint8 as PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", optimize=False, compress_level=6)
    return buffer.getvalue()


def write_png(path: Path, picture: UInt8, *, overwrite: bool = False) -> None:
    """Write a picture; whole or not at all."""
    with whole_path(path, overwrite=overwrite) as part:
        part.write_bytes(to_png(picture))
