"""``SegmentCache``: decoded tiles, bounded in bytes, each decoded once however many threads ask."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future

from tilepipe.slide.types import Pixels

ENTRY_BYTES = 600
"""What an array takes beside its pixels: itself, those it is a view of, its key (measured). Of
tiles of 16 px a side that is more than the pixels."""


class SegmentCache:
    """Least-recently-used arrays up to ``limit_bytes``; ``loads`` counts the decodes."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.loads = 0
        self.held_bytes = 0
        self._lock = threading.Lock()
        self._arrays: OrderedDict[Hashable, Pixels] = OrderedDict()
        self._pending: dict[Hashable, Future[Pixels]] = {}

    def get(self, key: Hashable, load: Callable[[], Pixels]) -> Pixels:
        """Return the array of ``key``; the first to ask loads it, others wait for that."""
        with self._lock:
            held = self._arrays.get(key)
            if held is not None:
                self._arrays.move_to_end(key)
                return held
            pending = self._pending.get(key)
            mine = pending is None
            if pending is None:
                pending = self._pending[key] = Future()
                self.loads += 1
        if not mine:
            return pending.result()
        try:
            array = load()
        except BaseException as error:
            with self._lock:
                del self._pending[key]
            pending.set_exception(error)
            raise
        with self._lock:
            del self._pending[key]
            if _bytes_of(array) <= self.limit_bytes:
                self._arrays[key] = array
                self.held_bytes += _bytes_of(array)
            while self.held_bytes > self.limit_bytes:
                _, dropped = self._arrays.popitem(last=False)
                self.held_bytes -= _bytes_of(dropped)
        pending.set_result(array)
        return array

    def clear(self) -> None:
        """Drop every array."""
        with self._lock:
            self._arrays.clear()
            self.held_bytes = 0


def _bytes_of(array: Pixels) -> int:
    return array.nbytes + ENTRY_BYTES
