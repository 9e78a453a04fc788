"""``Crew``: the scheduler and the workers now known, and when they are held to be lost."""

from __future__ import annotations

import asyncio
import concurrent.futures
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from tilepipe.errors import ScheduleError
from tilepipe.schedule.cluster import paused_error
from tilepipe.schedule.versions import ask_versions, version_here

if TYPE_CHECKING:
    from tilepipe.schedule.cluster import Connection

SILENCE_S = 120.0
"""A scheduler that cannot be reached for this long is lost."""
NO_WORKER_S = 600.0
"""A cluster without any worker for this long is given up; a batch system may start some late."""
PAUSED_S = 120.0
"""The same where it has some, all of them paused by Dask: a task that ends may free memory."""
_LOOK_EVERY_S = 2.0
_ASK_S = 10.0
"""What a worker may take to say which tilepipe it has; then it is asked again."""


class Crew:
    """Who works for a stream."""

    def __init__(
        self, connection: Connection, on_other: Callable[[str], None] = lambda _: None
    ) -> None:
        self._connection = connection
        self._client = connection.client
        self.workers: dict[str, int] = {}
        """Addresses → threads of those that take tasks, as last seen; not emptied while a cluster
        is without any."""
        self.strangers: frozenset[str] = frozenset()
        """Workers of a cluster that get no work: they have another tilepipe, or have not said yet
        which. ``on_other`` is told of each of the former."""
        self._on_other = on_other
        self._same = set(connection.checked)
        self._others: set[str] = set()
        self._asked: concurrent.futures.Future[dict[str, str | None]] | None = None
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
        answered = self._asked is not None and self._asked.done()
        if self.workers and not answered and now_s - self._looked_s < _LOOK_EVERY_S:
            return False
        self._looked_s = now_s
        try:
            found = self._connection.workers()
            paused = 0 if found else self._connection.n_paused()
        except Exception:  # asked again in two seconds
            return False
        if not self._connection.local:
            found = self._of_ours(found)
        if found:
            self.workers = found
            self._seen_s = now_s
        elif paused and now_s - self._seen_s > PAUSED_S:
            raise paused_error(paused)
        elif now_s - self._seen_s > NO_WORKER_S:
            raise ScheduleError(
                f"the cluster has had no worker {'of this tilepipe ' if self.strangers else ''}"
                f"for {NO_WORKER_S:.0f} s; what was done is recorded: start workers and give the "
                "same command again to go on"
            )
        return bool(found)

    def sees_strangers(self) -> bool:
        """Look at once; tells whether a worker is there that may have refused a task."""
        self._looked_s = 0.0
        self.look()
        return bool(self.strangers)

    def _of_ours(self, found: dict[str, int]) -> dict[str, int]:
        """Leave out workers that have another tilepipe, or have not said yet which.

        Those that were there at the start were asked then; who came later is asked here, and
        nothing waits for the answer.
        """
        self._same &= set(found)
        self._others &= set(found)
        if self._asked is not None and self._asked.done():
            self._hear(self._asked, found)
            self._asked = None
        unknown = set(found) - self._same - self._others
        if unknown and self._asked is None:
            asking = asyncio.wait_for(ask_versions(self._client, unknown), _ASK_S)
            loop = self._client.loop.asyncio_loop
            self._asked = asyncio.run_coroutine_threadsafe(asking, loop)
        self.strangers = frozenset(unknown | self._others)
        return {address: found[address] for address in found if address in self._same}

    def _hear(
        self, asked: concurrent.futures.Future[dict[str, str | None]], found: dict[str, int]
    ) -> None:
        try:
            answers = asked.result()
        except Exception:  # asked again
            return
        ours = version_here()
        for address in sorted(set(answers) & set(found)):
            if answers[address] == ours:
                self._same.add(address)
                continue
            self._others.add(address)
            self._on_other(
                f"the worker {address} has tilepipe {answers[address] or 'not at all'}, this "
                f"process {ours or 'of no version'}: it gets no work; install the same there and "
                "start it again"
            )
