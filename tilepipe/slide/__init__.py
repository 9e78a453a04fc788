"""slide: open TIFF, OME-Zarr and whole-slide files; levels, pixel size, strict region reads."""

from tilepipe.slide.damage import Damage, DamagedTile
from tilepipe.slide.open import open_slide
from tilepipe.slide.shown import Read, reads_shown
from tilepipe.slide.tissue import TissueMask, tissue_level, tissue_mask
from tilepipe.slide.types import LevelInfo, OnDamage, Slide

__all__ = [
    "Damage",
    "DamagedTile",
    "LevelInfo",
    "OnDamage",
    "Read",
    "Slide",
    "TissueMask",
    "open_slide",
    "reads_shown",
    "tissue_level",
    "tissue_mask",
]
