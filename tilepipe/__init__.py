"""tilepipe: exact, fast segmentation of gigapixel TIFFs into OME-Zarr mask pyramids.

import tilepipe

result = tilepipe.run("slide.tif", model="unet")
result.labels[0:1000, 0:1000]                       # class ids, numpy
tilepipe.open_slide("slide.tif").read(tilepipe.Box(0, 0, 512, 512))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tilepipe.errors import TilepipeError
    from tilepipe.models import load_model
    from tilepipe.notebook import ingest, open_result, run, verify
    from tilepipe.slide import open_slide
    from tilepipe.spec import JobSpec
    from tilepipe.store import open_store
    from tilepipe.tiling import Box

_HOME = {
    "Box": "tilepipe.tiling",
    "JobSpec": "tilepipe.spec",
    "TilepipeError": "tilepipe.errors",
    "ingest": "tilepipe.notebook",
    "load_model": "tilepipe.models",
    "open_result": "tilepipe.notebook",
    "open_slide": "tilepipe.slide",
    "open_store": "tilepipe.store",
    "run": "tilepipe.notebook",
    "verify": "tilepipe.notebook",
}

__all__ = [
    "Box",
    "JobSpec",
    "TilepipeError",
    "ingest",
    "load_model",
    "open_result",
    "open_slide",
    "open_store",
    "run",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its wing when it is first asked for."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
