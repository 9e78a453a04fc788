"""slide: open TIFF, OME-Zarr and whole-slide files; levels, pixel size, strict region reads."""

from tilepipe.slide.open import open_slide
from tilepipe.slide.spread import Read, spread
from tilepipe.slide.tissue import TissueMask, tissue_level, tissue_mask
from tilepipe.slide.types import DamagedTile, LevelInfo, OnDamage, Slide

__all__ = [
    "DamagedTile",
    "LevelInfo",
    "OnDamage",
    "Read",
    "Slide",
    "TissueMask",
    "open_slide",
    "spread",
    "tissue_level",
    "tissue_mask",
]
