"""Which input is this: size, time and sampled content, cheap for a slide of any size."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tilepipe.errors import SlideError

_PIECE_BYTES = 64 << 10
_N_PIECES = 64


def fingerprint_file(path: str) -> dict[str, Any]:
    """Size, mtime_ns and sha256 of the head, the tail and up to 64 evenly spaced 64 KiB pieces.

    SlideError if the file can no longer be read.
    """
    try:
        with Path(path).open("rb", buffering=0) as file:
            facts = os.fstat(file.fileno())
            size = facts.st_size
            digest = hashlib.sha256(size.to_bytes(8, "big"))
            for offset in _offsets(size):
                digest.update(os.pread(file.fileno(), _PIECE_BYTES, offset))
    except OSError as error:
        raise SlideError(f"{path}: cannot be read: {error.strerror or error}") from error
    return {"size": size, "mtime_ns": facts.st_mtime_ns, "sha256": digest.hexdigest()}


def fingerprint_folder(folder: Path) -> dict[str, Any]:
    """Size, number and sha256 of the files of a Zarr array: all names, the head of up to 64.

    OSError if one can no longer be read.
    """
    digest = hashlib.sha256()
    size = 0
    files = sorted(
        str(Path(base, name).relative_to(folder))
        for base, _, names in os.walk(folder)
        for name in names
    )
    step = max(1, math.ceil(len(files) / _N_PIECES))
    for name in files:
        size += (folder / name).stat().st_size
    for name in [*files[::step], *(n for n in files if n in ("zarr.json", ".zarray"))]:
        digest.update(name.encode())
        with (folder / name).open("rb") as file:
            digest.update(file.read(_PIECE_BYTES))
    return {"size": size, "n_files": len(files), "sha256": digest.hexdigest()}


def content(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """What of a fingerprint stays when the files are copied or touched."""
    return {
        key: [content(part) if isinstance(part, Mapping) else part for part in value]
        if key == "parts"
        else value
        for key, value in fingerprint.items()
        if key != "mtime_ns"
    }


def _offsets(size: int) -> list[int]:
    """Offsets of the pieces: first at the head, last ending at the tail, without overlap."""
    if size <= _N_PIECES * _PIECE_BYTES:
        return list(range(0, size, _PIECE_BYTES))
    last = size - _PIECE_BYTES
    return [last * piece // (_N_PIECES - 1) for piece in range(_N_PIECES)]
