"""``open_store``: open what tilepipe or another program wrote."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from tilepipe.errors import SPATIALDATA, StoreError, no_image_said
from tilepipe.spec import at_home
from tilepipe.store.attributes import (
    StoreFacts,
    find_version,
    ome_of,
    read_attributes,
    read_store_facts,
)
from tilepipe.store.files import Files, LocalFiles, open_files
from tilepipe.store.layout import OWN, Version
from tilepipe.store.level import Level
from tilepipe.store.pyramid import Pyramid, read_channels, read_pyramid
from tilepipe.store.store import ImageFacts, Store

DEFAULT_CHUNK_PX = 512


def open_store(location: str, *, writable: bool = False) -> Store:
    """Open an OME-Zarr 0.4 or 0.5 at a local path or ``s3://bucket/key``.

    Another program's store opens for reading its image; labels can be added to it.

    Raises StoreError if there is no OME-Zarr, if its creation was interrupted, or if it is to be
    written and may not be, or must not be.
    """
    files = open_files(str(location))
    version = find_version(files)
    if version is None:
        raise StoreError(f"{location}: {_what_is_there(files)}, not an OME-Zarr store")
    if writable and isinstance(files, LocalFiles) and not os.access(files.root, os.W_OK):
        raise StoreError(f"{location}: no permission to write there; change it or copy the store")
    attributes = read_attributes(files, "", version) or {}
    if writable and SPATIALDATA in attributes:
        raise StoreError(
            f"{location}: is an image of a SpatialData store, which the spatialdata package no "
            "longer opens once there is a label in one of its images; name another output (-o)"
        )
    ome = ome_of(attributes, version)
    if "image-label" in ome and OWN in attributes:
        # What a label remembers of its layout would be read as a store's.
        raise StoreError(
            f"{location}: is a label, not a store; give the store that it lies in: "
            f"{_two_up(files.location)}"
        )
    facts = read_store_facts(files, attributes)
    if facts is not None and facts.state == "creating":
        raise StoreError(
            f"{location}: its creation was interrupted and it holds nothing yet; run the same "
            "command again, it begins anew"
        )
    pyramid = read_pyramid(files.location, ome)
    if facts is not None:
        return Store(files, _own_facts(files, version, facts, pyramid), writable=writable)
    if pyramid is None:
        raise StoreError(f"{location}: {no_image_said(str(location), ome)}")
    return Store(files, _foreign_facts(files, version, ome, pyramid), writable=writable)


def _two_up(location: str) -> str:
    """Return the store of a label at ``store/labels/name``."""
    whole = location if "://" in location else str(Path(at_home(location)).absolute())
    return whole.rstrip("/").rsplit("/", 2)[0]


def _what_is_there(files: Files) -> str:
    if isinstance(files, LocalFiles) and files.root.is_dir():
        return "a folder"
    if next(files.entries(""), None) is not None:
        return "other objects"
    return "a file" if files.is_file() else "nothing there"


def _own_facts(
    files: Files, version: Version, facts: StoreFacts, pyramid: Pyramid | None
) -> ImageFacts:
    if facts.with_image and (pyramid is None or len(pyramid.paths) != facts.n_levels):
        raise StoreError(
            f"{files.location}: its OME metadata and its tilepipe record disagree; it was changed "
            "by something else, --overwrite begins anew"
        )
    return ImageFacts(
        version=version,
        extent=facts.extent,
        channels=facts.channels,
        dtype=np.dtype(facts.dtype),
        rgb=facts.rgb,
        mpp=facts.mpp,
        channel_names=facts.channel_names,
        pyramid=pyramid,
        n_levels=facts.n_levels,
        unit_px=facts.unit_px,
        chunk_px=facts.chunk_px,
        own=True,
    )


def _foreign_facts(
    files: Files, version: Version, ome: dict[str, Any], pyramid: Pyramid
) -> ImageFacts:
    finest = Level(
        files,
        pyramid.paths[0],
        index=0,
        downsample=1,
        axes=pyramid.axes,
        is_label=False,
        unit_px=None,
        writable=False,
    )
    names, rgb = read_channels(ome, finest.channels, finest.dtype)
    return ImageFacts(
        version=version,
        extent=finest.shape,
        channels=finest.channels,
        dtype=finest.dtype,
        rgb=rgb,
        mpp=pyramid.mpp,
        channel_names=names,
        pyramid=pyramid,
        n_levels=len(pyramid.paths),
        unit_px=None,
        chunk_px=DEFAULT_CHUNK_PX,
        own=False,
    )
