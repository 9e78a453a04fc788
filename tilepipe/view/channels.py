"""``describe_channels``: colours and contrast of a fluorescence or 16-bit image."""

from __future__ import annotations

from typing import Any

import numpy as np

from tilepipe.store import Store
from tilepipe.store.attributes import ome_of, read_attributes
from tilepipe.view.pyramid import ShownPyramid

_COLORS = ("4d7cff", "3ddc84", "ff4d5e", "ffd23f", "d05cff", "35d6e6", "ff8a3d", "ffffff")


def describe_channels(store: Store, image: ShownPyramid) -> list[dict[str, Any]]:
    """Return name, colour, window and range of each channel, as the overview suggests them."""
    overview = image.overview()
    colors = _colors(store, overview.shape[0])
    limit = float(np.iinfo(image.dtype).max) if image.dtype.kind in "iu" else 1.0
    channels = []
    for index, plane in enumerate(overview):
        values = plane[np.isfinite(plane) & (plane != 0)]
        low, high = (
            (float(part) for part in np.percentile(values, [0.5, 99.7]))
            if values.size
            else (0.0, limit)
        )
        names = store.channel_names
        channels.append(
            {
                "name": names[index] if index < len(names) else f"channel {index}",
                "color": colors[index],
                "window": [low, high if high > low else low + 1],
                "range": [0.0, max(high * 1.5, float(values.max()) if values.size else limit)],
            }
        )
    return channels


def _colors(store: Store, count: int) -> list[str]:
    if count == 1:
        return ["ffffff"]
    attributes = read_attributes(store.files, "", store.version) or {}
    omero = ome_of(attributes, store.version).get("omero")
    listed = omero.get("channels") if isinstance(omero, dict) else None
    colors = [_COLORS[index % len(_COLORS)] for index in range(count)]
    given = [str(one.get("color")) for one in listed or [] if isinstance(one, dict)]
    # Stores that give every channel the same colour have not chosen any.
    if len(set(given)) > 1:
        for index, color in enumerate(given[:count]):
            if len(color) == 6 and all(c in "0123456789abcdefABCDEF" for c in color):
                colors[index] = color.lower()
    return colors
