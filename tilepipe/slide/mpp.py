"""Micrometres per pixel: where each format says it, and when a tag is not to be believed."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from typing import Any

from tilepipe.slide.ome import nodes, ome_image

MPP_RANGE = (0.05, 20.0)
"""Generic resolution tags outside of it (µm) are print resolutions, not pixel sizes."""
_UM_PER_UNIT = {2: 25400.0, 3: 10000.0}
_UM_PER_OME_UNIT = {
    "m": 1e6, "dm": 1e5, "cm": 1e4, "mm": 1e3, "µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3,
    "pm": 1e-6, "Å": 1e-4, "in": 25400.0, "micrometer": 1.0, "nanometer": 1e-3, "millimeter": 1e3,
    "meter": 1e6, "centimeter": 1e4, "angstrom": 1e-4,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class PixelSize:
    """µm per px (y, x) and where it came from; None and why not."""

    mpp: tuple[float, float] | None
    source: str


def um_per(unit: str) -> float | None:
    """Micrometres per length unit of OME; None for pixels and unknown ones."""
    return _UM_PER_OME_UNIT.get(unit)


def read_mpp(series: Any) -> PixelSize:
    """Pixel size of a series of a TIFF; never raises on what the tags hold."""
    readers = {
        "svs": _from_svs,
        "ndpi": _from_ndpi,
        "ome": _from_ome,
        "scn": _from_scn,
        "philips": _from_philips,
        "imagej": _from_imagej,
    }
    # A Philips file without overviews is no Philips series to tifffile.
    reader = readers.get("philips" if series.keyframe.is_philips else series.kind)
    try:
        found = reader(series) if reader is not None else None
        return found if found is not None else _from_resolution(series.keyframe)
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError, OverflowError):
        return PixelSize(None, "unknown: the tags that should hold it are damaged")
    except ElementTree.ParseError:
        return PixelSize(None, "unknown: the XML that should hold it is damaged")


def _checked(y: float, x: float, source: str) -> PixelSize | None:
    if all(math.isfinite(size) and size > 0 for size in (y, x)):
        return PixelSize((y, x), source)
    return None


def _description(series: Any) -> str:
    text = series.keyframe.description
    return text if isinstance(text, str) else ""


def _from_svs(series: Any) -> PixelSize | None:
    found = re.search(r"MPP\s*=\s*([0-9.,eE+-]+)", _description(series))
    if found is None:
        return None
    # Some scanners write as their country does; OpenSlide reads it so, too.
    size = float(found[1].rstrip(",").replace(",", "."))
    return _checked(size, size, "Aperio MPP")


def _from_ndpi(series: Any) -> PixelSize | None:
    size = _resolution(series.keyframe)
    return _checked(*size, "NDPI resolution tags") if size else None


def _from_ome(series: Any) -> PixelSize | None:
    image = ome_image(series)
    if image is None:
        return None
    for node in nodes(image, "Pixels"):
        if "PhysicalSizeX" in node.attrib:
            scale_x = _UM_PER_OME_UNIT.get(node.get("PhysicalSizeXUnit", "µm"))
            scale_y = _UM_PER_OME_UNIT.get(node.get("PhysicalSizeYUnit", "µm"))
            if scale_x is None or scale_y is None:
                return PixelSize(None, "unknown: OME gives the pixel size in an unknown unit")
            x = float(node.attrib["PhysicalSizeX"])
            y = float(node.get("PhysicalSizeY", x))
            return _checked(y * scale_y, x * scale_x, "OME PhysicalSize")
    return None


def _from_scn(series: Any) -> PixelSize | None:
    root = ElementTree.fromstring(series.parent.scn_metadata or _description(series))
    height, width = _sides(series)
    for image in (node for node in root.iter() if node.tag.rsplit("}", 1)[-1] == "image"):
        children = {node.tag.rsplit("}", 1)[-1]: node for node in image}
        pixels, view = children.get("pixels"), children.get("view")
        if pixels is None or view is None:
            continue
        if (int(pixels.get("sizeY", 0)), int(pixels.get("sizeX", 0))) == (height, width):
            # The view is in nanometres.
            y, x = float(view.get("sizeY", 0)) / height, float(view.get("sizeX", 0)) / width
            return _checked(y / 1000, x / 1000, "SCN view size")
    return None


def _from_philips(series: Any) -> PixelSize | None:
    text = series.parent.philips_metadata or _description(series)
    sizes = []
    for node in ElementTree.fromstring(text).iter():
        if node.get("Name") == "DICOM_PIXEL_SPACING" and node.text:
            values = [float(part) for part in re.findall(r"[0-9.eE+-]+", node.text)]
            if len(values) == 2:
                sizes.append((values[0] * 1000, values[1] * 1000))
    # One entry per level and one of the whole: level 0 is the finest.
    return _checked(*min(sizes), "DICOM_PIXEL_SPACING") if sizes else None


def _from_imagej(series: Any) -> PixelSize | None:
    meta = series.parent.imagej_metadata or {}
    unit = str(meta.get("unit", "")).encode("latin-1", "replace").decode("unicode_escape")
    scale = _UM_PER_OME_UNIT.get({"micron": "µm", "microns": "µm"}.get(unit, unit))
    y, x = _px_per_unit(series.keyframe)
    if scale is None or y is None or x is None:
        return None
    return _checked(scale / y, scale / x, "ImageJ unit and resolution tags")


def _sides(series: Any) -> tuple[int, int]:
    return series.shape[series.axes.index("Y")], series.shape[series.axes.index("X")]


def _px_per_unit(keyframe: Any) -> tuple[float | None, float | None]:
    sides: list[float | None] = []
    for code in (283, 282):
        value = keyframe.tags.valueof(code)
        if not isinstance(value, tuple) or len(value) != 2 or not value[0] or not value[1]:
            sides.append(None)
        else:
            sides.append(float(value[0]) / float(value[1]))
    return sides[0], sides[1]


def _resolution(keyframe: Any) -> tuple[float, float] | None:
    """µm per px (y, x) that the resolution tags give, believable or not."""
    y, x = _px_per_unit(keyframe)
    # Inches where there is no tag; NONE (1), which is falsy, is no length.
    unit = _UM_PER_UNIT.get(int(keyframe.tags.valueof(296, 2)))
    if unit is None or x is None:
        return None
    return unit / (y or x), unit / x


def _from_resolution(keyframe: Any) -> PixelSize:
    size = _resolution(keyframe)
    if size is None:
        return PixelSize(None, "unknown: no pixel size in the file; pass --slide-mpp")
    if all(MPP_RANGE[0] <= side <= MPP_RANGE[1] for side in size):
        return PixelSize(size, "TIFF resolution tags")
    return PixelSize(
        None,
        f"unknown: the resolution tags say {size[1]:.4g} µm, a print resolution; pass --slide-mpp",
    )
