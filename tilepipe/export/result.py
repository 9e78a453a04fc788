"""``Result``: a finished mask to hold in a notebook."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilepipe.export.figures import facts, holds_instances, um2_per_px
from tilepipe.export.geojson import iter_features, write_geojson
from tilepipe.export.image import Show, render_view, to_png
from tilepipe.export.probability import probability_of
from tilepipe.export.sink import check_place
from tilepipe.spec import at_home
from tilepipe.store import Label, Level, Store, open_store
from tilepipe.tiling import Box, Shape


class Picture(bytes):
    """PNG bytes that Jupyter shows as a picture."""

    __slots__ = ()

    def __repr__(self) -> str:
        # A notebook keeps this beside the picture: of bytes it is twice and more their size.
        return f"Picture({len(self)} bytes of PNG)"

    def _repr_png_(self) -> bytes:
        return bytes(self)

    def save(self, path: str | Path) -> None:
        """Write the PNG to a file."""
        Path(at_home(str(path))).write_bytes(self)


class LazyMask:
    """One level of a mask, read when it is sliced: ``labels[y0:y1, x0:x1]`` is numpy."""

    ndim = 2

    def __init__(self, level: Level) -> None:
        self._level = level
        self.shape: Shape = level.shape
        self.dtype: np.dtype[Any] = level.dtype

    def __repr__(self) -> str:
        return f"LazyMask(shape={self.shape}, dtype={self.dtype})"

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> Any:
        """Read a part: integers, slices (any step) or ``...``; IndexError as numpy says it."""
        keys = list(key) if isinstance(key, tuple) else [key]
        # By identity: an array among the keys compares element by element.
        at = next((k for k, one in enumerate(keys) if one is Ellipsis), None)
        if at is not None:
            keys[at : at + 1] = [slice(None)] * (3 - len(keys))
        if len(keys) > 2:
            raise IndexError(f"{len(keys)} indices for a mask of 2 axes (y, x)")
        keys += [slice(None)] * (2 - len(keys))
        spans, inner = [], []
        for one, side in zip(keys, self.shape, strict=True):
            start, stop, rest = _span(one, side)
            spans.append((start, stop))
            inner.append(rest)
        (y0, y1), (x0, x1) = spans
        if y1 <= y0 or x1 <= x0:
            return np.zeros((max(0, y1 - y0), max(0, x1 - x0)), dtype=self.dtype)[tuple(inner)]
        return self._level.read(Box(y0, x0, y1, x1))[tuple(inner)]

    # Without these, `labels == 1` is False: one answer, and no error, where one per px is meant.
    def __eq__(self, other: object) -> Any:
        return self[:, :] == other if _is_pixels(other) else NotImplemented

    def __ne__(self, other: object) -> Any:
        return self[:, :] != other if _is_pixels(other) else NotImplemented

    __hash__ = object.__hash__

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        whole: NDArray[Any] = self[:, :]
        return whole if dtype is None else whole.astype(dtype)


def _is_pixels(other: object) -> bool:
    """Tell whether a mask is compared with ``other`` px by px, as an array is."""
    return isinstance(other, int | float | np.generic | np.ndarray | LazyMask)


def _span(key: Any, side: int) -> tuple[int, int, Any]:
    """Px to read along an axis, and how to index what was read."""
    if isinstance(key, slice):
        chosen = range(side)[key]
        if not chosen:
            return 0, 0, slice(None)
        low, high = min(chosen[0], chosen[-1]), max(chosen[0], chosen[-1])
        return low, high + 1, slice(None, None, chosen.step)
    if isinstance(key, bool | np.bool_) or not hasattr(key, "__index__") or np.ndim(key):
        raise IndexError(
            f"{type(key).__name__} as an index of a mask; use integers and slices, or take it "
            "whole first: labels[:, :]"
        )
    at = key.__index__()
    if not -side <= at < side:
        raise IndexError(f"index {at} is out of bounds for an axis of {side} px")
    at %= side
    return at, at + 1, 0


class Result:
    """A mask of a store: class ids as an array, a picture, outlines, figures."""

    def __init__(self, store: str | Path | Store, label: str) -> None:
        self.store: Store = store if isinstance(store, Store) else open_store(str(store))
        self.label: Label = self.store.label(label)
        self.label.check_placed()

    def __repr__(self) -> str:
        y, x = self.labels.shape
        names = ", ".join(one.name for one in self.label.classes)
        return f"Result({self.store.location!r}, {self.label.name!r}: {y} x {x} px; {names})"

    @property
    def labels(self) -> LazyMask:
        """Class ids of the finest level; sliced as ``labels[y, x]``."""
        return LazyMask(self.label.level(0))

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by id."""
        return tuple(one.name for one in self.label.classes)

    def overview(
        self,
        *,
        region: Box | None = None,
        longest_px: int = 1024,
        show: Show = "overlay",
        opacity: float = 0.5,
        outline: bool = False,
    ) -> Picture:
        """Return the slide with the mask over it as PNG; ``region`` in level-0 px."""
        picture = render_view(
            self.store,
            self.label,
            region=region,
            longest_px=longest_px,
            show=show if self.store.has_image else "mask",
            opacity=opacity,
            outline=outline,
        )
        return Picture(to_png(picture))

    def _repr_png_(self) -> bytes:
        return bytes(self.overview())

    def to_geojson(self, path: str | Path | None = None, *, overwrite: bool = False) -> Any:
        """Write the objects to ``path`` and return their number; without one, return the features.

        One feature per connected region of a class, or per object of an instance mask,
        pixel-exact, in level-0 px, as QuPath reads.
        """
        level = self.label.level(0)
        um2 = um2_per_px(self.store, self.label)
        if path is None:
            features = list(
                iter_features(
                    level,
                    self.label.classes,
                    scale=level.downsample,
                    extent=self.store.extent,
                    um2_per_px=um2,
                    instances=holds_instances(self.label),
                    probability=probability_of(self.store, self.label),
                )
            )
            return {"type": "FeatureCollection", "features": features}
        place = Path(at_home(str(path)))
        check_place(self.store, place)
        return write_geojson(
            place,
            level,
            self.label.classes,
            scale=level.downsample,
            extent=self.store.extent,
            um2_per_px=um2,
            instances=holds_instances(self.label),
            probability=probability_of(self.store, self.label),
            overwrite=overwrite,
        )

    def facts(self) -> dict[str, Any]:
        """Areas, object counts and sizes, plan, certificate: see ``tilepipe.export.facts``."""
        return facts(self.store, self.label)
