"""``Pace``: how long a unit of each kind usually takes, and what follows from it."""

from __future__ import annotations

from collections import deque
from statistics import median_low

from tilepipe.schedule.cluster import from_environment

TASK_S = 0.05
"""Quick units are put together into tasks of about this length: Dask takes 1-2 ms for each."""
MOST_UNITS = 64
REMEMBERED = 15
STRAGGLER_S = 60.0
"""A task this old, and 8 times as old as usual, gets a second copy if a worker has nothing to do.
Both write the same bytes; the first to come back counts (``TILEPIPE_STRAGGLER_S``)."""


class Pace:
    """How long units of a kind usually take, by its name, over all jobs of a stream.

    The median of the last ones: the first unit on a worker also loads slide and network, and a mean
    that remembers its seconds would make a hanging worker look merely slow.
    """

    def __init__(self) -> None:
        self._last_s: dict[str, deque[float]] = {}
        self._straggler_s = from_environment("STRAGGLER_S", STRAGGLER_S)

    def learn(self, kind: str, elapsed_s: float) -> None:
        """Take note of a done unit."""
        self._last_s.setdefault(kind, deque(maxlen=REMEMBERED)).append(elapsed_s)

    def _usual_s(self, kind: str) -> float | None:
        last_s = self._last_s.get(kind)
        return median_low(last_s) if last_s else None

    def task_units(self, kind: str) -> int:
        """Return how many units of a kind make a task: one, until they are known to be quick."""
        usual_s = self._usual_s(kind)
        if usual_s is None:
            return 1
        return max(1, min(MOST_UNITS, int(TASK_S / max(1e-6, usual_s))))

    def patience_s(self, kind: str, n_units: int) -> float:
        """Return the age at which a task of ``n_units`` is a straggler."""
        return max(self._straggler_s, 8 * (self._usual_s(kind) or 0.0) * n_units)
