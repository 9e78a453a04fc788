"""Walk the chain of a TIFF's pages once: it may run in a circle, or leave the file."""

from __future__ import annotations

import os
from typing import Literal

from tilepipe.errors import SlideError

_NDPI_TAG = 65420
_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8,
               13: 4, 16: 8, 17: 8, 18: 8}  # fmt: skip


def check_chain(path: str, descriptor: int) -> str | None:
    """Return a note if pages, or what the first of them says, lie beyond the end of the file.

    Nothing else shows that they are gone: three channels whose list was cut off look like one.

    Raises SlideError if the pages form a loop; anything else wrong is found by the reader.
    """
    head = os.pread(descriptor, 16, 0)
    order: Literal["little", "big"] = "little" if head[:2] == b"II" else "big"
    big = head[2:4] in (b"+\0", b"\0+")
    count_bytes, entry_bytes, offset_bytes = (8, 20, 8) if big else (2, 12, 4)

    size = os.fstat(descriptor).st_size
    beyond = ""

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
        if count is None:
            break
        if count > 4096:
            return None
        entries = offset + count_bytes
        if not seen:
            for at in range(entries, entries + count * entry_bytes, entry_bytes):
                code, kind = number(at, 2), number(at + 2, 2)
                if code == _NDPI_TAG:
                    return None  # Hamamatsu's own 64-bit offsets in a classic TIFF
                length = (number(at + 4, offset_bytes) or 0) * _TYPE_BYTES.get(kind or 0, 0)
                begins = number(at + 4 + offset_bytes, offset_bytes) or 0
                if length > offset_bytes and begins + length > size:
                    beyond = f"tag {code} of page 0"
        seen.add(offset)
        offset = number(entries + count * entry_bytes, offset_bytes)
    if seen and offset:
        beyond = f"page {len(seen)}"
    if not beyond:
        return None
    return (
        f"warning: {beyond} lies beyond the end of the file, which was cut off or has a damaged "
        "header; copy it again if channels, levels or µm/px are missing"
    )
