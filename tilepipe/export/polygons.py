"""Pixel-exact outlines: corners of pixels as integers, holes kept, pieces joined without error."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilepipe.errors import ExportError
from tilepipe.export.runs import Regions
from tilepipe.tiling import Box

Ring = NDArray[np.int64]
"""(n, 2) corners (x, y); the last equals the first."""
Polygon = list[Ring]
"""The outer ring, then the holes."""
_GRID_PX = 0.001


def trace_regions(regions: Regions, box: Box) -> list[Polygon]:
    """Outlines of ``regions`` in region order, in the px of the level that ``box`` was read from.

    Raises ExportError if rasterio is not installed.
    """
    features = _rasterio_features()
    outlines: list[Polygon] = [[] for _ in range(len(regions))]
    if not outlines:
        return outlines
    origin = np.array([box.x0, box.y0])
    for geometry, number in features.shapes(regions.ids, mask=regions.ids > 0, connectivity=4):
        outlines[int(number) - 1] = [
            np.asarray(ring, dtype=np.int64) + origin for ring in geometry["coordinates"]
        ]
    return outlines


def split_holes(polygon: Polygon, box: Box) -> tuple[Polygon, list[Ring]]:
    """Part a fragment of ``box`` into what touches a border of the box, and its other holes."""
    touching: Polygon = [polygon[0]]
    inner: list[Ring] = []
    for hole in polygon[1:]:
        low, high = hole.min(axis=0), hole.max(axis=0)
        clear = low[0] > box.x0 and low[1] > box.y0 and high[0] < box.x1 and high[1] < box.y1
        (inner if clear else touching).append(hole)
    return touching, inner


def merge_polygons(pieces: list[Polygon]) -> list[Polygon]:
    """Union of polygons of whole-number corners that share edges; no corner is moved."""
    if len(pieces) < 2:
        return pieces
    shapely = _shapely()
    union = shapely.union_all([shapely.Polygon(piece[0], piece[1:]) for piece in pieces])
    parts = union.geoms if union.geom_type == "MultiPolygon" else [union]
    return [
        [_straighten(ring.coords) for ring in (part.exterior, *part.interiors)] for part in parts
    ]


def _straighten(coordinates: Any) -> Ring:
    """Drop corners at which the outline goes straight on: the seams of the pieces."""
    # Coordinates are whole numbers below 2**53, so rint restores them exactly.
    ring = np.rint(np.asarray(coordinates)).astype(np.int64)[:-1]
    before = ring - np.roll(ring, 1, axis=0)
    after = np.roll(ring, -1, axis=0) - ring
    turns = before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]
    kept = ring[turns]
    return np.concatenate([kept, kept[:1]])


def simplify(polygons: list[Polygon], tolerance_px: float) -> list[list[NDArray[np.float64]]]:
    """Outlines with fewer corners, about ``tolerance_px`` from the exact ones, still valid.

    Corners are some of those there were, or whole thousandths.
    """
    shapely = _shapely()
    parts = [
        shapely.Polygon(polygon[0], polygon[1:]).simplify(tolerance_px, preserve_topology=True)
        for polygon in polygons
    ]
    if len(parts) > 1:
        # Each is simplified by itself: they may reach into each other, which their union does not.
        parts = shapely.get_parts(shapely.union_all(parts, grid_size=_GRID_PX)).tolist()
    return [
        [np.round(ring.coords, 3) for ring in (part.exterior, *part.interiors)] for part in parts
    ]


def _rasterio_features() -> Any:
    try:
        from rasterio import features
    except ImportError as error:
        raise ExportError(
            "outlines need rasterio; install it with: pip install 'tilepipe[geojson]'"
        ) from error
    return features


def _shapely() -> Any:
    try:
        import shapely
    except ImportError as error:
        raise ExportError(
            "joining outlines needs shapely; install it with: pip install 'tilepipe[geojson]'"
        ) from error
    return shapely
