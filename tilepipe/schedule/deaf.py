"""What a worker process of ours loads first: Ctrl-C is for the process that started it.

A terminal sends it to all of them. The one that started them ends them; they would only add their
tracebacks to its one line.
"""

from __future__ import annotations

import signal
from typing import Any


def dask_setup(worker: Any) -> None:
    """Do not hear SIGINT; Dask calls it in the worker's main thread."""
    del worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
