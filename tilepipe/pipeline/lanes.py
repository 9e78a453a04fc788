"""Lanes beside a network: what they may keep of memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from pathlib import Path

from tilepipe.spec import JobSpec

RECENT_BYTES = 192 << 20
SLACK_BYTES = 64 << 20


def recent_bytes(spec: JobSpec) -> int:
    """Return the bytes of units that each process keeps for the stages that read them next.

    Worker processes on one machine share what one would take.
    """
    return RECENT_BYTES // max(1, spec.workers or 1)


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
