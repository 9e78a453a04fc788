"""OME metadata as it is written, built through ome-zarr-models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ome_zarr_models.common.omero import Channel, Omero, Window
from ome_zarr_models.v04.axes import Axis as Axis04
from ome_zarr_models.v04.image_label_types import Label as Label04
from ome_zarr_models.v04.multiscales import Dataset as Dataset04
from ome_zarr_models.v04.multiscales import Multiscale as Multiscale04
from ome_zarr_models.v05.axes import Axis as Axis05
from ome_zarr_models.v05.image_label_types import Label as Label05
from ome_zarr_models.v05.multiscales import Dataset as Dataset05
from ome_zarr_models.v05.multiscales import Multiscale as Multiscale05
from pydantic import BaseModel

from tilepipe.spec import LabelClass
from tilepipe.store.layout import Version

_AXES = {"c": "channel", "y": "space", "x": "space"}
_CHANNEL_COLORS = ("FFFFFF", "00FF00", "FF00FF", "00FFFF", "FFFF00", "FF0000", "0000FF", "FF8000")


@dataclass(frozen=True, slots=True)
class Place:
    """Where level-0 px lie, (y, x), in what the axes count."""

    scale: tuple[float, float] = (1.0, 1.0)
    """Of a px."""
    origin: tuple[float, float] = (0.0, 0.0)
    """Of the first px's centre."""
    units: tuple[str | None, str | None] = (None, None)


def place_of(mpp: tuple[float, float] | None) -> Place:
    """Return the place of an image of our own; without ``mpp`` its axes count px."""
    return Place() if mpp is None else Place(scale=mpp, units=("micrometer", "micrometer"))


def multiscales(
    version: Version,
    *,
    name: str,
    axes: Sequence[str],
    downsamples: Sequence[int],
    place: Place,
    method: str,
) -> list[dict[str, Any]]:
    """Return the ``multiscales`` of a 2x pyramid, level ``k`` at path ``str(k)``.

    A coarse pixel covers ``f`` fine ones, so its centre lies ``(f - 1) / 2`` of them from the first
    fine centre. ``place`` is that of the level-0 px that ``downsamples`` count.
    """
    px = dict(zip("yx", place.scale, strict=True))
    start = dict(zip("yx", place.origin, strict=True))
    scales, shifts = [], []
    for factor in downsamples:
        scales.append([px[axis] * factor if axis in px else 1.0 for axis in axes])
        shifts.append(
            [start[axis] + px[axis] * (factor - 1) / 2 if axis in px else 0.0 for axis in axes]
        )
    # Left out, not null, where the size of a pixel is unknown.
    units = {axis: {"unit": unit} for axis, unit in zip("yx", place.units, strict=True) if unit}
    described: list[dict[str, Any]] = [
        {"name": axis, "type": _AXES[axis], **units.get(axis, {})} for axis in axes
    ]
    transforms = list(zip(map(str, range(len(scales))), scales, shifts, strict=True))
    model: Multiscale04 | Multiscale05
    if version == "0.5":
        model = Multiscale05(
            axes=tuple(Axis05(**axis) for axis in described),
            datasets=tuple(
                Dataset05.build(path=path, scale=scale, translation=shift)
                for path, scale, shift in transforms
            ),
            name=name,
            type=method,
        )
    else:
        model = Multiscale04(
            axes=tuple(Axis04(**axis) for axis in described),
            datasets=tuple(
                Dataset04.build(path=path, scale=scale, translation=shift)
                for path, scale, shift in transforms
            ),
            name=name,
            type=method,
            version="0.4",
        )
    return [_json(model)]


def omero(
    *,
    names: Sequence[str],
    colors: Sequence[str | None],
    dtype: np.dtype[Any],
    rgb: bool,
) -> dict[str, Any]:
    """Return the ``omero`` block: per channel its name, colour (RRGGBB) and display window."""
    channels = []
    for index, name in enumerate(names):
        given = colors[index] if index < len(colors) else None
        channels.append(
            Channel.model_validate(
                {
                    "label": name,
                    "active": True,
                    "color": _hex(given) or _default_color(index, len(names), rgb=rgb),
                    "window": Window(**window_of(dtype)),
                }
            )
        )
    block = _json(Omero(channels=channels))
    model = "greyscale" if len(names) == 1 else "color"
    return {**block, "rdefs": {"defaultT": 0, "defaultZ": 0, "model": model}}


def window_of(dtype: np.dtype[Any]) -> dict[str, float]:
    """Return the display window of all that a dtype holds; of floats, 0 to 1."""
    high = 1.0 if dtype.kind == "f" else float(np.iinfo(dtype).max)
    return {"min": 0.0, "max": high, "start": 0.0, "end": high}


def _hex(color: str | None) -> str | None:
    text = (color or "").lstrip("#").upper()[:6]
    return text if len(text) == 6 and all(c in "0123456789ABCDEF" for c in text) else None


def _default_color(index: int, count: int, *, rgb: bool) -> str:
    if rgb and count == 3:
        return ("FF0000", "00FF00", "0000FF")[index]
    if count == 1:
        return "FFFFFF"
    return _CHANNEL_COLORS[1 + index % (len(_CHANNEL_COLORS) - 1)]


def image_label(
    version: Version, classes: Sequence[LabelClass], *, with_source: bool
) -> dict[str, Any]:
    """Return the ``image-label`` block: colour and name of each class value, 0 too.

    Objects, of which only 0 has a class, get no colours: viewers draw the values that a list of
    colours leaves out as nothing (napari) or black (Vizarr), and each in its own without a list.
    """
    block: dict[str, Any] = {"version": version}
    if len(classes) > 1:
        block["colors"] = [
            {"label-value": value, "rgba": list(item.color)} for value, item in enumerate(classes)
        ]
    if classes:
        block["properties"] = [
            {"label-value": value, "class": item.name} for value, item in enumerate(classes)
        ]
    if with_source:
        block["source"] = {"image": "../../"}
    (Label05 if version == "0.5" else Label04).model_validate(block)
    return block


def _json(model: BaseModel) -> dict[str, Any]:
    return model.model_dump(mode="json", by_alias=True, exclude_none=True)
