"""What a benchmark ran on: the facts without which its numbers mean nothing."""

from __future__ import annotations

import os
import platform
import time
from typing import Any

import torch

from tilepipe.infer.backends import cpu_has_bf16
from tilepipe.infer.caches import device_name, version_of
from tilepipe.infer.memory import free_bytes

PACKAGES = ("tilepipe", "torch", "openvino", "zarr", "numcodecs", "tifffile", "imagecodecs", "dask")


def machine_facts(device: str) -> dict[str, Any]:
    """Return device, processor, memory, versions and date as plain values."""
    facts: dict[str, Any] = {
        "device": device,
        "device_name": device_name(device),
        "cpu": device_name("cpu"),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
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
