"""Pyramids, channels and classes as OME metadata tells of them, read leniently: of any program."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tilepipe.errors import StoreError
from tilepipe.spec import LabelClass, default_classes, explain
from tilepipe.store.metadata import Place

_MICROMETERS = {
    "angstrom": 1e-4,
    "nanometer": 1e-3,
    "micrometer": 1.0,
    "millimeter": 1e3,
    "centimeter": 1e4,
    "meter": 1e6,
}


class _Axis(BaseModel):
    model_config = ConfigDict(extra="ignore")
    name: str
    unit: str | None = None


class _Transform(BaseModel):
    model_config = ConfigDict(extra="ignore")
    type: str = ""
    scale: list[float] | str | None = None
    translation: list[float] | str | None = None


class _Dataset(BaseModel):
    model_config = ConfigDict(extra="ignore")
    path: str = Field(min_length=1, max_length=1000)
    coordinateTransformations: list[_Transform] = []


class _Multiscale(BaseModel):
    model_config = ConfigDict(extra="ignore")
    axes: list[_Axis] = Field(min_length=2, max_length=5)
    datasets: list[_Dataset] = Field(min_length=1, max_length=64)
    coordinateTransformations: list[_Transform] = []
    name: Any = None


@dataclass(frozen=True, slots=True)
class Pyramid:
    """What is read of a ``multiscales`` entry."""

    axes: tuple[str, ...]
    """Each one letter of t, c, z, y, x; the last two are y, x."""
    paths: tuple[str, ...]
    downsamples: tuple[int, ...]
    """Level-0 px per px, rounded: of another program's what ``whole_step`` says counts."""
    mpp: tuple[float, float] | None
    """µm per level-0 px (y, x); None where the axes have no unit of length."""
    place: Place = field(default_factory=Place)
    steps: tuple[tuple[float, float], ...] = ()
    """Level-0 px per px (y, x) of each level, as its scale says."""


def read_pyramid(location: str, ome: dict[str, Any]) -> Pyramid | None:
    """Read the first ``multiscales`` entry; None if there is none, StoreError if it is broken."""
    entries = ome.get("multiscales")
    if entries is None:
        return None
    if not isinstance(entries, list) or not entries:
        raise StoreError(f"{location}: its OME metadata has an empty `multiscales`")
    if _is_before_04(entries[0]):
        raise StoreError(
            f"{location}: is of OME-Zarr 0.3 or before, which says no sizes of pixels; name "
            "another output (-o) to have such an image copied first"
        )
    try:
        entry = _Multiscale.model_validate(entries[0])
    except ValidationError as error:
        raise StoreError(f"{location}: its OME metadata is broken: {explain(error)}") from error
    axes = tuple(axis.name.lower() for axis in entry.axes)
    if axes[-2:] != ("y", "x") or set(axes) - set("tczyx") or len(set(axes)) != len(axes):
        raise StoreError(
            f"{location}: its axes are {', '.join(axes)[:100]}; a store is worked on with "
            "(t, c, z,) y, x; name another output (-o) to have such an image copied first"
        )
    common = _scale(entry.coordinateTransformations, len(axes)) or (1.0,) * len(axes)
    scales = []
    for dataset in entry.datasets:
        own = _scale(dataset.coordinateTransformations, len(axes)) or (1.0,) * len(axes)
        scales.append(tuple(a * b for a, b in zip(own, common, strict=True)))
    finest = scales[0]
    steps = [
        tuple(a / b if b else math.inf for a, b in zip(s, finest, strict=True)) for s in scales
    ]
    if not all(0 < number < math.inf for row in (*scales, *steps) for number in row):
        raise StoreError(f"{location}: its OME metadata is broken: scales that are no numbers")
    return Pyramid(
        axes=axes,
        paths=tuple(dataset.path.strip("/") for dataset in entry.datasets),
        downsamples=tuple(max(1, round(step[-1])) for step in steps),
        mpp=_mpp(entry.axes, finest),
        place=Place(
            scale=(finest[-2], finest[-1]),
            origin=_origin(entry, common[-2:]),
            units=(entry.axes[-2].unit, entry.axes[-1].unit),
        ),
        steps=tuple((step[-2], step[-1]) for step in steps),
    )


def _is_before_04(entry: Any) -> bool:
    """Tell whether a ``multiscales`` entry has axes that are names only, or none."""
    if not isinstance(entry, dict) or not entry.get("datasets"):
        return False
    axes = entry.get("axes", [])
    return isinstance(axes, list) and all(isinstance(axis, str) for axis in axes)


def _scale(transforms: Sequence[_Transform], ndim: int) -> tuple[float, ...] | None:
    for transform in transforms:
        if transform.type == "scale" and isinstance(transform.scale, list):
            values = tuple(transform.scale)
            if len(values) == ndim and all(math.isfinite(v) and v > 0 for v in values):
                return values
    return None


def _origin(entry: _Multiscale, common: Sequence[float]) -> tuple[float, float]:
    """Return where the first px's centre lies (y, x): the level's own steps, then all levels'."""
    own = _translation(entry.datasets[0].coordinateTransformations, len(entry.axes))
    whole = _translation(entry.coordinateTransformations, len(entry.axes))
    y, x = (a * by + b for a, b, by in zip(own, whole, common, strict=True))
    return y, x


def _translation(transforms: Sequence[_Transform], ndim: int) -> tuple[float, float]:
    for transform in transforms:
        if transform.type == "translation" and isinstance(transform.translation, list):
            values = transform.translation
            if len(values) == ndim and all(map(math.isfinite, values)):
                return values[-2], values[-1]
    return 0.0, 0.0


def _mpp(axes: Sequence[_Axis], scale: Sequence[float]) -> tuple[float, float] | None:
    factors = [_MICROMETERS.get(axis.unit or "") for axis in axes[-2:]]
    if factors[0] is None or factors[1] is None:
        return None
    return scale[-2] * factors[0], scale[-1] * factors[1]


def read_channels(
    ome: dict[str, Any], count: int, dtype: np.dtype[Any]
) -> tuple[tuple[str, ...], bool]:
    """Return the channel names of an ``omero`` block, and whether the channels are RGB.

    Three channels of bytes are, unless their colours say otherwise: as where the image is copied.
    """
    block = ome.get("omero")
    listed = block.get("channels") if isinstance(block, dict) else None
    items = listed[:count] if isinstance(listed, list) else []
    channels = [item if isinstance(item, dict) else {} for item in items]
    names = tuple(
        str(channels[i].get("label") or f"channel {i}")[:200]
        if i < len(channels)
        else f"channel {i}"
        for i in range(count)
    )
    colors = [str(item.get("color", "")).lstrip("#").upper() for item in channels]
    rgb = colors == ["FF0000", "00FF00", "0000FF"] or (dtype == np.uint8 and not any(colors))
    return names, count == 3 and rgb


def read_classes(ome: dict[str, Any]) -> tuple[LabelClass, ...]:
    """Return the classes of an ``image-label`` block, from value 0 up to the largest named.

    Values it does not name are called ``class N``. Values above 255 (instances) are left out.
    """
    block = ome.get("image-label")
    if not isinstance(block, dict):
        return ()
    names: dict[int, str] = {}
    colors: dict[int, tuple[int, ...]] = {}
    for value, item in _by_value(block.get("properties")):
        text = item.get("class") or item.get("name")
        if isinstance(text, str) and text:
            names[value] = text[:200]
    for value, item in _by_value(block.get("colors")):
        rgba = item.get("rgba")
        if isinstance(rgba, list) and len(rgba) == 4 and all(map(_is_byte, rgba)):
            colors[value] = tuple(rgba)
    if not names and not colors:
        return ()
    found = default_classes(max([*names, *colors]) + 1)
    return tuple(
        LabelClass.model_validate(
            {"name": names.get(value, item.name), "color": colors.get(value, item.color)}
        )
        for value, item in enumerate(found)
    )


def _by_value(listed: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the entries of a JSON list that are about a class value, 0-255."""
    for item in listed if isinstance(listed, list) else []:
        value = item.get("label-value") if isinstance(item, dict) else None
        if isinstance(value, int) and _is_byte(value):
            yield value, item


def _is_byte(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 255
