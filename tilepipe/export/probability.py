"""``probability_of``: how probable each pixel of a label's objects is, read box by box."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilepipe.store import Label, Probabilities, Store
from tilepipe.tiling import Box

ProbabilityOf = Callable[[Box, NDArray[Any]], NDArray[np.uint8]]
"""Given a box of a mask and its ids (y, x), a byte per pixel: 255 is a probability of 1."""


def probability_of(store: Store, label: Label) -> ProbabilityOf | None:
    """Return what reads the probabilities of a label's objects; None where it has none.

    Of a mask: each pixel's own class. Of objects (``--instances``): any class but the background,
    the sum of the channels, at most 1.
    """
    mask = label.read_record().get("instances_of")
    if isinstance(mask, str):
        beside = store.label(mask).probabilities if mask in store.labels else None
        return None if beside is None else _by_parts(beside, _of_any)
    return None if label.probabilities is None else _by_parts(label.probabilities, _of_own)


_PART_PX = 512
"""Read at once: a hundred channels of a whole region would take its memory a hundred times."""


def _by_parts(
    beside: Probabilities, one: Callable[[NDArray[np.uint8], NDArray[Any]], NDArray[Any]]
) -> ProbabilityOf:
    level = beside.level(0)

    def probability(box: Box, ids: NDArray[Any]) -> NDArray[np.uint8]:
        found = np.zeros(box.shape, np.uint8)
        for part in box.split((_PART_PX, _PART_PX)):
            place = part.shift(-box.y0, -box.x0).slices
            found[place] = one(level.read(part), ids[place])
        return found

    return probability


def _of_any(planes: NDArray[np.uint8], _: NDArray[Any]) -> NDArray[Any]:
    return np.minimum(planes.sum(axis=0, dtype=np.uint16), 255)


def _of_own(planes: NDArray[np.uint8], ids: NDArray[Any]) -> NDArray[Any]:
    found = np.zeros(ids.shape, np.uint8)
    for channel, plane in enumerate(planes):
        np.copyto(found, plane, where=ids == channel + 1)
    return found
