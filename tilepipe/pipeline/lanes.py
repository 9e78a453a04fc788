"""Lanes beside a network: how many, and what they may keep of memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from tilepipe.schedule.local import LANES, gpu_numbers
from tilepipe.spec import JobSpec
from tilepipe.threads import cores

if TYPE_CHECKING:
    from tilepipe.infer import Settings

MOST_LANES = 12
RECENT_BYTES = 256 << 20
SLACK_BYTES = 64 << 20


def processes_of(spec: JobSpec) -> int:
    """Return how many worker processes a job starts on this machine, 1 where none of its own."""
    return spec.workers or (len(gpu_numbers(spec.gpus)) if spec.gpus else 1)


def lanes_of(spec: JobSpec, settings: Settings | None) -> int:
    """Return the threads of each worker process that a job starts: the units it holds at once.

    A processor is busy with the network: three lanes take what they need of it. A GPU asks for
    more than three cores can read and write (a core makes some 23 MPix/s): as many as there are,
    up to where they would wait for the interpreter (benchmarks/NOTES.md, "lanes beside a GPU").
    """
    if settings is None or settings.device == "cpu":
        return LANES
    return max(LANES, min(MOST_LANES, cores() // processes_of(spec)))


def recent_bytes(spec: JobSpec, lanes: int = LANES) -> int:
    """Return the bytes of units that each process keeps for the stages that read them next.

    Worker processes on one machine share what one would take; more lanes have more units between
    one stage and the next.
    """
    return RECENT_BYTES * lanes // LANES // max(1, spec.workers or 1)


def waiting_bytes(kept_bytes: int) -> int:
    """Return the bytes of large arrays that a process may keep between two uses (``buffers``).

    ``kept_bytes`` is what it keeps of units (``recent_bytes``): lanes and processes count alike.
    """
    return kept_bytes // 8


def slack_bytes(spec: JobSpec, forward_bytes: int, lanes: int = LANES) -> int:
    """Return the freed memory that a process may hold on to before it is handed back.

    ``forward_bytes`` is what the activations of the batches under way take from malloc and give
    back again and again (as much again goes to the layers' own workspaces): trimmed after every
    unit, a forward takes a tenth longer. Worker processes share that, too.
    """
    return SLACK_BYTES * lanes // LANES + 2 * forward_bytes // max(1, spec.workers or 1)


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
