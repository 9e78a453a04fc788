"""Whether the process that left something in a store is gone, as far as that can be told here."""

from __future__ import annotations

import hashlib
import os
import platform
from contextlib import suppress
from pathlib import Path


def _where() -> str:
    space = ""
    with suppress(OSError):
        space = str(Path("/proc/self/ns/pid").readlink())
    return hashlib.sha256(f"{platform.node()} {space}".encode()).hexdigest()[:8]


WHERE = _where()
"""What this process's number is one of: a machine's, or those of a container on it, which counts
its own although it may be called as its machine."""


def is_gone(where: object, pid: object) -> bool:
    """Tell whether there is no such process; False of one elsewhere, of which nothing is known."""
    if where != WHERE or not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False
