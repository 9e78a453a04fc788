"""Unfinished files: what they are called while they are written, and whether anybody still does."""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tilepipe.store.alive import WHERE, is_gone

PARTIAL = ".partial"
"""How the names of unfinished files end; zarr's own LocalStore does the same."""

_WRITER = re.compile(r"\.([0-9a-f]{8})-(\d{1,10})-[0-9a-f]{12}\.partial$")
_FOREIGN_AGE_S = 3600.0
_in_flight: set[str] = set()
"""Unfinished files of this process."""


@contextmanager
def partial_of(path: Path) -> Iterator[Path]:
    """Give the file a name to be written under, by this process and no other."""
    partial = path.with_name(f"{path.name}.{WHERE}-{os.getpid()}-{uuid.uuid4().hex[:12]}{PARTIAL}")
    _in_flight.add(partial.name)
    try:
        yield partial
    finally:
        _in_flight.discard(partial.name)


def is_abandoned(partial: Path) -> bool:
    """Tell whether the writer of an unfinished file is gone.

    Several processes may write one store (``--part``), so one that starts must not take away what
    another is about to rename. Of another machine's process, and of another program's, which may
    write into its own image, only the file's age can tell.
    """
    found = _WRITER.search(partial.name)
    if found is None or found[1] != WHERE:
        try:
            return time.time() - partial.stat(follow_symlinks=False).st_mtime > _FOREIGN_AGE_S
        except OSError:
            return False
    pid = int(found[2])
    return partial.name not in _in_flight if pid == os.getpid() else is_gone(WHERE, pid)
