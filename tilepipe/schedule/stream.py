"""``drive``: jobs through a Dask client, a bounded window of tasks at a time.

The scheduler never sees more than the window, so its memory and this process's do not grow with
the number of units. Tasks are idempotent: a unit that a lost worker had finished is only done
again, to the same bytes. What fails is tried again elsewhere; what keeps failing is recorded and
the rest goes on.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol

from tilepipe.errors import ScheduleError
from tilepipe.schedule.cluster import from_environment
from tilepipe.schedule.dag import Dag, Node, Stage
from tilepipe.schedule.task import Outcome, Task

if TYPE_CHECKING:
    from distributed import Future

    from tilepipe.schedule.cluster import Connection

TASK_S = 0.05
"""Quick units are put together into tasks of about this length: Dask takes 1-2 ms for each."""
MOST_UNITS = 64
MOST_LOSSES = 8
"""Times that Dask may give up on one unit because its workers die (each after 3 of them, by
default) before the unit is held to be what kills them."""
SILENCE_S = 120.0
"""A scheduler that cannot be reached for this long is lost."""
NO_WORKER_S = 600.0
"""A cluster without any worker for this long is given up; a batch system may start some late."""
STRAGGLER_S = 60.0
"""A task this old, and 8 times as old as usual, gets a second copy if a worker has nothing to do.
Both write the same bytes; the first to come back counts (``TILEPIPE_STRAGGLER_S``)."""

Run = Callable[[Any, int, tuple[int, ...]], list[Outcome]]


class Work(Protocol):
    """A job as the stream sees it."""

    dag: Dag
    ticket: Any
    """What a worker needs to do any unit of the job; small, pickled with each task."""

    def record(self, stage: int, outcome: Outcome) -> None:
        """Take note of a done unit."""

    def close(self, reason: str | None) -> None:
        """Called once, when nothing of the job can run any more; ``reason`` if it was given up."""


@dataclass(slots=True)
class _Trouble:
    """What went wrong with one unit so far."""

    attempts: int = 0
    losses: int = 0
    workers: set[str] = field(default_factory=set)


@dataclass(slots=True)
class _Open:
    """A job in the stream."""

    number: int
    work: Work
    running: int = 0
    trouble: dict[Node, _Trouble] = field(default_factory=dict)
    full: set[str] = field(default_factory=set)
    """Workers on which the output refused bytes."""
    given_up: str | None = None


@dataclass(frozen=True, slots=True)
class _Flight:
    """A task that was handed to Dask."""

    future: Future
    task: Task
    since_s: float


@dataclass(frozen=True, slots=True)
class _Fetched:
    """The result of a task, or why there is none."""

    key: str
    outcomes: list[Outcome] | None
    error: str = ""


class Stream:
    """The state of one call of ``drive``."""

    def __init__(
        self,
        connection: Connection,
        run: Run,
        *,
        retries: int,
        on_tick: Callable[[dict[str, int]], None],
    ) -> None:
        self._connection = connection
        self._client = connection.client
        self._run = run
        self._retries = retries
        self._on_tick = on_tick
        self._news: SimpleQueue[Future | _Fetched] = SimpleQueue()
        self._flying: dict[str, _Flight] = {}
        self._copied: dict[Task, list[str]] = {}
        """Keys of the copies of a task, where there are two."""
        self._open: dict[int, _Open] = {}
        self._device = 0
        self._mean_s: dict[str, float] = {}
        self._workers: dict[str, int] = {}
        self._workers_read_s = 0.0
        self._worker_seen_s = time.monotonic()
        self._silent_since: float | None = None
        self._straggler_s = from_environment("STRAGGLER_S", STRAGGLER_S)
        self._started = 0

    def drive(self, works: Iterator[Work]) -> None:
        """Run every job to its end."""
        more = True
        try:
            while True:
                if self._reachable():
                    self._read_workers()
                    while more and self._hungry():
                        work = next(works, None)
                        if work is None:
                            more = False
                            break
                        self._open[self._started] = _Open(self._started, work)
                        self._started += 1
                        self._fill()
                    self._fill()
                self._close_idle()
                if not self._flying and not self._open and not more:
                    return
                self._take_in(self._wait())
                self._on_tick(self._workers)
        finally:
            for flight in self._flying.values():
                self._forget(flight.future, cancel=True)

    def _reachable(self) -> bool:
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

    # -- handing out ---------------------------------------------------------------------------

    def _window(self) -> int:
        return 2 * sum(self._workers.values()) + 2

    def _hungry(self) -> bool:
        """Open the next job when those at hand cannot fill the window."""
        return len(self._flying) < self._window() and len(self._open) < 4

    def _fill(self) -> None:
        for job in list(self._open.values()):
            if job.given_up:
                continue
            while len(self._flying) < self._window():
                device = self._device < 2 * max(1, len(self._workers))
                taken = job.work.dag.take(device=device, limit=self._limit)
                if taken is None:
                    break
                stage, units = taken
                fresh = [u for u in units if (stage, u) not in job.trouble]
                if fresh:
                    self._submit(job, Task(job.number, stage, tuple(fresh)))
                for unit in units:
                    if (stage, unit) in job.trouble:
                        self._submit(job, Task(job.number, stage, (unit,)))

    def _limit(self, stage: Stage) -> int:
        """Return how many units of a stage make a task: one, until they are known to be quick."""
        mean_s = self._mean_s.get(stage.name)
        if mean_s is None:
            return 1
        return max(1, min(MOST_UNITS, int(TASK_S / max(1e-6, mean_s))))

    def _submit(self, job: _Open, task: Task, *, avoid: frozenset[str] = frozenset()) -> None:
        stage = job.work.dag.stages[task.stage]
        shunned = job.full | avoid
        for unit in task.units:
            if (trouble := job.trouble.get((task.stage, unit))) is not None:
                shunned = shunned | trouble.workers
        options: dict[str, Any] = {}
        others = sorted(set(self._workers) - shunned)
        if others and len(others) < len(self._workers):
            options = {"workers": others, "allow_other_workers": True}
        try:
            future = self._client.submit(
                self._run,
                job.work.ticket,
                task.stage,
                task.units,
                pure=False,
                # Of several jobs the earlier first; within one, what is nearest to a finished
                # pyramid.
                priority=stage.rank - 10 * task.job,
                **options,
            )
        except Exception:
            if self._client.status == "running":
                raise
            if task not in self._copied:  # the connection broke just now
                for unit in task.units:
                    job.work.dag.give_back((task.stage, unit))
            return
        self._flying[future.key] = _Flight(future, task, time.monotonic())
        if task in self._copied:
            self._copied[task].append(future.key)
        job.running += 1
        self._device += stage.on_device
        future.add_done_callback(self._news.put)

    def _copy_stragglers(self) -> None:
        """Give a second copy to tasks that take far longer than usual, if workers idle.

        A worker that hangs may have taken a task, or may keep the result of one.
        """
        now_s = time.monotonic()
        late = [
            flight
            for flight in self._flying.values()
            if flight.task not in self._copied and now_s - flight.since_s > self._patience_s(flight)
        ]
        if not late:
            return
        busy = self._client.processing()
        if all(len(busy.get(worker, ())) >= slots for worker, slots in self._workers.items()):
            return
        at = {key: worker for worker, keys in busy.items() for key in keys}
        holders = self._client.who_has([flight.future for flight in late])
        for flight in late:
            key = flight.future.key
            there = {at[key]} if key in at else set(holders.get(key, ()))
            if there and set(self._workers) - there:
                self._copied[flight.task] = [key]
                self._submit(self._open[flight.task.job], flight.task, avoid=frozenset(there))

    def _patience_s(self, flight: _Flight) -> float:
        stage = self._open[flight.task.job].work.dag.stages[flight.task.stage]
        usual_s = self._mean_s.get(stage.name, 0.0) * len(flight.task.units)
        return max(self._straggler_s, 8 * usual_s)

    # -- taking in -----------------------------------------------------------------------------

    def _wait(self) -> list[Future | _Fetched]:
        try:
            batch = [self._news.get(timeout=0.5)]
        except Empty:
            return []
        while True:
            try:
                batch.append(self._news.get_nowait())
            except Empty:
                return batch

    def _take_in(self, batch: list[Future | _Fetched]) -> None:
        for news in batch:
            flight = self._flying.get(news.key)
            if flight is None:
                continue  # its copy was quicker
            if not isinstance(news, _Fetched):
                if news.status == "finished":
                    self._fetch(flight)
                else:
                    self._lost(flight, reason=self._reason(news))
            elif news.outcomes is None:
                self._lost(flight, reason=news.error, counts=False)
            else:
                self._arrived(flight, news.outcomes)

    def _fetch(self, flight: _Flight) -> None:
        """Ask for a result without waiting: the worker that has it may hang."""
        future = flight.future
        fetching = asyncio.run_coroutine_threadsafe(
            self._client.gather(future, asynchronous=True), self._client.loop.asyncio_loop
        )

        def done(fetched: concurrent.futures.Future[list[Outcome]]) -> None:
            try:
                self._news.put(_Fetched(future.key, fetched.result()))
            except BaseException as error:  # also cancelled, when the client closes
                self._news.put(_Fetched(future.key, None, f"{type(error).__name__}: {error}"))

        fetching.add_done_callback(done)

    def _arrived(self, flight: _Flight, outcomes: list[Outcome]) -> None:
        self._land(flight)
        for key in self._copied.pop(flight.task, ()):
            if (twin := self._flying.get(key)) is not None:
                self._land(twin, cancel=True)
        for outcome in outcomes:
            self._judge(self._open[flight.task.job], flight.task.stage, outcome)

    def _reason(self, future: Future) -> str:
        if future.status == "error":
            try:
                error = future.exception(timeout=5)
            except Exception as problem:  # whatever it is, the unit goes again
                error = problem
            return f"{type(error).__name__}: {error}"
        return str(future.status)

    def _land(self, flight: _Flight, *, cancel: bool = False) -> None:
        del self._flying[flight.future.key]
        job = self._open[flight.task.job]
        job.running -= 1
        self._device -= job.work.dag.stages[flight.task.stage].on_device
        self._forget(flight.future, cancel=cancel)

    def _forget(self, future: Future, *, cancel: bool = False) -> None:
        try:
            if cancel:
                future.cancel()
            future.release()
        except Exception:  # the scheduler that held it may be gone
            return

    def _lost(self, flight: _Flight, *, reason: str, counts: bool = True) -> None:
        """Put the units of a task back whose worker or scheduler died under it.

        ``counts`` False: nothing speaks against the units themselves.
        """
        task = flight.task
        counts = counts and flight.future.status not in ("cancelled", "lost")
        most = MOST_LOSSES if "KilledWorker" in reason else self._retries
        self._land(flight)
        if any(key in self._flying for key in self._copied.pop(task, ())):
            return  # its copy goes on
        job = self._open[task.job]
        for unit in task.units:
            node = (task.stage, unit)
            trouble = job.trouble.setdefault(node, _Trouble())
            trouble.losses += counts
            if counts and trouble.losses > most:
                job.work.dag.fail(node, f"its worker was lost {trouble.losses} times: {reason}")
            else:
                job.work.dag.give_back(node)

    def _judge(self, job: _Open, stage: int, outcome: Outcome) -> None:
        node = (stage, outcome.unit)
        dag = job.work.dag
        name = dag.stages[stage].name
        if outcome.ok:
            job.trouble.pop(node, None)
            mean = self._mean_s.get(name, outcome.elapsed_s)
            self._mean_s[name] = 0.9 * mean + 0.1 * outcome.elapsed_s
            if dag.complete(node):
                job.work.record(stage, outcome)
            return
        trouble = job.trouble.setdefault(node, _Trouble())
        trouble.workers.add(outcome.worker)
        if outcome.no_space:
            job.full.add(outcome.worker)
            if not set(self._workers) - job.full:
                job.given_up = outcome.error
                dag.fail(node, outcome.error)
                return
        trouble.attempts += 1
        if outcome.permanent or trouble.attempts > self._retries:
            dag.fail(node, outcome.error)
        else:
            dag.give_back(node)

    def _close_idle(self) -> None:
        for number, job in list(self._open.items()):
            if job.running == 0 and (job.given_up or job.work.dag.exhausted):
                job.work.close(job.given_up)
                del self._open[number]

    def _read_workers(self) -> None:
        now_s = time.monotonic()
        if self._workers and now_s - self._workers_read_s < 2:
            return
        self._workers_read_s = now_s
        try:
            found = self._connection.workers()
        except Exception:  # asked again in two seconds
            return
        if found:
            self._workers = found
            self._worker_seen_s = now_s
            self._copy_stragglers()
        elif now_s - self._worker_seen_s > NO_WORKER_S:
            raise ScheduleError(
                f"the cluster has had no worker for {NO_WORKER_S:.0f} s; what was done is "
                "recorded: start workers and give the same command again to go on"
            )


def drive(
    connection: Connection,
    works: Iterator[Work],
    run: Run,
    *,
    retries: int = 3,
    on_tick: Callable[[dict[str, int]], None] = lambda _: None,
) -> None:
    """Run every job of ``works`` to its end through ``connection``; jobs are opened as needed.

    ``run(ticket, stage, units)`` is called on a worker and must return one Outcome a unit.
    ``on_tick`` is called about twice a second with the workers now known. Failures stand in each
    job's ``dag.failed``. Raises ScheduleError if the scheduler is lost.
    """
    Stream(connection, run, retries=retries, on_tick=on_tick).drive(works)
