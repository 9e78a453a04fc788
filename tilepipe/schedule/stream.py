"""``drive``: jobs through a Dask client, a bounded window of tasks at a time.

The scheduler never sees more than the window, so its memory and this process's do not grow with
the number of units. Tasks are idempotent: a unit that a lost worker had finished is only done
again, to the same bytes. What fails is tried again elsewhere; what keeps failing is recorded and
the rest goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from tilepipe.schedule.crew import Crew
from tilepipe.schedule.dag import Stage
from tilepipe.schedule.flights import Fetched, Flight, Flights, Run, error_of
from tilepipe.schedule.job import OpenJob, Work
from tilepipe.schedule.pace import Pace
from tilepipe.schedule.task import Outcome, Task
from tilepipe.schedule.versions import REFUSALS

if TYPE_CHECKING:
    from distributed import Future

    from tilepipe.schedule.cluster import Connection

__all__ = ["Run", "Stream", "Work", "drive"]


class Stream:
    """The state of one call of ``drive``."""

    def __init__(
        self,
        connection: Connection,
        run: Run,
        *,
        retries: int,
        on_tick: Callable[[dict[str, int]], None],
        on_other: Callable[[str], None],
    ) -> None:
        self._crew = Crew(connection, on_other)
        self._flights = Flights(connection.client, run, sealed=not connection.local)
        self._pace = Pace()
        self._retries = retries
        self._on_tick = on_tick
        self._on_other = on_other
        self._open: dict[int, OpenJob] = {}
        self._device = 0
        """Tasks handed out that need the device."""
        self._device_begun = False
        self._started = 0

    def drive(self, works: Iterator[Work]) -> None:
        """Run every job to its end."""
        more = True
        try:
            while True:
                if self._crew.reachable():
                    if self._crew.look():
                        self._take_back_stranded()
                        self._copy_stragglers()
                    while more and self._hungry():
                        work = next(works, None)
                        if work is None:
                            more = False
                            break
                        self._open[self._started] = OpenJob(self._started, work, self._retries)
                        self._started += 1
                        self._fill()
                    self._fill()
                self._close_idle()
                if not self._flights and not self._open and not more:
                    return
                self._take_in(self._flights.wait())
                self._on_tick(self._crew.workers)
        finally:
            self._flights.cancel()

    # -- handing out ---------------------------------------------------------------------------

    def _window(self) -> int:
        """Return how many tasks may be with Dask: more than run, so that no worker waits for one.

        But as many as run until the device has its first unit: that would wait behind them.
        """
        if not self._device_begun and any(
            job.work.dag.is_for_device for job in self._open.values()
        ):
            return self._crew.threads
        return 2 * self._crew.threads + 2

    def _hungry(self) -> bool:
        """Open the next job when those at hand cannot fill the window."""
        if len(self._flights) >= self._window() or len(self._open) >= 4:
            return False
        return sum(job.work.dag.backlog for job in self._open.values()) < self._ahead()

    def _ahead(self) -> int:
        """Return how many units may wait for the device before reading on is put off.

        What was just read is still in memory when the device comes to it; read much further ahead,
        it would be read again.
        """
        return self._crew.device_lanes

    def _fill(self) -> None:
        for job in list(self._open.values()):
            if job.given_up:
                continue
            while len(self._flights) < self._window():
                device = self._device < self._crew.device_lanes
                dag = job.work.dag
                taken = dag.take(
                    device=device, roots=dag.backlog < self._ahead(), limit=self._limit
                )
                if taken is None:
                    break
                handed = [self._hand_out(job, task) for task in job.tasks(*taken)]
                if not all(handed):
                    return  # nobody takes any now; whether that is for good is seen elsewhere

    def _limit(self, stage: Stage, on_device: bool) -> int:
        return self._pace.task_units(_kind(stage, on_device))

    def _hand_out(self, job: OpenJob, task: Task, *, avoid: frozenset[str] = frozenset()) -> bool:
        """Give a task to Dask; False, and it waits again, if the connection broke."""
        stage = job.work.dag.stages[task.stage]
        workers = set(self._crew.workers)
        fit = (workers - job.unfit) or workers
        chosen = (fit - job.shunned(task) - avoid) or (fit - avoid) or fit
        # A worker that came later is left out until it has said that it has our tilepipe; one that
        # fails at once is idle, and Dask would move all to it that it may.
        strictly = bool(self._crew.strangers) or chosen != workers
        handed = self._flights.hand_out(
            task,
            job.work.ticket,
            # Of several jobs the earlier first; within one, what is nearest to a finished pyramid.
            priority=stage.rank - 10 * task.job,
            workers=chosen if strictly else None,
        )
        if handed:
            job.running += 1
            on_device = job.work.dag.needs_device(task.stage, task.units)
            self._device += on_device
            self._device_begun |= on_device
        elif not self._flights.is_copied(task):  # the connection broke just now
            job.give_back(task)
        return handed

    def _take_back_stranded(self) -> None:
        """Hand out anew what only workers may run that are all gone."""
        for flight in self._flights:
            if flight.only and not flight.only & set(self._crew.workers):
                self._lost(flight, reason="its workers are gone", counts=False)

    def _copy_stragglers(self) -> None:
        """Give a second copy to tasks that take far longer than usual, if workers idle.

        A worker that hangs may have taken a task, or may keep the result of one.
        """
        now_s = time.monotonic()
        late = [
            flight
            for flight in self._flights
            if not self._flights.is_copied(flight.task)
            and now_s - flight.since_s > self._patience_s(flight.task)
        ]
        if not late:
            return
        places = self._flights.idle_places(late, self._crew.workers)
        for flight in late:
            there, job = places.get(flight.future.key), self._open[flight.task.job]
            if there and set(self._crew.workers) - there - job.unfit:
                self._flights.begin_copy(flight)
                self._hand_out(job, flight.task, avoid=frozenset(there))

    def _patience_s(self, task: Task) -> float:
        dag = self._open[task.job].work.dag
        kind = _kind(dag.stages[task.stage], dag.needs_device(task.stage, task.units))
        return self._pace.patience_s(kind, len(task.units))

    # -- taking in -----------------------------------------------------------------------------

    def _take_in(self, batch: list[Future | Fetched]) -> None:
        for news in batch:
            flight = self._flights.of(news)
            if flight is None:
                continue
            if not isinstance(news, Fetched):
                if news.status == "finished":
                    self._flights.fetch(flight)
                else:
                    self._failed(flight, error_of(news))
            elif news.outcomes is None:
                self._lost(flight, reason=news.error, counts=False)
            else:
                self._arrived(flight, news.outcomes)

    def _arrived(self, flight: Flight, outcomes: list[Outcome]) -> None:
        self._land(flight)
        for twin in self._flights.end_copies(flight.task):
            self._land(twin, cancel=True)
        job, stage = self._open[flight.task.job], flight.task.stage
        dag = job.work.dag
        for outcome in outcomes:
            if outcome.ok:
                kind = _kind(dag.stages[stage], dag.needs_device(stage, (outcome.unit,)))
                self._pace.learn(kind, outcome.elapsed_s)
            known = outcome.worker in job.unfit
            job.judge(stage, outcome, workers=self._crew.workers)
            if outcome.unfit and not known and not job.given_up:
                self._on_other(f"a worker gets no more units of this job: {outcome.error}")

    def _failed(self, flight: Flight, error: BaseException | None) -> None:
        """Deal with a task that ended without a result; a stranger's refusal is not the unit's."""
        refused = isinstance(error, REFUSALS) and self._crew.sees_strangers()
        status = str(flight.future.status)
        reason = status if error is None else f"{type(error).__name__}: {error}"
        self._lost(flight, reason=reason, counts=not refused)

    def _lost(self, flight: Flight, *, reason: str, counts: bool = True) -> None:
        """Deal with a task whose worker or scheduler died under it."""
        counts = counts and flight.future.status not in ("cancelled", "lost")
        self._land(flight)
        if self._flights.end_copies(flight.task):
            return  # its copy goes on
        self._open[flight.task.job].lose(flight.task, reason, counts=counts)

    def _land(self, flight: Flight, *, cancel: bool = False) -> None:
        self._flights.land(flight, cancel=cancel)
        job = self._open[flight.task.job]
        job.running -= 1
        self._device -= job.work.dag.needs_device(flight.task.stage, flight.task.units)

    def _close_idle(self) -> None:
        for number, job in list(self._open.items()):
            if job.over:
                job.work.close(job.given_up)
                del self._open[number]


def _kind(stage: Stage, on_device: bool) -> str:
    """Name the units that take about as long: empty glass is no measure of what is computed."""
    return f"{stage.name}, computed" if on_device else stage.name


def drive(
    connection: Connection,
    works: Iterator[Work],
    run: Run,
    *,
    retries: int = 3,
    on_tick: Callable[[dict[str, int]], None] = lambda _: None,
    on_other: Callable[[str], None] = lambda _: None,
) -> None:
    """Run every job of ``works`` to its end through ``connection``; jobs are opened as needed.

    ``run(ticket, stage, units)`` is called on a worker and must return one Outcome a unit.
    ``on_tick`` is called about twice a second with the workers now known, ``on_other`` with a text
    when a worker gets no work: it has another tilepipe, or lacks what the job needs. Failures stand
    in each job's ``dag.failed``. Raises ScheduleError if the scheduler is lost.
    """
    Stream(connection, run, retries=retries, on_tick=on_tick, on_other=on_other).drive(works)
