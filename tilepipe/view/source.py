"""``Source``: one store as the page sees it: description, tiles, pixels, progress, objects."""

from __future__ import annotations

import itertools
import json
import threading
import time
from typing import Any

import numpy as np

from tilepipe.errors import StoreError, TilepipeError
from tilepipe.spec import LabelClass
from tilepipe.store import Label, Store, open_store
from tilepipe.store.attributes import ome_of, read_attributes
from tilepipe.tiling import Box, Shape
from tilepipe.tiling.grid import level_extents
from tilepipe.view import render
from tilepipe.view.cache import ByteLRU
from tilepipe.view.pyramid import TILE_PX, ShownPyramid
from tilepipe.view.units import IMAGE_STAGES, LABEL_STAGES, tracker_of

_LOOK_EVERY_S = 0.4
_OVERVIEW_PX = 2048
_COLORS = ("4d7cff", "3ddc84", "ff4d5e", "ffd23f", "d05cff", "35d6e6", "ff8a3d", "ffffff")


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


class Source:
    """A store, read only; rebuilt when a job adds or replaces a label."""

    def __init__(self, location: str, cache: ByteLRU) -> None:
        self.location = location
        self.generation = 0
        """Rises when the description changes, so that the page asks for it again."""
        self._cache = cache
        self._clock = itertools.count(1)
        self._lock = threading.Lock()
        self._looked = 0.0
        self._signature = ""
        self.store: Store
        self.image: ShownPyramid | None = None
        self.labels: list[ShownLabel] = []
        self._build(*self._read_signature())

    def _read_signature(self) -> tuple[Store, str]:
        """Open the store and tell what its description depends on."""
        store = open_store(self.location)
        parts: list[Any] = [store.record.get("state"), store.has_image]
        for name in store.labels:
            record = store.label(name).read_record()
            parts.append(
                [
                    name,
                    *(record.get(key) for key in ("state", "fingerprint", "plan", "verified")),
                ]
            )
        return store, json.dumps(parts, default=str, sort_keys=True)

    def _build(self, store: Store, signature: str) -> None:
        self.generation += 1
        key = (self.location, self.generation)
        root_record = store.record
        image: ShownPyramid | None = None
        if store.has_image:
            levels = [store.image(index) for index in range(store.n_levels)]
            tracker = tracker_of(
                store.files,
                "_image",
                IMAGE_STAGES,
                [level.grid for level in levels],
                self._clock,
                record=root_record,
            )
            image = ShownPyramid(
                levels, channels=store.channels, tracker=tracker, cache=self._cache, key=(key, "")
            )
        labels = []
        for name in store.labels:
            label = store.label(name)
            record = label.read_record()
            levels = [label.level(index) for index in range(label.n_levels)]
            tracker = tracker_of(
                store.files,
                name,
                LABEL_STAGES,
                [level.grid for level in levels],
                self._clock,
                record=record,
            )
            pyramid = ShownPyramid(
                levels, channels=None, tracker=tracker, cache=self._cache, key=(key, name)
            )
            labels.append(ShownLabel(label, pyramid, record))
        self.store, self.image, self.labels = store, image, labels
        self._signature = signature

    def look(self) -> None:
        """See what a running job has done since; at most every 0.4 s."""
        with self._lock:
            if time.monotonic() - self._looked < _LOOK_EVERY_S:
                return
            try:
                store, signature = self._read_signature()
                if signature != self._signature:
                    self._build(store, signature)
                for pyramid in self._pyramids():
                    if pyramid.tracker is not None:
                        pyramid.tracker.refresh()
            except TilepipeError:
                # A label that is just being created or replaced: it is looked at again.
                pass
            finally:
                self._looked = time.monotonic()

    def _pyramids(self) -> list[ShownPyramid]:
        image = [] if self.image is None else [self.image]
        return [*image, *(label.pyramid for label in self.labels)]

    def label(self, index: int) -> ShownLabel:
        """Return a label by its place; IndexError if there is none."""
        if not 0 <= index < len(self.labels):
            raise IndexError(f"label {index} of {len(self.labels)}")
        return self.labels[index]

    @property
    def _seq(self) -> int:
        return max((p.tracker.last_seq for p in self._pyramids() if p.tracker), default=0)

    def describe(self) -> dict[str, Any]:
        """Return everything the page needs to set itself up, as JSON."""
        store = self.store
        return {
            "generation": self.generation,
            "seq": self._seq,
            "name": self.location.rstrip("/").rsplit("/", 1)[-1],
            "extent": list(store.extent),
            "mpp": None if store.mpp is None else list(store.mpp),
            "rgb": store.rgb,
            "dtype": str(store.dtype),
            "ome_zarr": store.version,
            "tile_px": TILE_PX,
            "levels": _levels(self.image) or _blank_levels(store.extent),
            "has_image": self.image is not None,
            "channels": [] if store.rgb or self.image is None else self._channels(self.image),
            "labels": [
                {
                    "name": label.name,
                    "instances": label.instances,
                    "unit_px": label.pyramid.levels[0].unit_px,
                    "levels": _levels(label.pyramid),
                    "classes": _classes(label),
                    "record": label.record,
                }
                for label in self.labels
            ],
        }

    def _channels(self, image: ShownPyramid) -> list[dict[str, Any]]:
        overview = _overview(image)
        colors = self._colors(overview.shape[0])
        limit = float(np.iinfo(image.dtype).max) if image.dtype.kind in "iu" else 1.0
        channels = []
        for index, plane in enumerate(overview):
            values = plane[np.isfinite(plane) & (plane != 0)]
            low, high = (
                (float(part) for part in np.percentile(values, [0.5, 99.7]))
                if values.size
                else (0.0, limit)
            )
            names = self.store.channel_names
            channels.append(
                {
                    "name": names[index] if index < len(names) else f"channel {index}",
                    "color": colors[index],
                    "window": [low, high if high > low else low + 1],
                    "range": [0.0, max(high * 1.5, float(values.max()) if values.size else limit)],
                }
            )
        return channels

    def _colors(self, count: int) -> list[str]:
        if count == 1:
            return ["ffffff"]
        attributes = read_attributes(self.store.files, "", self.store.version) or {}
        omero = ome_of(attributes, self.store.version).get("omero")
        listed = omero.get("channels") if isinstance(omero, dict) else None
        colors = [_COLORS[index % len(_COLORS)] for index in range(count)]
        given = [str(one.get("color")) for one in listed or [] if isinstance(one, dict)]
        # Stores that give every channel the same colour have not chosen any.
        if len(set(given)) > 1 or count == 1:
            for index, color in enumerate(given[:count]):
                if len(color) == 6 and all(c in "0123456789abcdefABCDEF" for c in color):
                    colors[index] = color.lower()
        return colors

    def windows(self) -> tuple[render.Window, ...]:
        """Return the windows used when the page names none."""
        if self.store.rgb or self.image is None:
            return ()
        channels = self._channels(self.image)[: render.MAX_CHANNELS]
        return tuple(
            render.Window(index, one["window"][0], one["window"][1], render.rgb_of(one["color"]))
            for index, one in enumerate(channels)
        )

    def pixel(self, y: int, x: int) -> dict[str, Any]:
        """Return the image values and class ids at a level-0 pixel; IndexError outside."""
        height, width = self.store.extent
        if not (0 <= y < height and 0 <= x < width):
            raise IndexError(f"pixel ({y}, {x}) of {height} x {width}")
        values: list[Any] = []
        if self.image is not None:
            values = self.image.read(0, Box(y, x, y + 1, x + 1))[:, 0, 0].tolist()
        labels = []
        for label in self.labels:
            factor = label.pyramid.levels[0].downsample
            rows, columns = label.pyramid.levels[0].shape
            ly, lx = min(y // factor, rows - 1), min(x // factor, columns - 1)
            value = int(label.pyramid.read(0, Box(ly, lx, ly + 1, lx + 1))[0, 0])
            labels.append({"name": label.name, "value": value, "class": label.class_name(value)})
        return {"y": y, "x": x, "image": values, "labels": labels}

    def progress(self, since: int) -> dict[str, Any]:
        """Return what changed after sequence number ``since``, and how far each label is."""
        self.look()
        pyramids = {
            "image": self.image,
            **{str(i): one.pyramid for i, one in enumerate(self.labels)},
        }
        changed: list[list[Any]] = []
        for name, pyramid in pyramids.items():
            if pyramid is None or pyramid.tracker is None:
                continue
            for seq, level, iy, ix in pyramid.tracker.changes_since(since):
                box = pyramid.levels[level].grid.unit(iy, ix).box
                changed.append([seq, name, level, box.y0, box.x0, box.y1, box.x1])
        changed.sort()
        return {
            "generation": self.generation,
            "seq": max([since, *(one[0] for one in changed)]),
            "changed": changed,
            "labels": [_label_progress(label) for label in self.labels],
            "complete": all(p.tracker is None or p.tracker.complete for p in self._pyramids()),
        }


def _label_progress(label: ShownLabel) -> dict[str, Any]:
    tracker = label.pyramid.tracker
    grid = label.pyramid.levels[0].grid
    failed = _failed_units(label.record)
    done = None if tracker is None else tracker.done_units(0)
    return {
        "units": len(grid),
        "shape": list(grid.shape),
        "done": len(grid) if done is None else len(done),
        "done_units": done,
        "failed": failed,
        "state": str(label.record.get("state", "")),
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


def _levels(pyramid: ShownPyramid | None) -> list[dict[str, Any]]:
    if pyramid is None:
        return []
    return [
        {"shape": list(level.shape), "downsample": level.downsample} for level in pyramid.levels
    ]


def _blank_levels(extent: Shape) -> list[dict[str, Any]]:
    """Levels to move about in where the image itself is elsewhere."""
    return [
        {"shape": list(shape), "downsample": 1 << index}
        for index, shape in enumerate(level_extents(extent))
    ]


def _classes(label: ShownLabel) -> list[dict[str, Any]]:
    if label.instances:
        return []
    counts = np.bincount(_overview(label.pyramid).reshape(-1), minlength=256)
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


def _overview(pyramid: ShownPyramid) -> Any:
    """Pixels of the finest level of at most _OVERVIEW_PX a side, else of the coarsest one."""
    index = len(pyramid.levels) - 1
    for number, level in enumerate(pyramid.levels):
        if max(level.shape) <= _OVERVIEW_PX:
            index = number
            break
    height, width = pyramid.levels[index].shape
    # A foreign store may have one huge level only: look at its middle then.
    y0, x0 = max(0, (height - _OVERVIEW_PX) // 2), max(0, (width - _OVERVIEW_PX) // 2)
    box = Box(y0, x0, min(height, y0 + _OVERVIEW_PX), min(width, x0 + _OVERVIEW_PX))
    return pyramid.read(index, box)


def open_sources(locations: list[str], *, cache_bytes: int) -> list[Source]:
    """Open the stores to show; StoreError names the one that cannot be opened."""
    if not locations:
        raise StoreError("no store to look at; name one, for example: tilepipe view slide.zarr")
    cache = ByteLRU(cache_bytes)
    return [Source(location, cache) for location in locations]
