"""``DeviceQueue``: the one thread that gives a device its batches, without a gap between units."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import Any, TypeVar

from numpy.typing import NDArray

from tilepipe.infer.account import Account
from tilepipe.infer.backends import Backend, BatchResult, means_out_of_memory
from tilepipe.infer.maps import Maps
from tilepipe.tiling import Tile

T = TypeVar("T")
LOOK_S = 0.005
"""How long the device's thread waits for a batch before it looks for a new unit."""
Batch = tuple[Sequence[Tile], list[NDArray[Any]]]


@dataclass(frozen=True, slots=True)
class UnitJob:
    """The batches of one unit and where their results go; used in the device's thread alone."""

    backend: Backend
    batches: Iterable[Batch]
    """Tiles and their pixels (C, Y, X) each."""
    put: Callable[[Sequence[Tile], BatchResult], None]
    """Takes the results in the order of the batches."""
    result: Callable[[], Maps]
    """Called when all are in."""
    give_back: Callable[[], None]
    """Frees what the back-ends hold; called when memory ran out and nothing is under way."""
    account: Account


@dataclass(slots=True)
class _Running:
    job: UnitJob
    outcome: Future[Maps]
    under_way: int = 0
    is_all_in: bool = False
    error: Exception | None = None


class DeviceQueue:
    """Runs units in the order of arrival, as many batches at once as their back-end takes.

    A unit that waits already, or comes meanwhile, follows while the last batches of the one before
    are under way: no stream of the device is idle at a unit's end.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tilepipe-device")
        self._lock = Lock()
        self._waiting = 0
        self._starting: _Running | None = None
        self._pending: deque[tuple[_Running, Sequence[Tile], Any]] = deque()

    def submit(self, make: Callable[[], UnitJob]) -> Future[Maps]:
        """Queue a unit; ``make`` is called when its turn comes, in the device's thread."""
        outcome: Future[Maps] = Future()
        with self._lock:
            self._waiting += 1
        self._thread.submit(self._run, make, outcome)
        return outcome

    def call(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        """Queue anything else that needs the device; nothing is under way meanwhile."""

        def alone() -> T:
            self._drain()
            return function(*arguments)

        return self._thread.submit(alone)

    def close(self) -> None:
        """Finish what was submitted and end the thread."""
        self._thread.shutdown(wait=True)

    def _run(self, make: Callable[[], UnitJob], outcome: Future[Maps]) -> None:
        with self._lock:
            self._waiting -= 1
        try:
            job = make()
        except Exception as error:
            outcome.set_exception(error)
        else:
            self._start(_Running(job, outcome))
        while self._pending and not self._waiting:
            if self._is_oldest_done():
                self._finish()

    def _start(self, unit: _Running) -> None:
        job = unit.job
        if self._pending and self._pending[-1][0].job.backend is not job.backend:
            self._drain()
        self._starting = unit
        try:
            for tiles, pixels in job.batches:
                ticket = job.backend.submit(pixels, job.account)
                unit.under_way += 1
                self._pending.append((unit, tiles, ticket))
                if len(self._pending) >= job.backend.depth:
                    self._finish()
                if unit.error is not None:
                    break
        except Exception as error:
            self._fail(unit, error)
        self._starting = None
        unit.is_all_in = True
        _settle(unit)

    def _drain(self) -> None:
        while self._pending:
            self._finish()

    def _is_oldest_done(self) -> bool:
        """Wait for the oldest batch, but not so long that a unit that comes now waits with it."""
        unit, _, ticket = self._pending[0]
        try:
            with unit.job.account.span("compute"):
                return unit.job.backend.is_done(ticket, within_s=LOOK_S)
        except Exception:  # collecting it tells what it is
            return True

    def _finish(self) -> None:
        """Take the oldest batch back."""
        unit, tiles, ticket = self._pending.popleft()
        try:
            result = unit.job.backend.collect(ticket, unit.job.account)
            if unit.error is None:
                unit.job.put(tiles, result)
        except Exception as error:
            self._fail(unit, error)
        unit.under_way -= 1
        _settle(unit)

    def _fail(self, unit: _Running, error: Exception) -> None:
        unit.error = unit.error or error
        if means_out_of_memory(error):
            self._drain()
            unit.job.give_back()
            if self._starting is not None:  # its back-end went, too
                self._starting.error = self._starting.error or error


def _settle(unit: _Running) -> None:
    """Tell whoever waits for a unit, once nothing of it is under way."""
    if not unit.is_all_in or unit.under_way:
        return
    if unit.error is not None:
        unit.outcome.set_exception(unit.error)
        return
    try:
        unit.outcome.set_result(unit.job.result())
    except Exception as error:
        unit.outcome.set_exception(error)
