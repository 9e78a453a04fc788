"""``Source``: one store as the page sees it: description, tiles, pixels, progress, objects."""

from __future__ import annotations

import itertools
import json
import math
import threading
import time
from typing import Any

from tilepipe.errors import StoreError, TilepipeError
from tilepipe.store import Store, open_store
from tilepipe.tiling import Box, Shape
from tilepipe.tiling.grid import level_extents
from tilepipe.view import render
from tilepipe.view.cache import ByteLRU
from tilepipe.view.channels import describe_channels
from tilepipe.view.labels import ShownLabel
from tilepipe.view.pyramid import TILE_PX, ShownPyramid
from tilepipe.view.units import IMAGE_STAGES, LABEL_STAGES, tracker_of

_LOOK_EVERY_S = 0.4


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
        self.left_out: list[str] = []
        """Why labels are not shown."""
        self._build(*self._read_signature())

    def _read_signature(self) -> tuple[Store, str]:
        """Open the store and tell what its description depends on."""
        store = open_store(self.location)
        root = store.read_record()
        parts: list[Any] = [root.get("state"), root.get("started"), store.has_image]
        for name in store.labels:
            record = store.label(name).read_record()
            parts.append(
                [
                    name,
                    *(
                        record.get(key)
                        for key in ("state", "started", "fingerprint", "plan", "verified")
                    ),
                ]
            )
        return store, json.dumps(parts, default=str, sort_keys=True)

    def _build(self, store: Store, signature: str) -> None:
        generation = self.generation + 1
        key = (self.location, generation)
        root_record = store.read_record()
        image: ShownPyramid | None = None
        if store.has_image:
            levels = store.whole_levels()
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
        labels, left_out = [], []
        for name in store.labels:
            label = store.label(name)
            try:
                label.check_placed()
            except StoreError as error:
                left_out.append(str(error))
                continue
            record = label.read_record()
            levels = label.whole_levels()
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
            beside = label.probabilities
            probabilities: ShownPyramid | None = None
            if beside is not None:
                # What is recorded of a unit of the label holds for its probabilities too.
                probabilities = ShownPyramid(
                    [beside.level(index) for index in range(beside.n_levels)],
                    channels=len(beside.classes),
                    tracker=tracker,
                    cache=self._cache,
                    key=(key, name, "probabilities"),
                )
            labels.append(ShownLabel(label, pyramid, record, probabilities))
        self.store, self.image, self.labels = store, image, labels
        self.left_out = left_out
        self._signature = signature
        # Last: who reads it meanwhile, and what was there before, asks again.
        self.generation = generation

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
            "levels": _blank_levels(store.extent) if self.image is None else self.image.describe(),
            "has_image": self.image is not None,
            "channels": self.channels(),
            "labels": [label.describe() for label in self.labels],
        }

    def channels(self) -> list[dict[str, Any]]:
        """Return how the channels of what there is of the image are shown best, as JSON."""
        if self.store.rgb or self.image is None:
            return []
        return describe_channels(self.store, self.image)

    def windows(self) -> tuple[render.Window, ...]:
        """Return the windows used when the page names none."""
        return tuple(
            render.Window(index, one["window"][0], one["window"][1], render.rgb_of(one["color"]))
            for index, one in enumerate(self.channels()[: render.FIRST_CHANNELS])
        )

    def pixel(self, y: int, x: int) -> dict[str, Any]:
        """Return the image values and class ids at a level-0 pixel; IndexError outside."""
        height, width = self.store.extent
        if not (0 <= y < height and 0 <= x < width):
            raise IndexError(f"pixel ({y}, {x}) of {height} x {width}")
        values: list[Any] = []
        if self.image is not None:
            found = self.image.read(0, Box(y, x, y + 1, x + 1))[:, 0, 0].tolist()
            # What is no number has no JSON: the browser would refuse all of the answer.
            values = [one if math.isfinite(one) else None for one in found]
        labels = []
        for label in self.labels:
            value = label.value_at(y, x)
            labels.append(
                {
                    "name": label.name,
                    "value": value,
                    "class": label.class_name(value),
                    "probabilities": label.probabilities_at(y, x),
                }
            )
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
            "labels": [label.progress() for label in self.labels],
            "complete": all(p.tracker is None or p.tracker.complete for p in self._pyramids()),
        }


def _blank_levels(extent: Shape) -> list[dict[str, Any]]:
    """Levels to move about in where the image itself is elsewhere."""
    return [
        {"shape": list(shape), "downsample": 1 << index}
        for index, shape in enumerate(level_extents(extent))
    ]


def open_sources(locations: list[str], *, cache_bytes: int) -> list[Source]:
    """Open the stores to show; StoreError names the one that cannot be opened."""
    if not locations:
        raise StoreError("no store to look at; name one, for example: tilepipe view slide.zarr")
    cache = ByteLRU(cache_bytes)
    return [Source(location, cache) for location in locations]
