"""Handing results on: GeoJSON, CSV, OME-TIFF, PNG, OME-Zarr 0.4, the report and its facts."""

from tilepipe.export.figures import facts
from tilepipe.export.geojson import iter_features, write_geojson
from tilepipe.export.image import render_view, write_png
from tilepipe.export.objects import MaskObject, iter_instances, iter_objects
from tilepipe.export.ometiff import write_ome_tiff
from tilepipe.export.omezarr import copy_store
from tilepipe.export.result import Result
from tilepipe.export.table import write_csv

__all__ = [
    "MaskObject",
    "Result",
    "copy_store",
    "facts",
    "iter_features",
    "iter_instances",
    "iter_objects",
    "render_view",
    "write_csv",
    "write_geojson",
    "write_ome_tiff",
    "write_png",
]
