"""``RecentUnits``: the pixels of units just written, for the stages that read them next."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

from numpy.typing import NDArray

Place = tuple[str, int, int]
"""(array key, unit row, unit column)"""


class RecentUnits:
    """Units of a store's arrays, at most ``limit_bytes`` of them; the longest unused goes first.

    A unit is read again soon after it was written, by the unit above it and by its neighbours'
    tiles: from here it costs neither a read nor a decode. One process's memory alone: what
    another process writes is never held, so nothing here can be out of date.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0
        self._lock = threading.Lock()
        self._units: OrderedDict[Place, NDArray[Any]] = OrderedDict()

    def put(self, place: Place, pixels: NDArray[Any]) -> None:
        """Hold ``pixels``, which nobody may change any more, in place of what was there."""
        with self._lock:
            self._drop(place)
            if pixels.nbytes > self.limit_bytes:
                return
            held = pixels.view()
            held.flags.writeable = False
            self._units[place] = held
            self.held_bytes += held.nbytes
            self._shrink()

    def resize(self, limit_bytes: int) -> None:
        """Hold at most so much from now on."""
        with self._lock:
            self.limit_bytes = limit_bytes
            self._shrink()

    def get(self, place: Place) -> NDArray[Any] | None:
        """Return the pixels of a unit, read-only; None if they are not held."""
        with self._lock:
            held = self._units.get(place)
            if held is not None:
                self._units.move_to_end(place)
            return held

    def drop(self, place: Place) -> None:
        """Forget a unit: a write of it began, and may fail half-way."""
        with self._lock:
            self._drop(place)

    def _shrink(self) -> None:
        while self.held_bytes > self.limit_bytes:
            self._drop(next(iter(self._units)))

    def _drop(self, place: Place) -> None:
        held = self._units.pop(place, None)
        if held is not None:
            self.held_bytes -= held.nbytes
