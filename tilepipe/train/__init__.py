"""Training: annotated images in, weights out; losses, the U-Net weight map, metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tilepipe.train.events import TrainResult
    from tilepipe.train.loop import train
    from tilepipe.train.spec import TrainSpec
    from tilepipe.train.targets import separate
    from tilepipe.train.weight_map import weight_map

__all__ = ["TrainResult", "TrainSpec", "separate", "train", "weight_map"]

_ROOMS = {
    "TrainResult": "events",
    "TrainSpec": "spec",
    "separate": "targets",
    "train": "loop",
    "weight_map": "weight_map",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_ROOMS[name]}"), name)
