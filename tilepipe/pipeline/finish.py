"""``finish``: what is left of the jobs of a store."""

from __future__ import annotations

from typing import Any

from tilepipe.errors import SpecError, StoreError, TilepipeError
from tilepipe.pipeline.events import OnEvent, ignore
from tilepipe.pipeline.output import is_begun
from tilepipe.pipeline.run import Request, RunResult, run_one
from tilepipe.pipeline.stored import what_lacks
from tilepipe.spec import OBJECTS_SUFFIX, JobSpec
from tilepipe.store import Store, open_store


def finish(location: str, *, label: str | None = None, on_event: OnEvent = ignore) -> RunResult:
    """Build what is left of a store: its image, units no part has done, and the pyramids.

    A mask that cannot be finished does not keep the others from it. Raises StoreError if the store
    does not say how it was made, and then the errors of ``run_one``: of several masks together.
    """
    store = open_store(location, writable=True)
    record = store.read_record()
    if label is not None and label not in store.labels:
        raise StoreError(f"{location}: has no label {label!r}; it has {', '.join(store.labels)}")
    wanted = [store.label(name) for name in ([label] if label is not None else store.labels)]
    # The objects of a mask are made by the job of that mask; of other programs' labels none is.
    masks = [
        _mask_of(store, each.name, each.read_record())
        for each in wanted
        if each.own or label is not None
    ]
    source = record.get("source")
    slide = source.get("path") if isinstance(source, dict) else location
    if not isinstance(slide, str):
        raise StoreError(f"{location}: does not say which slide it was made from")
    requests = [_mask(store, name, slide) for name in dict.fromkeys(masks)]
    result: RunResult | None = None
    # The job of a mask makes the image too, unless it took the store itself for its slide.
    in_store = any(request.slide == location for request in requests)
    if not requests or (in_store and what_lacks(store) is not None):
        image = Request(slide, location, _image_spec(location, record))
        result = run_one(image, segment=False, on_event=on_event)
    failures: list[TilepipeError | OSError] = []
    for request in requests:
        try:
            result = run_one(request, on_event=on_event)
        except (TilepipeError, OSError) as error:
            if len(requests) == 1:
                raise
            failures.append(type(error)(f"label {request.spec.name}: {error}"))
    if failures:
        raise type(failures[0])("\n".join(map(str, failures)))
    assert result is not None
    return result


def _mask_of(store: Store, name: str, record: dict[str, Any]) -> str:
    """Return the mask whose job makes a label: itself, or the mask of which it is the objects."""
    named = record.get("instances_of")
    if (
        named is None
        and (mask := name.removesuffix(OBJECTS_SUFFIX)) != name
        and mask in store.labels
    ):
        # Stopped before it could say so itself.
        named = mask if is_begun(store, name) else None
    return str(named or name)


def _mask(store: Store, name: str, slide: str) -> Request:
    record = store.label(name).read_record()
    kept = record.get("spec")
    if not isinstance(kept, dict):
        raise StoreError(f"{store.location}: label {name!r} does not say how it was made")
    spec = _recorded(store.location, {**kept, "name": name, "scheduler": "local", "gpus": None})
    return Request(store.location if record.get("in_store") else slide, store.location, spec)


def _image_spec(location: str, record: dict[str, Any]) -> JobSpec:
    values: dict[str, Any] = {"unit": record.get("unit_px")}
    values |= {key: record[key] for key in ("ome_zarr", "on_damage") if key in record}
    mpp = record.get("mpp")
    if record.get("mpp_source") == "given" and isinstance(mpp, list) and mpp:
        values["slide_mpp"] = mpp[0]
    return _recorded(location, values)


def _recorded(location: str, values: dict[str, Any]) -> JobSpec:
    """Return the settings that a store recorded; StoreError if they are damaged."""
    try:
        return JobSpec.checked(values, source=f"{location}: recorded settings")
    except SpecError as error:
        raise StoreError(f"{error}; make it anew with --overwrite") from error
