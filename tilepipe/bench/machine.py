"""What a benchmark ran on: the facts without which its numbers mean nothing."""

from __future__ import annotations

import contextlib
import os
import platform
import threading
import time
from pathlib import Path
from typing import Any, Self

import torch

from tilepipe.infer.backends import cpu_has_bf16
from tilepipe.infer.caches import device_name
from tilepipe.infer.memory import free_bytes
from tilepipe.packages import version_of
from tilepipe.threads import cores

PACKAGES = ("tilepipe", "torch", "openvino", "zarr", "numcodecs", "tifffile", "imagecodecs", "dask")


class PeakMemory:
    """Most resident bytes of a process and all its descendants at one time, looked at 10 times a
    second; 0 where there is no /proc.

    A process's own record of its peak begins with that of the process it was forked from.
    """

    def __init__(self, pid: int) -> None:
        self.bytes = 0
        self._pid = pid
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.1):
            self.bytes = max(self.bytes, resident_bytes(self._pid))


def resident_bytes(pid: int) -> int:
    """Return the resident bytes of a process and its descendants now."""
    parents: dict[int, int] = {}
    sizes: dict[int, int] = {}
    page = os.sysconf("SC_PAGE_SIZE")
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = entry.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            number = int(entry.parent.name)
            parents[number], sizes[number] = int(fields[1]), int(fields[21]) * page
    tree = {pid}
    while grown := {child for child, parent in parents.items() if parent in tree} - tree:
        tree |= grown
    return sum(sizes.get(number, 0) for number in tree)


def machine_facts(device: str) -> dict[str, Any]:
    """Return device, processor, memory, versions and date as plain values."""
    facts: dict[str, Any] = {
        "device": device,
        "device_name": device_name(device),
        "cpu": device_name("cpu"),
        "cores": cores(),
        "cpu_bf16": cpu_has_bf16(),
        "free_memory_bytes": free_bytes(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else [],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version_of(name) for name in PACKAGES},
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if device.startswith("cuda"):
        facts["devices"] = torch.cuda.device_count()
        facts["free_device_bytes"] = free_bytes(device)
    return facts
