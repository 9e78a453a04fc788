"""Names and colours of a slide's channels, from whatever the format says of them."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from typing import Any

from tilepipe.slide.ome import nodes, ome_image
from tilepipe.slide.pixels import Meaning

_MAX_NAME = 100


def default_channels(count: int, *, rgb: bool) -> tuple[tuple[str, ...], tuple[str | None, ...]]:
    """Names and colours where the file says none."""
    if rgb and count == 3:
        return ("red", "green", "blue"), ("FF0000", "00FF00", "0000FF")
    if count == 1:
        return ("grey",), ("FFFFFF",)
    return tuple(f"channel {k}" for k in range(count)), (None,) * count


def read_channels(
    series: Any, *, meaning: Meaning, n_planes: int
) -> tuple[tuple[str, ...], tuple[str | None, ...]]:
    """Names and colours (``RRGGBB``) of all channels; defaults where the file is silent."""
    count = n_planes * meaning.channels
    names, colors = default_channels(count, rgb=meaning.rgb and n_planes == 1)
    reader = {"ome": _from_ome, "imagej": _from_imagej, "qpi": _from_qptiff}.get(series.kind)
    if meaning.rgb or reader is None:
        return names, colors
    try:
        found = reader(series)
    except (ElementTree.ParseError, ValueError, TypeError, AttributeError, KeyError):
        return names, colors
    if len(found) != count:
        return names, colors
    return (
        tuple(
            (name or default)[:_MAX_NAME] for (name, _), default in zip(found, names, strict=True)
        ),
        tuple(color or default for (_, color), default in zip(found, colors, strict=True)),
    )


def _from_ome(series: Any) -> list[tuple[str | None, str | None]]:
    image = ome_image(series)
    channels = nodes(image, "Channel") if image is not None else ()
    return [(node.get("Name"), _ome_color(node.get("Color"))) for node in channels]


def _from_qptiff(series: Any) -> list[tuple[str | None, str | None]]:
    """Every page of a channel describes its stain; colours are ``red,green,blue``."""
    found: list[tuple[str | None, str | None]] = []
    for page in series._pages:
        root = ElementTree.fromstring(page.aspage().description)
        name = root.findtext("Biomarker") or root.findtext("Name")
        parts = (root.findtext("Color") or "").split(",")
        color = "".join(f"{int(part) & 0xFF:02X}" for part in parts) if len(parts) == 3 else None
        found.append((name, color))
    return found


def _ome_color(value: str | None) -> str | None:
    """OME colours are signed 32-bit RGBA."""
    if value is None:
        return None
    return f"{(int(value) & 0xFFFFFFFF) >> 8:06X}"


def _from_imagej(series: Any) -> list[tuple[str | None, str | None]]:
    meta = series.parent.imagej_metadata or {}
    labels = meta.get("Labels") or []
    tables = meta.get("LUTs") or []
    count = int(meta.get("channels", 1))
    found: list[tuple[str | None, str | None]] = []
    for k in range(count):
        name = str(labels[k]) if k < len(labels) else None
        # The brightest entry of a look-up table is the channel's colour.
        color = (
            "".join(f"{int(part):02X}" for part in tables[k][:, -1]) if k < len(tables) else None
        )
        found.append((name, color))
    return found
