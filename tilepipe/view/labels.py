"""``ShownLabel``: a label of a store as the page sees it: classes, values, how far its job is."""

from __future__ import annotations

from typing import Any

import numpy as np

from tilepipe.spec import LabelClass, class_at
from tilepipe.store import Label
from tilepipe.tiling import Box
from tilepipe.view.pyramid import ShownPyramid


class ShownLabel:
    """A label and what its job says of itself."""

    def __init__(
        self,
        label: Label,
        pyramid: ShownPyramid,
        record: dict[str, Any],
        probabilities: ShownPyramid | None = None,
    ) -> None:
        self.name = label.name
        self.classes: tuple[LabelClass, ...] = label.classes
        self.pyramid = pyramid
        self.record = record
        self.probabilities = probabilities
        """Of its foreground classes, bytes (c, y, x); None where it was made without them."""

    @property
    def instances(self) -> bool:
        """Whether pixels hold object numbers instead of class ids."""
        return self.pyramid.dtype != np.uint8

    def class_name(self, value: int) -> str:
        """Name of a class id."""
        if not self.instances:
            return class_at(value, self.classes).name
        return f"object {value}" if value else "background"

    def value_at(self, y: int, x: int) -> int:
        """Class id or object number at a level-0 pixel of the slide."""
        return int(_pixel(self.pyramid, y, x))

    def probabilities_at(self, y: int, x: int) -> list[int] | None:
        """Bytes of the foreground classes at a level-0 pixel; None where there are none."""
        if self.probabilities is None:
            return None
        found: list[int] = _pixel(self.probabilities, y, x).tolist()
        return found

    def describe(self) -> dict[str, Any]:
        """Return what the page needs to show it, as JSON."""
        return {
            "name": self.name,
            "instances": self.instances,
            "unit_px": self.pyramid.levels[0].unit_px,
            "levels": self.pyramid.describe(),
            "classes": _classes(self),
            "probabilities": [] if self.probabilities is None else self._channels(),
            "record": self.record,
        }

    def _channels(self) -> list[dict[str, Any]]:
        """Name and class id of each channel of the probabilities."""
        return [
            {"value": value, "name": one.name}
            for value, one in enumerate(self.classes)
            if value > 0
        ]

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


def _pixel(pyramid: ShownPyramid, y: int, x: int) -> Any:
    """Value, or values by channel, of the finest level at a level-0 pixel of the slide."""
    factor = pyramid.levels[0].downsample
    rows, columns = pyramid.levels[0].shape
    ly, lx = min(y // factor, rows - 1), min(x // factor, columns - 1)
    return pyramid.read(0, Box(ly, lx, ly + 1, lx + 1))[..., 0, 0]


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
    listed += [class_at(value) for value in range(len(listed), highest + 1)]
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
