"""``ByteLRU``: decoded blocks, the least recently used dropped first, each made once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[Any]


class ByteLRU:
    """Arrays up to ``budget_bytes`` in all; safe to call from many threads."""

    def __init__(self, budget_bytes: int) -> None:
        self._budget = budget_bytes
        self._held = 0
        self._arrays: OrderedDict[Hashable, Pixels] = OrderedDict()
        self._lock = threading.Lock()
        self._making: dict[Hashable, threading.Event] = {}

    @property
    def held_bytes(self) -> int:
        """Bytes held now."""
        return self._held

    def get(self, key: Hashable, make: Callable[[], Pixels]) -> Pixels:
        """Return the array of ``key``; one thread makes it, the others wait for that one."""
        while True:
            with self._lock:
                if key in self._arrays:
                    self._arrays.move_to_end(key)
                    return self._arrays[key]
                event = self._making.get(key)
                if event is None:
                    event = self._making[key] = threading.Event()
                    break
            event.wait()
        try:
            array = np.ascontiguousarray(make())
            array.flags.writeable = False
            with self._lock:
                self._arrays[key] = array
                self._held += array.nbytes
                while self._held > self._budget and len(self._arrays) > 1:
                    _, dropped = self._arrays.popitem(last=False)
                    self._held -= dropped.nbytes
        finally:
            with self._lock:
                del self._making[key]
            event.set()
        return array
