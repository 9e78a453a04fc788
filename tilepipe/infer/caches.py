"""Where measurements and compiled networks are kept between runs."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def cache_folder() -> Path:
    """Return ``$TILEPIPE_CACHE``, else ``tilepipe`` in the user's cache folder."""
    own = os.environ.get("TILEPIPE_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "tilepipe"


def usable_cache() -> Path | None:
    """Return the cache folder, made where it was missing; None where it cannot be written."""
    folder = cache_folder()
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    return None


def version_of(package: str) -> str:
    """Return an installed package's version, or "absent"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def device_name(device: str) -> str:
    """Return what the machine calls the device."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    with suppress(OSError):
        for line in (
            Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        ):
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()} x {os.cpu_count()}"
    return f"{platform.processor() or platform.machine()} x {os.cpu_count()}"


def key_of(*parts: Any) -> str:
    """Return a short name for a combination of plain values."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def read_cached(name: str) -> dict[str, Any] | None:
    """Return the values kept as ``name``, or None where there are none that can be read."""
    with suppress(OSError, ValueError):
        values = json.loads((cache_folder() / f"{name}.json").read_text(encoding="utf-8"))
        if isinstance(values, dict):
            return values
    return None


def write_cached(name: str, values: dict[str, Any]) -> None:
    """Keep plain values as ``name``; silently not where the folder cannot be written."""
    folder = usable_cache()
    if folder is None:
        return
    part = folder / f".{name}.{os.getpid()}.part"
    with suppress(OSError):
        part.write_text(json.dumps(values), encoding="utf-8")
        part.replace(folder / f"{name}.json")
