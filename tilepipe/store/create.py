"""``create_store``: make an empty store so that a crash never leaves one that looks finished."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import PurePosixPath
from typing import Any, Literal

import numpy as np

from tilepipe.errors import StoreError
from tilepipe.spec import at_home, resolved
from tilepipe.store.attributes import (
    StoreFacts,
    find_version,
    ome_attributes,
    ome_of,
    read_attributes,
    read_own,
    write_attributes,
)
from tilepipe.store.explain import explained
from tilepipe.store.files import Files, LocalFiles, open_files
from tilepipe.store.layout import (
    IMAGE_DTYPES,
    OWN,
    Version,
    create_array,
    downsampled,
    put_own_folder,
)
from tilepipe.store.metadata import multiscales, omero, place_of
from tilepipe.store.open import open_store
from tilepipe.store.store import Store
from tilepipe.tiling import Shape
from tilepipe.tiling.grid import level_extents


def create_store(
    location: str,
    *,
    channels: int,
    dtype: Any,
    extent: Shape,
    mpp: tuple[float, float] | None = None,
    channel_names: Sequence[str] = (),
    channel_colors: Sequence[str | None] = (),
    rgb: bool = False,
    ome_zarr: Version = "0.5",
    unit_px: int,
    chunk_px: int = 512,
    with_image: bool = True,
    overwrite: bool = False,
) -> Store:
    """Create an empty store for an image of ``extent`` (y, x) px and open it for writing.

    Its root says ``creating`` until everything is there and gets its OME metadata last: what an
    interrupted creation leaves is not an OME-Zarr, and the next call begins anew.
    ``with_image=False``: a store of labels only, whose image stays in its slide.

    Raises StoreError if something else is there. ``overwrite`` removes an OME-Zarr and nothing
    but an OME-Zarr.
    """
    kind = np.dtype(dtype)
    if kind.name not in IMAGE_DTYPES:
        raise StoreError(f"{location}: an image of {kind}; use one of {', '.join(IMAGE_DTYPES)}")
    if min(extent) < 1 or not 1 <= channels <= 4096 or unit_px < 1 or chunk_px < 1:
        raise StoreError(
            f"{location}: an image of {channels} x {extent[0]} x {extent[1]} (c, y, x), units of "
            f"{unit_px} px and chunks of {chunk_px} px cannot be stored"
        )
    files = open_files(str(location))
    extents = level_extents((int(extent[0]), int(extent[1])))
    names = [str(name) for name in channel_names][:channels]
    if rgb and channels == 3 and not names:
        names = ["red", "green", "blue"]
    names += [f"channel {index}" for index in range(len(names), channels)]
    facts = StoreFacts(
        state="creating",
        extent=extents[0],
        channels=channels,
        dtype=kind.name,
        mpp=(float(mpp[0]), float(mpp[1])) if mpp else None,
        rgb=rgb,
        channel_names=tuple(names),
        unit_px=unit_px,
        chunk_px=chunk_px,
        n_levels=len(extents),
        with_image=with_image,
    )
    _make_room(files, overwrite=overwrite)
    _write_root(files, ome_zarr, facts, {})
    put_own_folder(files, ome_zarr)
    parts: dict[str, Any] = {}
    if with_image:
        _create_levels(files, ome_zarr, facts)
        parts = {
            "multiscales": multiscales(
                ome_zarr,
                name=_name_of(files),
                axes=("c", "y", "x"),
                downsamples=[1 << index for index in range(len(extents))],
                place=place_of(facts.mpp),
                method="mean",
            ),
            "omero": omero(names=names, colors=channel_colors, dtype=kind, rgb=rgb),
        }
    _write_root(files, ome_zarr, facts.model_copy(update={"state": "ready"}), parts)
    return open_store(files.location, writable=True)


def _name_of(files: Files) -> str:
    """Return what an image is called: as its store, with ? for bytes that are no text."""
    name = PurePosixPath(files.location).name.removesuffix(".zarr") or "image"
    return name.encode(errors="replace").decode()


def _create_levels(files: Files, version: Version, facts: StoreFacts) -> None:
    with explained(files.location, "create the image"):
        for index, shape in enumerate(downsampled(facts.extent, facts.n_levels)):
            create_array(
                files,
                str(index),
                version=version,
                axes=("c", "y", "x"),
                shape=(facts.channels, *shape),
                dtype=np.dtype(facts.dtype),
                unit_px=facts.unit_px,
                chunk_px=facts.chunk_px,
                is_label=False,
            )


def _write_root(files: Files, version: Version, facts: StoreFacts, parts: dict[str, Any]) -> None:
    own = {OWN: {"store": facts.model_dump(mode="json")}}
    ome = ome_attributes(parts, version) if parts else {}
    write_attributes(files, "", version, {**ome, **own})


Found = Literal["nothing", "unfinished", "ours", "ome-zarr", "other"]


def what_is_at(files: Files) -> Found:
    """Tell what lies at a store's place."""
    if isinstance(files, LocalFiles) and files.root.exists() and not files.root.is_dir():
        return "other"
    version = find_version(files)
    if version is None:
        first = next((e for e in files.entries("") if not e.name.endswith(".partial")), None)
        return "nothing" if first is None else "other"
    try:
        attributes = read_attributes(files, "", version) or {}
    except StoreError:
        return "other"
    own = read_own(attributes).get("store")
    if isinstance(own, dict):
        return "unfinished" if own.get("state") == "creating" else "ours"
    return "ome-zarr" if "multiscales" in ome_of(attributes, version) else "other"


def check_free(files: Files) -> Found:
    """Tell what lies at a store's place; StoreError if it is something that no store replaces.

    Nor does one lie inside another OME-Zarr image (``check_outside``).
    """
    check_outside(files.location)
    found = what_is_at(files)
    if found == "other":
        raise StoreError(
            f"{files.location}: something is there that is not an OME-Zarr store, it is left "
            "alone; choose another output"
        )
    return found


def check_outside(location: str) -> None:
    """Raise StoreError for what lies inside an OME-Zarr image: all in there is that image's."""
    for around in _around(location):
        if _is_image(around):
            raise StoreError(
                f"{location}: lies inside the OME-Zarr {around}, which would be damaged; "
                "choose another output"
            )


def _is_image(location: str) -> bool:
    with suppress(StoreError, OSError):  # a folder that cannot be read is none of ours
        files = open_files(location)
        # First a look for a group alone: a folder of thousands of stores is not listed for it.
        return find_version(files) is not None and what_is_at(files) in ("ours", "ome-zarr")
    return False


def _around(location: str) -> Iterator[str]:
    """Folders that a location lies in, the nearest first; on S3 down to the bucket's first."""
    if location.startswith("s3://"):
        bucket, *parts = location.removeprefix("s3://").rstrip("/").split("/")
        yield from ("/".join(["s3:/", bucket, *parts[:n]]) for n in range(len(parts) - 1, 0, -1))
    else:
        path = resolved(at_home(location.removeprefix("file://")))
        yield from (str(parent) for parent in path.parents)


def _make_room(files: Files, *, overwrite: bool) -> None:
    found = check_free(files)
    location = files.location
    if found == "nothing":
        return
    if found != "unfinished" and not overwrite:
        raise StoreError(
            f"{location}: a store is there already; use --overwrite to replace it or another output"
        )
    version = find_version(files) or "0.5"
    # From here on it is an unfinished store: should the removal be interrupted, the next run
    # goes on with it.
    _write_root(files, version, StoreFacts(state="creating"), {})
    files.delete_tree("", keep=("zarr.json", ".zattrs", ".zgroup"))
    for name in ("zarr.json", ".zgroup", ".zattrs"):
        files.delete(name)
