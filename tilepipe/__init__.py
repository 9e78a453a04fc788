"""tilepipe: exact, fast segmentation of gigapixel TIFFs into OME-Zarr mask pyramids."""
