"""Where measurements and compiled networks are kept between runs."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from tilepipe.spec import at_home
from tilepipe.threads import cores


def cache_folder() -> Path:
    """Return ``$TILEPIPE_CACHE``, else ``tilepipe`` in the user's cache folder.

    Raises FileNotFoundError for a user without a home folder: an id of a container or a batch
    system that no list of users knows.
    """
    own = os.environ.get("TILEPIPE_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME") or at_home("~/.cache")
    if base.startswith("~"):
        raise FileNotFoundError("this user has no home folder")
    return Path(base) / "tilepipe"


def usable_cache() -> Path | None:
    """Return the cache folder, made where it was missing; None where it cannot be written."""
    with suppress(OSError):
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    return None


def device_name(device: str) -> str:
    """Return what the machine calls the device."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    with suppress(OSError):
        for line in (
            Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        ):
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()} x {cores()}"
    return f"{platform.processor() or platform.machine()} x {cores()}"


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
    _put(f"{name}.json", json.dumps(values).encode())


BLOBS_BYTES = 512 << 20
"""Compiled networks kept in all; the longest unused go first."""


def read_blob(name: str) -> bytes | None:
    """Return the compiled network kept as ``name``, or None where there is none."""
    with suppress(OSError):
        path = cache_folder() / f"{name}.blob"
        kept = path.read_bytes()
        os.utime(path)
        digest, blob = kept[:32], kept[32:]
        if hashlib.sha256(blob).digest() == digest:  # a flipped bit would be another network
            return blob
    return None


def write_blob(name: str, blob: bytes) -> None:
    """Keep a compiled network as ``name`` and make room for it; silently not where it cannot be."""
    if len(blob) > BLOBS_BYTES:
        return
    _put(f"{name}.blob", hashlib.sha256(blob).digest() + blob)
    with suppress(OSError):
        held = sorted(
            ((path.stat(), path) for path in cache_folder().glob("*.blob")),
            key=lambda pair: pair[0].st_mtime_ns,
        )
        excess = sum(found.st_size for found, _ in held) - BLOBS_BYTES
        for found, path in held:
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= found.st_size


def _put(name: str, content: bytes) -> None:
    folder = usable_cache()
    if folder is None:
        return
    part = folder / f".{name}.{os.getpid()}.part"
    with suppress(OSError):
        try:
            part.write_bytes(content)
            part.replace(folder / name)
        finally:  # on a full disk it would keep the last of it
            part.unlink(missing_ok=True)
