"""Handing results on: GeoJSON, CSV, OME-TIFF, PNG, OME-Zarr 0.4, the report and its facts."""
