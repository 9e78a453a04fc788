"""``describe_channels``: colours and contrast of a fluorescence or 16-bit image."""

from __future__ import annotations

from typing import Any

import numpy as np

from tilepipe.store import Store, channel_colors
from tilepipe.view.pyramid import ShownPyramid


def describe_channels(store: Store, image: ShownPyramid) -> list[dict[str, Any]]:
    """Return name, colour, window and range of each channel, as the overview suggests them."""
    overview = image.overview()
    colors = channel_colors(store)
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
