"""What a slide, a store or a weights file holds, as plain values."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from tilepipe.errors import StoreError, TilepipeError
from tilepipe.pipeline.job import INGEST, LABEL_REDUCE, OBJECT_REDUCE, PAINT, REDUCE, SEGMENT
from tilepipe.slide import open_slide
from tilepipe.store import Label, Store, open_files, open_store, what_is_at


def inspect(path: str, *, slide_mpp: float | None = None) -> dict[str, Any]:
    """Return what ``path`` holds; ``kind`` says which: slide, store or weights.

    Raises SlideError, StoreError or CheckpointError if it is none of them or damaged.
    """
    if path.lower().endswith(".safetensors"):
        return {"kind": "weights", "path": path, **_weights(path)}
    remote = "://" in path
    if remote or Path(path).is_dir():
        files = open_files(path)
        # A slide there is told of as one: where it can be read.
        if what_is_at(files) != "nothing" or (remote and not files.is_file()):
            return {"kind": "store", "path": path, **store_facts(open_store(path))}
    slide = open_slide(path, mpp=slide_mpp)
    try:
        mpp = slide.mpp
        return {
            "kind": "slide",
            "path": path,
            "format": slide.format,
            "extent": list(slide.levels[0].shape),
            "channels": slide.channels,
            "channel_names": list(slide.channel_names),
            "dtype": str(slide.dtype),
            "rgb": slide.rgb,
            "mpp": list(mpp) if mpp is not None else None,
            "mpp_source": slide.mpp_source,
            "levels": [
                {
                    "level": number,
                    "extent": list(level.shape),
                    "downsample": [round(part, 4) for part in level.downsample],
                    "mpp": [m * d for m, d in zip(mpp, level.downsample, strict=True)]
                    if mpp is not None
                    else None,
                    "tile": list(level.tile) if level.tile is not None else None,
                    "compression": level.compression,
                }
                for number, level in enumerate(slide.levels)
            ],
            "notes": list(slide.notes),
        }
    finally:
        slide.close()


def _weights(path: str) -> dict[str, Any]:
    from tilepipe.models import load_model, read_header

    header = dict(read_header(path))
    model = load_model(path)
    locality = model.locality
    return {
        "architecture": model.name,
        "arguments": dict(model.arguments),
        "in_channels": model.in_channels,
        "classes": [entry.model_dump() for entry in model.classes],
        "context_px": locality.context_px,
        "alignment_px": locality.alignment_px,
        "exact": locality.kind == "local",
        "reason": locality.reason,
        "mpp": model.mpp,
        "sha256": model.sha256,
        "bytes": Path(path).stat().st_size,
        "header": json.loads(json.dumps(header, default=str)),
    }


def store_facts(store: Store) -> dict[str, Any]:
    """Return levels, labels, the recorded plan and how much of it is done."""
    record = store.read_record()
    image: dict[str, Any] | None = None
    if store.has_image:
        image = {
            "levels": [_level(store, number) for number in range(store.n_levels)],
            "state": record.get("state", "not recorded"),
            "units": units_of(store, None, record.get("fingerprint")),
            "damaged": record.get("damaged", []),
            "n_damaged": record.get("n_damaged", len(record.get("damaged", []))),
        }
    labels: dict[str, Any] = {}
    for name in store.labels:
        try:
            labels[name] = label_facts(store, store.label(name))
        except TilepipeError as error:
            labels[name] = {"state": "damaged", "reason": str(error)}
    return {
        "ome_zarr": store.version,
        "extent": list(store.extent),
        "channels": store.channels,
        "channel_names": list(store.channel_names),
        "dtype": str(store.dtype),
        "rgb": store.rgb,
        "mpp": list(store.mpp) if store.mpp is not None else None,
        "made_by_tilepipe": store.own,
        "image": image,
        "labels": labels,
        "source": record.get("source"),
        "input": record.get("input"),
        "versions": record.get("versions"),
    }


def _level(store: Store, number: int) -> dict[str, Any]:
    level = store.image(number)
    step: float = level.downsample
    if not level.whole:
        step = round(store.extent[1] / level.shape[1], 4)
    return {"level": number, "extent": list(level.shape), "downsample": step,
            "unit_px": level.unit_px}  # fmt: skip


def label_facts(store: Store, label: Label) -> dict[str, Any]:
    """Return what a label holds and how it was made."""
    record = label.read_record()
    return {
        "classes": [entry.model_dump() for entry in label.classes],
        "image_level": label.image_level,
        "levels": [
            {"level": k, "extent": list(label.level(k).shape), "unit_px": label.level(k).unit_px}
            for k in range(label.n_levels)
        ],
        "state": record.get("state", "not recorded"),
        "units": units_of(store, label.name, record.get("fingerprint")),
        "plan": record.get("plan"),
        "model": record.get("model"),
        "settings": record.get("settings"),
        "class_px": record.get("class_px"),
        "class_mm2": _class_mm2(store, label, record.get("class_px")),
        "mpix_per_s": record.get("mpix_per_s"),
        "started": record.get("started"),
        "finished": record.get("finished"),
        "failed": record.get("failed", []),
        "damaged": record.get("damaged", []),
        "n_damaged": record.get("n_damaged", 0),
        "account": record.get("account"),
        "probabilities": _probability_facts(label),
        "instances_of": record.get("instances_of"),
        "count": record.get("count"),
        "rule": record.get("rule"),
        "verified": record.get("verified"),
        "versions": record.get("versions"),
    }


def _probability_facts(label: Label) -> dict[str, Any] | None:
    """Say what lies in the probabilities beside a label; None where it was made without."""
    found = label.probabilities
    if found is None:
        return None
    return {"channels": [entry.name for entry in found.classes], "levels": found.n_levels}


def _class_mm2(store: Store, label: Label, class_px: Any) -> dict[str, float] | None:
    """Area of each class; None where it or the size of a pixel is not known."""
    if store.mpp is None or not isinstance(class_px, dict):
        return None
    mm2 = store.mpp[0] * store.mpp[1] * label.level(0).downsample ** 2 / 1e6
    return {str(name): px * mm2 for name, px in class_px.items() if isinstance(px, int)}


def units_of(store: Store, label: str | None, mark: Any) -> dict[str, dict[str, int]]:
    """Units recorded of units there are, by stage."""
    if not isinstance(mark, str):
        return {}
    journal = store.journal(label, mark)
    levels = (
        [store.image(k) for k in range(store.n_levels)]
        if label is None
        else [store.label(label).level(k) for k in range(store.label(label).n_levels)]
    )
    first, rest = (INGEST, REDUCE) if label is None else (SEGMENT, LABEL_REDUCE)
    if label is not None and "instances_of" in store.label(label).read_record():
        first, rest = PAINT, OBJECT_REDUCE
    rows: dict[str, dict[str, int]] = {}
    for number, level in enumerate(levels):
        stage = first if number == 0 else rest
        row = rows.setdefault(stage, {"done": 0, "total": 0})
        row["total"] += len(level.grid)
        with suppress(StoreError):  # of another job: nothing of this one is done
            row["done"] += len(journal.recorded(stage, number))
    return rows
