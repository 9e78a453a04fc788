"""``write_geojson``: one feature per object, as QuPath reads them, streamed to disk."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tilepipe.errors import ExportError
from tilepipe.export.objects import MaskLevel, MaskObject, iter_instances, iter_objects
from tilepipe.export.polygons import Ring, simplify
from tilepipe.export.probability import ProbabilityOf
from tilepipe.export.sink import text_sink
from tilepipe.spec import LabelClass, class_at
from tilepipe.steps import Tell, ignore
from tilepipe.tiling import Shape

ObjectType = Literal["annotation", "detection"]


def iter_features(
    level: MaskLevel,
    classes: Sequence[LabelClass],
    *,
    scale: int = 1,
    extent: Shape | None = None,
    um2_per_px: float | None = None,
    object_type: ObjectType = "annotation",
    tolerance_px: float = 0.0,
    only: frozenset[int] | None = None,
    instances: bool = False,
    probability: ProbabilityOf | None = None,
    region_px: int = 2048,
    tell: Tell = ignore,
) -> Iterator[dict[str, Any]]:
    """Yield a GeoJSON feature per object; coordinates are level-0 px (x, y).

    An object is a 4-connected region of a class; with ``instances`` it is all pixels of one id,
    as a MultiPolygon where they lie apart.

    ``scale``: level-0 px per px of ``level``, whose last px may reach beyond the slide; ``extent``
    (y, x) is the slide's, to which coordinates are cut. ``um2_per_px``: area of a px of ``level``;
    adds the measurement. ``only``: class ids to keep. ``tolerance_px`` > 0 simplifies outlines by
    about that many level px; 0 keeps them pixel-exact. ``probability`` tells the pixels'; adds the
    measurement of its mean.
    """
    objects = iter_instances if instances else iter_objects
    for found in objects(
        level, outlines=True, region_px=region_px, probability=probability, tell=tell
    ):
        if only is not None and found.value not in only:
            continue
        yield _feature(
            found,
            classes,
            scale=scale,
            extent=extent,
            um2_per_px=um2_per_px,
            object_type=object_type,
            tolerance_px=tolerance_px,
            instances=instances,
            with_probability=probability is not None,
        )


def _feature(
    found: MaskObject,
    classes: Sequence[LabelClass],
    *,
    scale: int,
    extent: Shape | None,
    um2_per_px: float | None,
    object_type: ObjectType,
    tolerance_px: float,
    instances: bool,
    with_probability: bool,
) -> dict[str, Any]:
    # Cut to the slide first: what is simplified then has its corners there, too.
    exact = [[_scaled(ring, scale, extent) for ring in polygon] for polygon in found.polygons()]
    outlines = simplify(exact, tolerance_px * scale) if tolerance_px > 0 else exact
    # They come clockwise, holes the other way; RFC 7946 wants outer rings counterclockwise.
    polygons = [[ring[::-1].tolist() for ring in polygon] for polygon in outlines]
    if len(polygons) == 1:
        geometry = {"type": "Polygon", "coordinates": polygons[0]}
    else:
        geometry = {"type": "MultiPolygon", "coordinates": polygons}
    measurements: dict[str, float] = {"Area px": found.area_px * scale * scale}
    if um2_per_px is not None:
        measurements["Area µm^2"] = round(found.area_px * um2_per_px, 4)
    if with_probability:
        measurements["mean probability"] = round(found.mean_probability, 4)
    name, color = class_of(found.value, None if instances else classes)
    number = {"object_id": found.value} if instances else {"class_id": found.value}
    return {
        "type": "Feature",
        "geometry": geometry,
        "properties": {
            "objectType": object_type,
            "classification": {"name": name, "color": list(color)},
            **number,
            "measurements": measurements,
        },
    }


def _scaled(ring: Ring, scale: int, extent: Shape | None) -> Ring:
    points = ring * scale
    return points if extent is None else np.minimum(points, extent[::-1])


def class_of(value: int, classes: Sequence[LabelClass] | None) -> tuple[str, tuple[int, int, int]]:
    """Name and colour of a class id; objects (None), whatever their ids, share one."""
    if classes is None:
        return "object", (230, 75, 53)
    one = class_at(value, classes)
    red, green, blue, _ = one.color
    return one.name, (red, green, blue)


def write_geojson(
    path: Path,
    level: MaskLevel,
    classes: Sequence[LabelClass],
    *,
    scale: int = 1,
    extent: Shape | None = None,
    um2_per_px: float | None = None,
    object_type: ObjectType = "annotation",
    tolerance_px: float = 0.0,
    only: frozenset[int] | None = None,
    instances: bool = False,
    probability: ProbabilityOf | None = None,
    overwrite: bool = False,
    tell: Tell = ignore,
) -> int:
    """Write a FeatureCollection (gzipped if ``path`` ends in .gz); returns the number of features.

    Raises ExportError; then nothing is left at ``path``.
    """
    if not 0 <= tolerance_px < math.inf:
        raise ExportError(f"--simplify {tolerance_px}: a tolerance is a number of px, 0 or more")
    count = 0
    with text_sink(path, overwrite=overwrite) as file:
        file.write('{"type":"FeatureCollection","features":[')
        for feature in iter_features(
            level,
            classes,
            scale=scale,
            extent=extent,
            um2_per_px=um2_per_px,
            object_type=object_type,
            tolerance_px=tolerance_px,
            only=only,
            instances=instances,
            probability=probability,
            tell=tell,
        ):
            file.write(",\n" if count else "\n")
            file.write(json.dumps(feature, separators=(",", ":"), ensure_ascii=False))
            count += 1
        file.write("\n]}\n")
    return count
