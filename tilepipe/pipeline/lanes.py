"""Lanes beside a network: what their threads may take of the processor and of memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from pathlib import Path
from typing import Any

from tilepipe.spec import JobSpec

LANE_THREADS = ("Dask-Default-Threads", "Dask-Worker-Threads", "zarr_io", "asyncio_")
"""How the names of the threads begin, or contain, that read, decode, compress and write."""
RECENT_BYTES = 192 << 20
SLACK_BYTES = 64 << 20
_NICE = 10
_gave_way: set[int] = set()


def recent_bytes(spec: JobSpec) -> int:
    """Return the bytes of units that each process keeps for the stages that read them next.

    Worker processes on one machine share what one would take.
    """
    return RECENT_BYTES // max(1, spec.workers or 1)


def give_way(settings: dict[str, Any]) -> None:
    """Let the network's threads go before the lanes', where both share the processor.

    A forward waits for its slowest thread: a lane that takes half of one core from it halves it.
    Threads inherit the priority of the one that makes them, so this comes when the device's
    threads stand, and again for lanes' threads that were made since.
    """
    if settings.get("device") != "cpu":
        return
    for thread in threading.enumerate():
        number = thread.native_id
        if number is None or number in _gave_way:
            continue
        if any(name in thread.name for name in LANE_THREADS):
            _gave_way.add(number)
            with contextlib.suppress(OSError, AttributeError):
                os.setpriority(os.PRIO_PROCESS, number, _NICE)


def slack_bytes(spec: JobSpec, forward_bytes: int) -> int:
    """Return the freed memory that a process may hold on to before it is handed back.

    ``forward_bytes`` is what the activations of the batches under way take from malloc and give
    back again and again (as much again goes to the layers' own workspaces): trimmed after every
    unit, a forward takes a tenth longer. Worker processes share that, too.
    """
    return SLACK_BYTES + 2 * forward_bytes // max(1, spec.workers or 1)


class Memory:
    """Hands freed memory back to the kernel when much of it has gathered.

    malloc keeps what units and tiles freed, which makes the next ones quick, but lanes of several
    threads tear holes into it that never close: it would grow with the number of units.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._floor_bytes = 0

    def give_back(self, slack_bytes: int) -> None:
        """Trim the heap if this process holds so much more than after the last time."""
        with contextlib.suppress(OSError, AttributeError, ValueError), self._lock:
            if self._resident() > self._floor_bytes + slack_bytes:
                ctypes.CDLL(None).malloc_trim(0)
                self._floor_bytes = self._resident()

    @staticmethod
    def _resident() -> int:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
