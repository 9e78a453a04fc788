"""``describe_channels``: colours and contrast of a fluorescence or 16-bit image."""

from __future__ import annotations

from typing import Any

import numpy as np

from tilepipe.store import Shades, Store, channel_colors, shades_of
from tilepipe.view.pyramid import ShownPyramid


def describe_channels(store: Store, image: ShownPyramid) -> list[dict[str, Any]]:
    """Return name, colour, window and range of each channel, as the overview suggests them."""
    overview = image.overview()
    colors = channel_colors(store)
    limit = float(np.iinfo(image.dtype).max) if image.dtype.kind in "iu" else 1.0
    channels = []
    for index, plane in enumerate(overview):
        shades = shades_of(plane) or Shades(0.0, limit, 0.0, limit)
        names = store.channel_names
        channels.append(
            {
                "name": names[index] if index < len(names) else f"channel {index}",
                "color": colors[index],
                "window": list(shades.window),
                # From the darkest on where there is less than none of it, as in centred numbers.
                "range": [min(0.0, shades.least), max(shades.white * 1.5, shades.most)],
            }
        )
    return channels
