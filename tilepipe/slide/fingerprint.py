"""Which input is this: size, time and sampled content, cheap for a slide of any size."""

from __future__ import annotations

import hashlib
import os
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


def _offsets(size: int) -> list[int]:
    """Offsets of the pieces: first at the head, last ending at the tail, without overlap."""
    if size <= _N_PIECES * _PIECE_BYTES:
        return list(range(0, size, _PIECE_BYTES))
    last = size - _PIECE_BYTES
    return [last * piece // (_N_PIECES - 1) for piece in range(_N_PIECES)]
