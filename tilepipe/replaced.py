"""Whether an array on a local disk is still the one that was opened.

What is not stored of an array reads as its fill value. So of one that is taken away while it is
read the rest would be background, and of one made anew in its place the rest is another job's.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

ARRAY_METADATA = ("zarr.json", ".zarray")
"""What makes a folder an array; whoever takes an array away removes it first."""
Mark = tuple[int, int] | None


SETTLED_S = 5.0
"""A time may still change so much after a file was written: file servers set their own when it is
closed, some systems keep whole or even seconds of what they told until then."""


def is_another(now: Mark, then: Mark) -> bool:
    """Tell whether two marks are of two arrays, or the array of ``then`` is gone."""
    if now is None or then is None:
        return now != then
    return now[1] != then[1] or abs(now[0] - then[0]) > SETTLED_S * 1e9


def mark_of(array: Path) -> Mark:
    """Return when the metadata of an array were written, and how long they are; None: not there.

    Metadata are written once, as the array is made. Not their inode: some network file systems
    number their files anew.
    """
    for name in ARRAY_METADATA:
        with suppress(OSError):
            facts = os.stat(array / name)  # noqa: PTH116 - once a read
            return facts.st_mtime_ns, facts.st_size
    return None
