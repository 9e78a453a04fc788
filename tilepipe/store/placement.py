"""How much coarser than the image another program's label or level is, if by a whole number."""

from __future__ import annotations

from tilepipe.store.pyramid import Pyramid
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
    return factor if _covers(extent, shape, factor) else None


def whole_step(extent: Shape, shape: Shape, step: tuple[float, float]) -> int | None:
    """Return the level-0 px of a pyramid of ``extent`` per px of a level of ``shape``, a side.

    None where that is no whole number, or not the same along y and x: a place or an area that is
    told with the nearest one would be wrong. ``step`` is what the scale says (y, x). A pixel of
    the level is left over at the far side: programs write the ratio of the rounded sizes, too.
    """
    if step == (1.0, 1.0) and shape != extent:  # the scale was left out
        step = extent[0] / shape[0], extent[1] / shape[1]
    factor = max(1, round(max(step)))
    off_px = max(abs(s / factor - 1) * side for s, side in zip(step, shape, strict=True))
    return factor if off_px <= 1 and _covers(extent, shape, factor) else None


def _covers(extent: Shape, shape: Shape, factor: int) -> bool:
    """Tell whether ``shape`` is ``extent`` divided by ``factor``, rounded either way."""
    return all(
        max(1, side // factor) <= mine <= -(-side // factor)
        for side, mine in zip(extent, shape, strict=True)
    )


def _by_scale(image: Pyramid | None, label: Pyramid) -> tuple[float, float] | None:
    """Pixels of the label in pixels of the image (y, x); None where their units are not known."""
    if image is None or (image.mpp is None) != (label.mpp is None):
        return None
    mine, theirs = (one.mpp or one.place.scale for one in (label, image))
    return mine[0] / theirs[0], mine[1] / theirs[1]
