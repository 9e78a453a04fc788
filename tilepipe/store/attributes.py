"""Attributes of groups: read fresh, checked, and written in one atomic put.

A group's attributes are in ``zarr.json`` (Zarr v3) or ``.zattrs`` (v2). They are written as whole
files here and not through zarr, whose groups remember the attributes of when they were opened: two
processes would undo each other's changes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tilepipe.errors import StoreError
from tilepipe.spec import explain
from tilepipe.store.files import Files
from tilepipe.store.layout import OWN, Version

_LIMIT_BYTES = 64 << 20


class StoreFacts(BaseModel):
    """What the store's root remembers of its own layout."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    format: Literal[1] = 1
    state: Literal["creating", "ready"]
    extent: tuple[int, int] = (1, 1)
    channels: int = Field(default=1, ge=1, le=4096)
    dtype: Literal["uint8", "uint16", "float32"] = "uint8"
    mpp: tuple[float, float] | None = None
    rgb: bool = False
    channel_names: tuple[str, ...] = ()
    unit_px: int = Field(default=512, ge=1, le=1 << 20)
    chunk_px: int = Field(default=512, ge=1, le=1 << 20)
    n_levels: int = Field(default=1, ge=1, le=64)
    with_image: bool = True


class LabelFacts(BaseModel):
    """What a label group remembers of its own layout."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    format: Literal[1] = 1
    state: Literal["creating", "ready"]
    image_level: int = Field(default=0, ge=0, le=63)
    unit_px: int = Field(default=512, ge=1, le=1 << 20)
    probabilities: bool = False
    """Whether the classes' probabilities lie beside it."""


def group_key(group: str, name: str) -> str:
    """Return the key of a group's file; ``group`` is "" for the root."""
    return f"{group}/{name}" if group else name


def find_version(files: Files, group: str = "") -> Version | None:
    """Tell which Zarr format the group at ``group`` has; None if there is no group."""
    if files.get(group_key(group, "zarr.json"), limit_bytes=_LIMIT_BYTES) is not None:
        return "0.5"
    # Creation writes .zattrs first and removal removes it last: alone, it still tells whose it is.
    for name in (".zattrs", ".zgroup"):
        if files.get(group_key(group, name), limit_bytes=_LIMIT_BYTES) is not None:
            return "0.4"
    return None


def read_attributes(files: Files, group: str, version: Version) -> dict[str, Any] | None:
    """Return a group's attributes, None if there is no such group; StoreError if unreadable."""
    key = group_key(group, "zarr.json" if version == "0.5" else ".zattrs")
    raw = files.get(key, limit_bytes=_LIMIT_BYTES)
    if raw is None:
        if version == "0.4" and files.get(group_key(group, ".zgroup")) is not None:
            return {}
        return None
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{files.location}: {key} is not JSON: {error}") from error
    if version == "0.5" and isinstance(value, dict):
        if value.get("zarr_format") != 3 or value.get("node_type") != "group":
            raise StoreError(f"{files.location}: {key} does not describe a Zarr v3 group")
        value = value.get("attributes", {})
    if not isinstance(value, dict):
        raise StoreError(f"{files.location}: the attributes in {key} are not a JSON object")
    return value


def write_attributes(
    files: Files, group: str, version: Version, attributes: dict[str, Any]
) -> None:
    """Write a group's attributes at once; the group is created if it is not there."""
    if version == "0.5":
        document = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
        files.put(group_key(group, "zarr.json"), _json(files, document), durable=True)
        return
    files.put(group_key(group, ".zattrs"), _json(files, attributes), durable=True)
    if files.get(group_key(group, ".zgroup")) is None:
        files.put(group_key(group, ".zgroup"), b'{"zarr_format": 2}', durable=True)


def update_attributes(files: Files, group: str, version: Version, changes: dict[str, Any]) -> None:
    """Replace some top-level keys of a group's attributes; None removes a key."""
    attributes = {**(read_attributes(files, group, version) or {}), **changes}
    kept = {key: value for key, value in attributes.items() if value is not None}
    write_attributes(files, group, version, kept)


def drop_consolidated(files: Files, version: Version) -> None:
    """Remove the root's consolidated metadata, in which a label added later would be invisible."""
    if version == "0.4":
        files.delete(".zmetadata")
        return
    raw = files.get("zarr.json", limit_bytes=_LIMIT_BYTES) or b""
    if b'"consolidated_metadata"' in raw:
        write_attributes(files, "", version, read_attributes(files, "", version) or {})


def _json(files: Files, document: dict[str, Any]) -> bytes:
    try:
        text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
        try:
            return text.encode()
        except UnicodeEncodeError:  # a file's name may hold bytes that are no text
            return json.dumps(document, indent=1, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise StoreError(
            f"{files.location}: attributes cannot be written as JSON: {error}"
        ) from error


def ome_of(attributes: dict[str, Any], version: Version) -> dict[str, Any]:
    """Return the OME part of a group's attributes, {} if there is none."""
    found = attributes.get("ome", {}) if version == "0.5" else attributes
    return found if isinstance(found, dict) else {}


def ome_attributes(parts: dict[str, Any], version: Version) -> dict[str, Any]:
    """Return OME metadata as the attributes to put."""
    return {"ome": {"version": version, **parts}} if version == "0.5" else parts


def read_own(attributes: dict[str, Any]) -> dict[str, Any]:
    """Return tilepipe's part of a group's attributes, {} if there is none."""
    own = attributes.get(OWN, {})
    return own if isinstance(own, dict) else {}


def read_store_facts(files: Files, attributes: dict[str, Any]) -> StoreFacts | None:
    """Return the layout that a root remembers, None if tilepipe did not write it."""
    facts = read_own(attributes).get("store")
    if facts is None:
        return None
    try:
        return StoreFacts.model_validate(facts)
    except ValidationError as error:
        raise StoreError(
            f"{files.location}: its tilepipe record cannot be read ({explain(error)}); it was "
            "damaged or written by a newer tilepipe; --overwrite begins anew"
        ) from error


def read_label_facts(files: Files, name: str, attributes: dict[str, Any]) -> LabelFacts | None:
    """Return the layout that a label group remembers, None if tilepipe did not write it."""
    facts = read_own(attributes).get("store")
    if facts is None:
        return None
    try:
        return LabelFacts.model_validate(facts)
    except ValidationError as error:
        raise StoreError(
            f"{files.location}: the tilepipe record of label {name} cannot be read "
            f"({explain(error)}); choose another --name"
        ) from error


def names_in(value: Any) -> Sequence[str]:
    """Return the strings of a JSON list, without repeats and in order; [] for anything else."""
    if not isinstance(value, list):
        return []
    return list(dict.fromkeys(item for item in value if isinstance(item, str)))
