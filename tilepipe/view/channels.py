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
        low, high, least, most = (
            (
                *(float(part) for part in np.percentile(values, [0.5, 99.7])),
                float(values.min()),
                float(values.max()),
            )
            if values.size
            else (0.0, limit, 0.0, limit)
        )
        names = store.channel_names
        channels.append(
            {
                "name": names[index] if index < len(names) else f"channel {index}",
                "color": colors[index],
                "window": [low, high if high > low else low + 1],
                # From the darkest on where there is less than none of it, as in centred numbers.
                "range": [min(0.0, least), max(high * 1.5, most)],
            }
        )
    return channels
