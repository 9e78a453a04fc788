"""``Flights``: the tasks that are with Dask, and the news of them."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import pickle
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

from tilepipe.schedule.task import Outcome, Task
from tilepipe.schedule.versions import Sealed

if TYPE_CHECKING:
    from distributed import Client, Future

Run = Callable[[Any, int, tuple[int, ...]], list[Outcome]]


@dataclass(frozen=True, slots=True)
class Flight:
    """A task that was handed to Dask."""

    future: Future
    task: Task
    since_s: float
    only: frozenset[str] = frozenset()
    """Workers outside which it must not run; empty: all may."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """The result of a task, or why there is none."""

    key: str
    outcomes: list[Outcome] | None
    error: str = ""


class Flights:
    """Hands tasks to a client and gathers their results, never waiting on a worker."""

    def __init__(self, client: Client, run: Run, *, sealed: bool = False) -> None:
        """``sealed``: a worker of another tilepipe, which may come at any time, runs nothing."""
        self._client = client
        self._run = run
        self._sealed = sealed
        self._news: SimpleQueue[Future | Fetched] = SimpleQueue()
        self._flying: dict[str, Flight] = {}
        self._copied: dict[Task, list[str]] = {}
        """Keys of the copies of a task, where there are two."""

    def __len__(self) -> int:
        return len(self._flying)

    def __iter__(self) -> Iterator[Flight]:
        return iter(list(self._flying.values()))

    def hand_out(
        self,
        task: Task,
        ticket: Any,
        *,
        priority: int,
        workers: Collection[str] | None,
    ) -> bool:
        """Give a task to Dask; False if the connection broke.

        To ``workers`` and nobody else, even if those are gone; None: to anybody.
        """
        options: dict[str, Any] = {} if workers is None else {"workers": sorted(workers)}
        call: tuple[Any, ...] = (self._run, ticket, task.stage, task.units)
        if self._sealed:
            call = (pickle.loads, pickle.dumps(Sealed(self._run, call[1:])))
            options["key"] = f"{self._run.__name__}-{uuid.uuid4()}"  # by which a dashboard shows it
        try:
            future = self._client.submit(*call, pure=False, priority=priority, **options)
        except Exception:
            if self._client.status == "running":
                raise
            return False
        self._flying[future.key] = Flight(future, task, time.monotonic(), frozenset(workers or ()))
        if task in self._copied:
            self._copied[task].append(future.key)
        future.add_done_callback(self._news.put)
        return True

    def is_copied(self, task: Task) -> bool:
        """Whether a task has a second copy."""
        return task in self._copied

    def begin_copy(self, flight: Flight) -> None:
        """Take note that what is handed out next for the task is its copy."""
        self._copied[flight.task] = [flight.future.key]

    def end_copies(self, task: Task) -> list[Flight]:
        """Forget that a task has copies; returns those that still fly."""
        keys = self._copied.pop(task, ())
        return [self._flying[key] for key in keys if key in self._flying]

    def idle_places(self, late: list[Flight], workers: dict[str, int]) -> dict[str, set[str]]:
        """Return where each late task is, by key; empty if no worker has nothing to do."""
        try:
            busy = self._client.processing()
            if all(len(busy.get(worker, ())) >= slots for worker, slots in workers.items()):
                return {}
            holders = self._client.who_has([flight.future for flight in late])
        except Exception:  # the connection broke; asked again in two seconds
            logging.getLogger(__name__).debug("looking for stragglers", exc_info=True)
            return {}
        at = {key: worker for worker, keys in busy.items() for key in keys}
        keys = [flight.future.key for flight in late]
        return {key: {at[key]} if key in at else set(holders.get(key, ())) for key in keys}

    def wait(self) -> list[Future | Fetched]:
        """Return what came back, at the latest after half a second."""
        try:
            batch = [self._news.get(timeout=0.5)]
        except Empty:
            return []
        while True:
            try:
                batch.append(self._news.get_nowait())
            except Empty:
                return batch

    def of(self, news: Future | Fetched) -> Flight | None:
        """Return the flight that news are of; None if its copy was quicker."""
        return self._flying.get(news.key)

    def fetch(self, flight: Flight) -> None:
        """Ask for a result without waiting: the worker that has it may hang."""
        future = flight.future
        fetching = asyncio.run_coroutine_threadsafe(
            self._client.gather(future, asynchronous=True), self._client.loop.asyncio_loop
        )

        def done(fetched: concurrent.futures.Future[list[Outcome]]) -> None:
            try:
                self._news.put(Fetched(future.key, fetched.result()))
            except BaseException as error:  # also cancelled, when the client closes
                self._news.put(Fetched(future.key, None, f"{type(error).__name__}: {error}"))

        fetching.add_done_callback(done)

    def land(self, flight: Flight, *, cancel: bool = False) -> None:
        """Forget a task here and with Dask."""
        del self._flying[flight.future.key]
        _forget(flight.future, cancel=cancel)

    def cancel(self) -> None:
        """Forget everything that still flies."""
        for flight in self:
            self.land(flight, cancel=True)


def error_of(future: Future) -> BaseException | None:
    """Return what ended a task without a result, if Dask knows it."""
    if future.status != "error":
        return None
    try:
        found: BaseException | None = future.exception(timeout=5)
    except Exception as problem:  # whatever it is, the unit goes again
        found = problem
    return found


def _forget(future: Future, *, cancel: bool) -> None:
    try:
        if cancel:
            future.cancel()
        future.release()
    except Exception:  # the scheduler that held it may be gone
        return
