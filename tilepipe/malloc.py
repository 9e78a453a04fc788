"""glibc's malloc: the switches that a job of threads and large blocks needs set."""

from __future__ import annotations

import ctypes
import sys

# malloc.h
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_THRESHOLD = -3
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8

ONE_ARENA = {"MALLOC_ARENA_MAX": "1"}
"""What a child process must find in its environment."""


def one_arena() -> bool:
    """Have all threads of this process share one arena; before a second thread is there.

    Each thread has an arena of its own otherwise. Those beside the first are of pieces of 64 MB
    that come from the kernel and go back to it: torch's layers, computed in threads, took 1.9
    million page faults on an 8192 px slide, 5 to 10 % of its time, and each arena hoards the units
    that passed through it. Returns False where there is no glibc. malloc counts its arenas once:
    called later, it changes nothing.
    """
    return _mallopt((_M_ARENA_MAX, 1))


def keep_memory(*, keep_bytes: int = 1073741824) -> bool:
    """Let malloc keep up to ``keep_bytes`` of freed memory for the next tile.

    glibc gives large blocks back to the kernel at once and gets them again zeroed, page by page:
    a third of a forward's time on a processor. Returns False where there is no glibc. Call it
    early in each worker process; child processes do not inherit it.
    """
    threshold = min(keep_bytes, 2**31 - 1)
    return _mallopt(
        (_M_MMAP_MAX, 0),
        (_M_TRIM_THRESHOLD, threshold),
        (_M_TOP_PAD, 16 << 20),
    )


def give_large_back() -> bool:
    """Have malloc take large blocks from the kernel and give them back at once, its own default.

    By itself it stops doing so after the first such block is freed, and units of several threads
    then tear holes into its heap: two worker processes on an 8192 px slide held 1.96 GB instead
    of 1.63. It also undoes ``keep_memory``, which a job on torch leaves behind in its process.
    Returns False where there is no glibc.
    """
    return _mallopt(
        (_M_MMAP_MAX, 1 << 16),
        (_M_MMAP_THRESHOLD, 4 << 20),
        (_M_TRIM_THRESHOLD, 128 << 10),
        (_M_TOP_PAD, 0),
    )


def suit(backend: str) -> bool:
    """Set malloc for jobs of a back-end: OpenVINO keeps its own memory, torch asks for it anew for
    every layer. Returns False where there is no glibc.
    """
    return keep_memory() if backend == "torch" else give_large_back()


def _mallopt(*settings: tuple[int, int]) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    done = [mallopt(name, value) for name, value in settings]
    return all(done)
