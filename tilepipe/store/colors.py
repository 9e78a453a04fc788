"""``channel_colors``: the colours in which the channels of an image are drawn."""

from __future__ import annotations

from tilepipe.store.attributes import ome_of, read_attributes
from tilepipe.store.store import Store

_COLORS = ("4d7cff", "3ddc84", "ff4d5e", "ffd23f", "d05cff", "35d6e6", "ff8a3d", "ffffff")


def channel_colors(store: Store) -> tuple[str, ...]:
    """Return ``rrggbb`` for each channel: as its OME metadata says, else one apart from the others.

    A channel that is alone is drawn in white.
    """
    if store.channels == 1:
        return ("ffffff",)
    attributes = read_attributes(store.files, "", store.version) or {}
    omero = ome_of(attributes, store.version).get("omero")
    listed = omero.get("channels") if isinstance(omero, dict) else None
    colors = [_COLORS[index % len(_COLORS)] for index in range(store.channels)]
    entries = listed if isinstance(listed, list) else []
    given = [str(one.get("color")).lstrip("#") for one in entries if isinstance(one, dict)]
    # Stores that give every channel the same colour have not chosen any.
    if len(set(given)) > 1:
        for index, color in enumerate(given[: store.channels]):
            if len(color) == 6 and all(c in "0123456789abcdefABCDEF" for c in color):
                colors[index] = color.lower()
    return tuple(colors)
