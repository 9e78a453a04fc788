"""``copy_store``: the same image and labels in another OME-Zarr version, unit by unit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, Literal

from numpy.typing import NDArray

from tilepipe.errors import ExportError
from tilepipe.steps import Count, Tell, ignore
from tilepipe.store import (
    EXPORTED,
    Label,
    Level,
    LocalFiles,
    Store,
    create_store,
    overlap,
    reduce_image,
    reduce_label,
)
from tilepipe.store.attributes import ome_of, read_attributes
from tilepipe.store.label import Beside
from tilepipe.store.layout import LABEL_DTYPES, check_label_name
from tilepipe.tiling import Box
from tilepipe.tiling.grid import level_extents

Reduce = Callable[[NDArray[Any]], NDArray[Any]]

_OF_ITS_UNITS = ("fingerprint", "asked", "verified", "units", "failed", "n_failed")


def copy_store(
    store: Store,
    location: str,
    *,
    ome_zarr: Literal["0.5", "0.4"] = "0.4",
    labels: Sequence[str] | None = None,
    overwrite: bool = False,
    tell: Tell = ignore,
) -> int:
    """Copy image and labels (None: all) to a new store; returns the number of units written.

    Pixels of every level are the same; so are names, colours, pixel size and what the job recorded
    of itself, but for what holds for its own units alone. The copy is a pyramid of halves: levels
    that another program's store lacks, or has in another size, are made from the finer one.

    Raises StoreError or ExportError; what can be seen beforehand, before anything is written.
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
    for label in found:
        _check_label(label, location, store)
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
        theirs = store.whole_levels()
        mine = [target.image(index) for index in range(target.n_levels)]
        units += _copy_pyramid(theirs, mine, reduce_image, tell, "image")
    for label in found:
        made = target.create_label(
            label.name,
            classes=label.classes,
            level=_level_of(label, target),
            unit_px=label.level(0).unit_px,
            dtype=str(label.level(0).dtype),
            probabilities=label.probabilities is not None,
        )
        units += _copy_pyramid(_levels(label), _levels(made), reduce_label, tell, label.what)
        if label.probabilities is not None and made.probabilities is not None:
            beside = label.probabilities
            _copy_pyramid(
                _levels(beside), _levels(made.probabilities), reduce_image, tell, beside.what
            )
        made.write_record(_of_the_copy(label.read_record(), origin))
    target.write_record(_of_the_copy(store.read_record(), origin))
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


def _check_label(label: Label, location: str, store: Store) -> None:
    check_label_name(location, label.name)
    level = label.level(0)
    if level.dtype.name not in LABEL_DTYPES:
        raise ExportError(
            f"{store.location}: label {label.name} holds {level.dtype}; a copy takes "
            f"{', '.join(LABEL_DTYPES)}: write it anew as one of them, or name others with --label"
        )
    shapes = level_extents(store.extent)
    places = [k for k in range(len(shapes)) if level.downsample == 1 << k]
    if not places or level.shape != shapes[places[0]]:
        raise ExportError(
            f"{store.location}: label {label.name} is {level.shape} px (y, x), {level.downsample} "
            "times coarser than the image, which no level of a pyramid of halves is; only such "
            "labels can be copied"
        )


def _level_of(label: Label, target: Store) -> int:
    """Level of the copy's image over which a label lies."""
    downsample = label.level(0).downsample
    return next(k for k in range(target.n_levels) if target.level_downsample(k) == downsample)


def _levels(pyramid: Beside) -> list[Level]:
    return pyramid.whole_levels()


def _copy_pyramid(
    sources: Sequence[Level], targets: Sequence[Level], reduce: Reduce, tell: Tell, what: str
) -> int:
    """Copy the levels that are of one size and place; make the others from the finer one."""
    told = Count(tell, what, sum(prod(target.shape) for target in targets))
    for index, target in enumerate(targets):
        place = target.shape, target.downsample
        same = next((one for one in sources if (one.shape, one.downsample) == place), None)
        for unit in target.grid:
            if same is not None:
                pixels = same.read(unit.box)
            else:
                finer = targets[index - 1]
                below = unit.box.enlarged(2).intersect(Box.of_shape(finer.shape))
                pixels = reduce(finer.read(below))
            target.write_unit(unit, pixels)
            told.add(unit.box.area)
    return sum(len(target.grid) for target in targets)


def _colors(store: Store) -> list[str | None]:
    attributes: dict[str, Any] = read_attributes(store.files, "", store.version) or {}
    omero = ome_of(attributes, store.version).get("omero")
    channels = omero.get("channels") if isinstance(omero, dict) else None
    return [
        str(one["color"]) if isinstance(one, dict) and one.get("color") else None
        for one in channels or []
    ]
