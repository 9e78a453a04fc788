"""Walk the chain of a TIFF's pages once: one that runs in a circle would be followed for ever."""

from __future__ import annotations

import os
from typing import Literal

from tilepipe.errors import SlideError

_NDPI_TAG = 65420


def check_chain(path: str, descriptor: int) -> None:
    """Raise SlideError if the pages form a loop; anything else wrong is found by the reader."""
    head = os.pread(descriptor, 16, 0)
    order: Literal["little", "big"] = "little" if head[:2] == b"II" else "big"
    big = head[2:4] in (b"+\0", b"\0+")
    count_bytes, entry_bytes, offset_bytes = (8, 20, 8) if big else (2, 12, 4)

    size = os.fstat(descriptor).st_size

    def number(at: int, width: int) -> int | None:
        data = os.pread(descriptor, width, at)
        return int.from_bytes(data, order) if len(data) == width else None

    offset = number(8 if big else 4, offset_bytes)
    seen: set[int] = set()
    while offset and offset < size:
        if offset in seen:
            raise SlideError(
                f"{path}: page {len(seen)} points back to an earlier one; the header is damaged"
            )
        count = number(offset, count_bytes)
        if count is None or count > 4096:
            return
        entries = offset + count_bytes
        if not seen and any(
            number(entries + k * entry_bytes, 2) == _NDPI_TAG for k in range(count)
        ):
            return  # Hamamatsu's own 64-bit offsets in a classic TIFF
        seen.add(offset)
        offset = number(entries + count * entry_bytes, offset_bytes)
