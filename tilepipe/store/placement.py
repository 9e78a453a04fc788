"""``factor_over``: how much coarser than the image another program's label is, if it covers it."""

from __future__ import annotations

from tilepipe.store.metadata import Pyramid
from tilepipe.tiling import Shape


def factor_over(extent: Shape, image: Pyramid | None, label: Pyramid, shape: Shape) -> int | None:
    """Return the level-0 px of an image per px of a label of ``shape`` (y, x), a side.

    None where the label does not cover the image, all of it, with pixels of a whole number of the
    image's: it is cut out, finer, or stretched. What the scales say counts, where they can be
    compared and the sizes fit; ``extent`` is the image's.
    """
    if shape == extent:
        return 1
    ratios = _by_scale(image, label) or (extent[0] / shape[0], extent[1] / shape[1])
    factor = round(max(ratios))
    if factor < 1 or round(min(ratios)) != factor:
        return None
    covers = all(
        side // factor <= mine <= -(-side // factor)
        for side, mine in zip(extent, shape, strict=True)
    )
    return factor if covers else None


def _by_scale(image: Pyramid | None, label: Pyramid) -> tuple[float, float] | None:
    """Pixels of the label in pixels of the image (y, x); None where their units are not known."""
    if image is None or (image.mpp is None) != (label.mpp is None):
        return None
    mine, theirs = (one.mpp or one.scale for one in (label, image))
    return mine[0] / theirs[0], mine[1] / theirs[1]
