"""What a worker process of ours loads first: an interruption is for the one that started it.

A terminal tells all of them of Ctrl-C, and that it closes. The one that started them ends them;
they would only add their tracebacks to its one line.
"""

from __future__ import annotations

import signal
from typing import Any


def dask_setup(worker: Any) -> None:
    """Do not hear SIGINT and SIGHUP; Dask calls it in the worker's main thread."""
    del worker
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
