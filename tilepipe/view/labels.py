"""``ShownLabel``: a label of a store as the page sees it: classes, values, how far its job is."""

from __future__ import annotations

from typing import Any

import numpy as np

from tilepipe.spec import LabelClass
from tilepipe.store import Label
from tilepipe.tiling import Box
from tilepipe.view.pyramid import ShownPyramid


class ShownLabel:
    """A label and what its job says of itself."""

    def __init__(self, label: Label, pyramid: ShownPyramid, record: dict[str, Any]) -> None:
        self.name = label.name
        self.classes: tuple[LabelClass, ...] = label.classes
        self.pyramid = pyramid
        self.record = record

    @property
    def instances(self) -> bool:
        """Whether pixels hold object numbers instead of class ids."""
        return self.pyramid.dtype != np.uint8

    def class_name(self, value: int) -> str:
        """Name of a class id."""
        if not self.instances and value < len(self.classes):
            return self.classes[value].name
        return f"object {value}" if value else "background"

    def value_at(self, y: int, x: int) -> int:
        """Class id or object number at a level-0 pixel of the slide."""
        factor = self.pyramid.levels[0].downsample
        rows, columns = self.pyramid.levels[0].shape
        ly, lx = min(y // factor, rows - 1), min(x // factor, columns - 1)
        return int(self.pyramid.read(0, Box(ly, lx, ly + 1, lx + 1))[0, 0])

    def describe(self) -> dict[str, Any]:
        """Return what the page needs to show it, as JSON."""
        return {
            "name": self.name,
            "instances": self.instances,
            "unit_px": self.pyramid.levels[0].unit_px,
            "levels": self.pyramid.describe(),
            "classes": _classes(self),
            "record": self.record,
        }

    def progress(self) -> dict[str, Any]:
        """Return how many units are done, which, and which failed, as JSON."""
        tracker = self.pyramid.tracker
        grid = self.pyramid.levels[0].grid
        done = None if tracker is None else tracker.done_units(0)
        return {
            "units": len(grid),
            "shape": list(grid.shape),
            "done": len(grid) if done is None else len(done),
            "done_units": done,
            "failed": _failed_units(self.record),
            "state": str(self.record.get("state", "")),
        }


def _failed_units(record: dict[str, Any]) -> list[list[int]]:
    """Units of the finest level that the job gave up on, as it recorded them."""
    listed = record.get("failed")
    found = []
    for one in listed if isinstance(listed, list) else []:
        unit = one.get("unit") if isinstance(one, dict) and not one.get("level") else None
        if isinstance(unit, list) and len(unit) == 2 and all(isinstance(n, int) for n in unit):
            found.append([int(unit[0]), int(unit[1])])
    return found


def _classes(label: ShownLabel) -> list[dict[str, Any]]:
    if label.instances:
        return []
    counts = np.bincount(label.pyramid.overview().reshape(-1), minlength=256)
    total = max(1, int(counts.sum()))
    listed = list(label.classes)
    highest = int(np.flatnonzero(counts).max(initial=0))
    listed += [
        LabelClass(name=f"class {value}", color=(128, 128, 128, 255))
        for value in range(len(listed), highest + 1)
    ]
    return [
        {
            "value": value,
            "name": one.name,
            "color": list(one.color[:3]),
            "shown": one.color[3] > 0,
            "share": float(counts[value]) / total,
        }
        for value, one in enumerate(listed)
    ]
