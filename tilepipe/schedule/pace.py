"""``Pace``: how long a unit of each stage usually takes, and what follows from it."""

from __future__ import annotations

from tilepipe.schedule.cluster import from_environment

TASK_S = 0.05
"""Quick units are put together into tasks of about this length: Dask takes 1-2 ms for each."""
MOST_UNITS = 64
STRAGGLER_S = 60.0
"""A task this old, and 8 times as old as usual, gets a second copy if a worker has nothing to do.
Both write the same bytes; the first to come back counts (``TILEPIPE_STRAGGLER_S``)."""


class Pace:
    """Running means by stage name, over all jobs of a stream."""

    def __init__(self) -> None:
        self._mean_s: dict[str, float] = {}
        self._straggler_s = from_environment("STRAGGLER_S", STRAGGLER_S)

    def learn(self, stage: str, elapsed_s: float) -> None:
        """Take a done unit into the mean."""
        mean_s = self._mean_s.get(stage, elapsed_s)
        self._mean_s[stage] = 0.9 * mean_s + 0.1 * elapsed_s

    def task_units(self, stage: str) -> int:
        """Return how many units of a stage make a task: one, until they are known to be quick."""
        mean_s = self._mean_s.get(stage)
        if mean_s is None:
            return 1
        return max(1, min(MOST_UNITS, int(TASK_S / max(1e-6, mean_s))))

    def patience_s(self, stage: str, n_units: int) -> float:
        """Return the age at which a task of ``n_units`` is a straggler."""
        return max(self._straggler_s, 8 * self._mean_s.get(stage, 0.0) * n_units)
