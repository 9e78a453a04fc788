"""``copy_store``: the same image and labels in another OME-Zarr version, unit by unit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from tilepipe.errors import ExportError
from tilepipe.store import EXPORTED, Level, LocalFiles, Store, create_store, overlap
from tilepipe.store.attributes import ome_of, read_attributes

_OF_ITS_UNITS = ("fingerprint", "asked", "verified", "units", "failed", "n_failed")


def copy_store(
    store: Store,
    location: str,
    *,
    ome_zarr: Literal["0.5", "0.4"] = "0.4",
    labels: Sequence[str] | None = None,
    overwrite: bool = False,
) -> int:
    """Copy image and labels (None: all) to a new store; returns the number of units written.

    Pixels of every level are the same; so are names, colours, pixel size and what the job recorded
    of itself, but for what holds for its own units alone. Raises StoreError or ExportError.
    """
    if overlap(location, store.location):
        raise ExportError(
            f"{location}: a store cannot be copied onto itself ({store.location}), into itself or "
            "around itself; name another --output"
        )
    names = store.labels if labels is None else tuple(labels)
    found = [store.label(name) for name in names]
    if not found and not store.has_image:
        raise ExportError(f"{store.location}: holds neither image nor labels; nothing to copy")
    source = store.image(0) if store.has_image else found[0].level(0)
    target = create_store(
        location,
        channels=store.channels,
        dtype=store.dtype,
        extent=store.extent,
        mpp=store.mpp,
        channel_names=store.channel_names,
        channel_colors=_colors(store),
        rgb=store.rgb,
        ome_zarr=ome_zarr,
        unit_px=source.unit_px,
        with_image=store.has_image,
        overwrite=overwrite,
    )
    origin = str(store.files.root) if isinstance(store.files, LocalFiles) else store.location
    # Stopped half-way, what is not copied yet would be read as 0.
    target.write_record({"state": f"{EXPORTED} in part", "exported_from": origin})
    units = 0
    if store.has_image:
        for index in range(min(store.n_levels, target.n_levels)):
            units += _copy(store.image(index), target.image(index))
    for label in found:
        made = target.create_label(
            label.name,
            classes=label.classes,
            level=label.image_level,
            unit_px=label.level(0).unit_px,
            dtype=str(label.level(0).dtype),
            probabilities=label.probabilities is not None,
        )
        for index in range(min(label.n_levels, made.n_levels)):
            units += _copy(label.level(index), made.level(index))
            if label.probabilities is not None and made.probabilities is not None:
                _copy(label.probabilities.level(index), made.probabilities.level(index))
        made.write_record(_of_the_copy(label.read_record(), origin))
    target.write_record(_of_the_copy(store.record, origin))
    return units


def _of_the_copy(record: dict[str, Any], source: str) -> dict[str, Any]:
    """What a job's record says of a copy; {} where there is none.

    Without the fingerprint and certificate of the units: the copy's have no journal, so it can be
    neither gone on with nor verified, and its state says so.
    """
    if not record:
        return {}
    kept = {key: value for key, value in record.items() if key not in _OF_ITS_UNITS}
    state = record.get("state")
    done = state in ("done", EXPORTED)
    return {
        **kept,
        "state": EXPORTED if done else f"{EXPORTED} while {state or 'not recorded'}",
        "exported_from": record.get("exported_from", source),
    }


def _copy(source: Level, target: Level) -> int:
    if source.shape != target.shape:
        raise ExportError(
            f"level {source.index} is {source.shape} px, not {target.shape} as a pyramid of halves "
            "has it; only such pyramids can be copied"
        )
    for unit in target.grid:
        target.write_unit(unit, source.read(unit.box))
    return len(target.grid)


def _colors(store: Store) -> list[str | None]:
    attributes: dict[str, Any] = read_attributes(store.files, "", store.version) or {}
    omero = ome_of(attributes, store.version).get("omero")
    channels = omero.get("channels") if isinstance(omero, dict) else None
    return [
        str(one["color"]) if isinstance(one, dict) and one.get("color") else None
        for one in channels or []
    ]
