"""``empty``: large arrays in memory that others gave back, without the kernel between them.

A unit's pixels are some ten megabytes, and each unit asks for several such arrays. malloc takes
them from the kernel, which clears every page first, and gives them back when they are freed: an
eighth of what the lanes of a job do. Here the memory of an array waits for the next one of about
its size.
"""

from __future__ import annotations

import threading
import weakref
from math import prod
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

LEAST_BYTES = 1 << 20
"""Smaller arrays are malloc's: it keeps their memory by itself."""
WAITING_BYTES = 32 << 20
"""Of memory between two uses, where no job says otherwise."""
_STEP_BYTES = 1 << 20
_MOST_WASTE = 1.5
"""Memory this many times as large as what is asked for waits for something larger."""

Memory = NDArray[np.uint8]


class Buffers:
    """Memory between two uses, at most ``limit_bytes`` of it; thread-safe."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        # Memory comes back wherever its array goes: where that is part of a cycle, wherever the
        # collector happens to run, amid any of these methods too. So the lock lets its own thread
        # in again, and the list is replaced, not changed: what is given then is at worst freed.
        self._lock = threading.RLock()
        self._waiting: list[Memory] = []
        """The longest unused first."""

    def keep(self, limit_bytes: int) -> None:
        """Hold on to at most so much from now on."""
        with self._lock:
            self.limit_bytes = limit_bytes
            self._shrink()

    @property
    def waiting_bytes(self) -> int:
        """Bytes that nobody uses."""
        with self._lock:
            return sum(memory.nbytes for memory in self._waiting)

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Return an array as ``np.empty`` does; its memory comes back with the last view of it."""
        kind = np.dtype(dtype)
        n_bytes = prod(shape) * kind.itemsize
        if n_bytes < LEAST_BYTES:
            return np.empty(shape, kind)
        whole_bytes = -(-n_bytes // _STEP_BYTES) * _STEP_BYTES
        memory = self._take(whole_bytes)
        if memory is None:
            memory = np.empty(whole_bytes, np.uint8)
        # numpy has every view refer to the array at the end of a chain of views. That is this one,
        # for what it stands on is no array: when it goes, so have all views of it.
        lent = np.frombuffer(memory.data, np.uint8, n_bytes)
        weakref.finalize(lent, self._give_back, memory).atexit = False
        return lent.view(kind).reshape(shape)

    def _take(self, n_bytes: int) -> Memory | None:
        with self._lock:
            fitting = [m for m in self._waiting if n_bytes <= m.nbytes <= _MOST_WASTE * n_bytes]
            if not fitting:
                return None
            best = min(fitting, key=lambda memory: memory.nbytes)
            self._waiting = [memory for memory in self._waiting if memory is not best]
            return best

    def _give_back(self, memory: Memory) -> None:
        with self._lock:
            self._waiting = [*self._waiting, memory]
            self._shrink()

    def _shrink(self) -> None:
        kept: list[Memory] = []
        room_bytes = self.limit_bytes
        for memory in reversed(self._waiting):
            room_bytes -= memory.nbytes
            if room_bytes < 0:
                break
            kept.insert(0, memory)
        self._waiting = kept


_buffers = Buffers(WAITING_BYTES)
empty = _buffers.empty
keep = _buffers.keep
