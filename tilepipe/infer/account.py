"""``Account``: where the time of a worker went, step by step."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

STEPS = (
    "read",
    "decode",
    "ingest-write",
    "host-to-device",
    "compute",
    "device-to-host",
    "encode",
    "write",
    "reduce",
)
"""What a lane can be busy with; the rest of its time is ``idle``."""

# Seconds spent in inner spans, per open span of a thread, whichever account they belong to.
_SPANS = threading.local()


class Account:
    """Adds up seconds per step over the threads of one process; thread-safe.

    A span inside another span of the same thread is taken out of the outer one, so that no second
    is counted twice. What is added to an account with a ``parent`` is added there too.
    """

    def __init__(
        self,
        *,
        parent: Account | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._clock = clock
        self._parent = parent
        self._lock = threading.Lock()
        self._seconds: dict[str, float] = {}
        self._device_s = 0.0

    @contextmanager
    def span(self, step: str) -> Iterator[None]:
        """Count the time inside as ``step``."""
        stack: list[float] = _SPANS.__dict__.setdefault("inner_s", [])
        stack.append(0.0)
        started_s = self._clock()
        try:
            yield
        finally:
            whole_s = self._clock() - started_s
            own_s = whole_s - stack.pop()
            if stack:
                stack[-1] += whole_s
            self.add(step, own_s)

    def add(self, step: str, seconds: float) -> None:
        """Add seconds that were measured elsewhere."""
        with self._lock:
            self._seconds[step] = self._seconds.get(step, 0.0) + max(0.0, seconds)
        if self._parent is not None:
            self._parent.add(step, seconds)

    def add_device(self, seconds: float) -> None:
        """Add seconds in which the device computed, by its own clock; they are no lane's."""
        with self._lock:
            self._device_s += max(0.0, seconds)
        if self._parent is not None:
            self._parent.add_device(seconds)

    @property
    def device_s(self) -> float:
        """Seconds in which the device computed so far; 0 where it does not tell."""
        with self._lock:
            return self._device_s

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds per step so far."""
        with self._lock:
            return dict(self._seconds)


def account_json(
    seconds: Mapping[str, float],
    *,
    wall_s: float,
    lanes: int,
    device_s: float = 0.0,
    devices: int = 1,
) -> dict[str, Any]:
    """Return the account of ``lanes`` threads over ``wall_s`` seconds as plain values.

    ``shares`` are per cent of ``wall_s * lanes``; what no step explains is ``idle``, so that they
    add up to 100 unless more was measured than there was time for. ``device_busy`` is the share
    (0-1) of the time in which the ``devices`` computed, None where they do not tell.
    """
    available_s = wall_s * lanes
    busy = {step: seconds[step] for step in (*STEPS, *sorted(set(seconds) - set(STEPS)))
            if seconds.get(step, 0.0) > 0.0}  # fmt: skip
    busy["idle"] = max(0.0, available_s - sum(busy.values()))
    share = 100.0 / available_s if available_s > 0 else 0.0
    return {
        "wall_s": wall_s,
        "lanes": lanes,
        "seconds": {step: round(value, 6) for step, value in busy.items()},
        "shares": {step: round(value * share, 3) for step, value in busy.items()},
        "device_busy": round(device_s / wall_s / devices, 4) if device_s and wall_s > 0 else None,
    }


def merge_seconds(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Add up seconds per step of several units or workers."""
    total: dict[str, float] = {}
    for part in parts:
        for step, value in part.items():
            if step != "idle":
                total[step] = total.get(step, 0.0) + float(value)
    return total
