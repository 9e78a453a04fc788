"""Unfinished files: what they are called while they are written, and whether anybody still does."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"
"""How the names of unfinished files end; zarr's own LocalStore does the same."""

_NODE = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
_WRITER = re.compile(r"\.([0-9a-f]{8})-(\d{1,10})-[0-9a-f]{12}\.partial$")
_FOREIGN_AGE_S = 3600.0
_in_flight: set[str] = set()
"""Unfinished files of this process."""


@contextmanager
def partial_of(path: Path) -> Iterator[Path]:
    """Give the file a name to be written under, by this process and no other."""
    partial = path.with_name(f"{path.name}.{_NODE}-{os.getpid()}-{uuid.uuid4().hex[:12]}{PARTIAL}")
    _in_flight.add(partial.name)
    try:
        yield partial
    finally:
        _in_flight.discard(partial.name)


def is_abandoned(partial: Path) -> bool:
    """Tell whether the writer of an unfinished file is gone.

    Several processes may write one store (``--part``), so one that starts must not take away what
    another is about to rename. Of another machine's process only the file's age can tell.
    """
    found = _WRITER.search(partial.name)
    if found is None or found[1] != _NODE:
        try:
            age_s = time.time() - partial.stat(follow_symlinks=False).st_mtime
        except OSError:
            return False
        return found is None or age_s > _FOREIGN_AGE_S
    pid = int(found[2])
    if pid == os.getpid():
        return partial.name not in _in_flight
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False
