"""``facts``: the figures of a label, as ``inspect``, ``report`` and notebooks give them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tilepipe.export.geojson import class_of
from tilepipe.export.objects import iter_instances, iter_objects
from tilepipe.spec import distinct_names
from tilepipe.steps import Tell, ignore
from tilepipe.store import Label, Store

SIZE_BINS = 32
"""Bin k of a size histogram counts objects of 2**k up to 2**(k+1) - 1 level px."""


def facts(
    store: Store, label: Label | str, *, objects: bool = True, tell: Tell = ignore
) -> dict[str, Any]:
    """Areas, fractions, object sizes, plan and certificate of a label, as plain values.

    With ``objects`` the finest level is read once, a region at a time, and areas are what its
    pixels say; without, they are what the job recorded (None where it did not).
    """
    found = store.label(label) if isinstance(label, str) else label
    level = found.level(0)
    record = found.read_record()
    um2 = um2_per_px(store, found)
    total_px = level.shape[0] * level.shape[1]
    instances = holds_instances(found)
    values = range(2) if instances else range(max(1, len(found.classes)))
    counts = {value: _nothing() for value in values}
    if objects:
        for one in (iter_instances if instances else iter_objects)(level, tell=tell):
            # Every object of an instance mask is of one class, "object".
            value = 1 if instances else one.value
            _count(counts.setdefault(value, _nothing()), one.area_px)
        counts[0]["px"] = total_px - sum(row["px"] for value, row in counts.items() if value)
    else:
        recorded = record.get("class_px")
        by_name = recorded if isinstance(recorded, dict) else {}
        names = distinct_names([class_of(value, found.classes)[0] for value in counts])
        for row, name in zip(counts.values(), names, strict=True):
            row["px"] = by_name.get(name)
    classes = [
        _class_facts(value, counts[value], found, um2=um2, total_px=total_px, objects=objects)
        for value in sorted(counts)
    ]
    return {
        "store": store.location,
        "label": found.name,
        "extent": list(store.extent),
        "mpp": None if store.mpp is None else list(store.mpp),
        "image_level": found.image_level,
        "level_px": list(level.shape),
        "downsample": level.downsample,
        "instances": instances,
        "instances_of": record.get("instances_of"),
        "count": record.get("count"),
        "rule": record.get("rule"),
        "area_mm2": None if um2 is None else total_px * um2 / 1e6,
        "classes": classes,
        "objects": sum(one["objects"] for one in classes) if objects else None,
        "state": record.get("state"),
        "plan": record.get("plan"),
        "model": record.get("model"),
        "settings": record.get("settings"),
        "account": record.get("account"),
        "mpix_per_s": record.get("mpix_per_s"),
        "failed": record.get("failed") or [],
        "certificate": record.get("verified"),
        "versions": record.get("versions"),
        "started": record.get("started"),
        "finished": record.get("finished"),
        "class_px": record.get("class_px"),
    }


def um2_per_px(store: Store, label: Label) -> float | None:
    """Area of a pixel of the label's finest level in µm²; None where the slide's mpp is unknown."""
    if store.mpp is None:
        return None
    downsample = label.level(0).downsample
    return store.mpp[0] * store.mpp[1] * downsample * downsample


def holds_instances(label: Label) -> bool:
    """Whether the pixels of a label are object ids, not class ids."""
    return label.level(0).dtype != np.uint8


def _nothing() -> dict[str, Any]:
    return {"px": 0, "objects": 0, "largest": 0, "sizes": [0] * SIZE_BINS}


def _count(row: dict[str, Any], area_px: int) -> None:
    row["px"] += area_px
    row["objects"] += 1
    row["largest"] = max(row["largest"], area_px)
    row["sizes"][min(int(math.log2(area_px)), SIZE_BINS - 1)] += 1


def _class_facts(
    value: int,
    row: dict[str, Any],
    label: Label,
    *,
    um2: float | None,
    total_px: int,
    objects: bool,
) -> dict[str, Any]:
    instances = holds_instances(label)
    name, color = class_of(value, label.classes if value == 0 or not instances else None)
    px = row["px"]
    known = px is not None
    area = px * um2 if known and um2 is not None else None
    several = objects and row["objects"] > 0
    return {
        "value": value,
        "name": name,
        "color": list(color),
        "px": px,
        "share": px / total_px if known else None,
        "area_um2": area,
        "area_mm2": None if area is None else area / 1e6,
        "objects": row["objects"] if objects else None,
        "mean_object_px": px / row["objects"] if several else None,
        "mean_object_um2": area / row["objects"] if several and area is not None else None,
        "largest_object_px": row["largest"] if objects else None,
        "size_histogram": row["sizes"] if objects else None,
    }
