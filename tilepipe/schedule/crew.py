"""``Crew``: the scheduler and the workers now known, and when they are held to be lost."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from tilepipe.errors import ScheduleError

if TYPE_CHECKING:
    from tilepipe.schedule.cluster import Connection

SILENCE_S = 120.0
"""A scheduler that cannot be reached for this long is lost."""
NO_WORKER_S = 600.0
"""A cluster without any worker for this long is given up; a batch system may start some late."""
_LOOK_EVERY_S = 2.0


class Crew:
    """Who works for a stream."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._client = connection.client
        self.workers: dict[str, int] = {}
        """Addresses → threads, as last seen; not emptied while a cluster is without any."""
        self._looked_s = 0.0
        self._seen_s = time.monotonic()
        self._silent_since: float | None = None

    @property
    def threads(self) -> int:
        """Units that may run at the same time."""
        return sum(self.workers.values())

    @property
    def device_lanes(self) -> int:
        """Units that may be on their way to, on, or from the devices: half of a worker's threads.

        A unit is read before and written after its time on the device. With two of them a worker
        a fast device would wait for that; the other threads read on and build pyramids.
        """
        return max(2, sum(max(2, (threads + 1) // 2) for threads in self.workers.values()))

    def reachable(self) -> bool:
        """Tell whether the scheduler can be talked to; ScheduleError once it is held to be lost."""
        status = self._client.status
        if status == "running":
            self._silent_since = None
            return True
        now_s = time.monotonic()
        self._silent_since = self._silent_since or now_s
        if status in ("closed", "closing") or now_s - self._silent_since > SILENCE_S:
            raise ScheduleError(
                "the Dask scheduler is gone; what was done is recorded: start a scheduler and "
                "give the same command again to go on"
            )
        return False

    def look(self) -> bool:
        """See who is there, at most every two seconds; tells whether somebody was just seen.

        Raises ScheduleError if nobody has been for too long.
        """
        now_s = time.monotonic()
        if self.workers and now_s - self._looked_s < _LOOK_EVERY_S:
            return False
        self._looked_s = now_s
        try:
            found = self._connection.workers()
        except Exception:  # asked again in two seconds
            return False
        if found:
            self.workers = found
            self._seen_s = now_s
        elif now_s - self._seen_s > NO_WORKER_S:
            raise ScheduleError(
                f"the cluster has had no worker for {NO_WORKER_S:.0f} s; what was done is "
                "recorded: start workers and give the same command again to go on"
            )
        return bool(found)
