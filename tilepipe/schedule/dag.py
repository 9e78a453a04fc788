"""``Dag``: which units may run now. Geometry says who needs whom; nothing here knows Dask.

State is one byte a unit, so a job of 10**6 units costs a megabyte and no object per unit.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from tilepipe.tiling import Grid, Unit

WAITING, READY, RUNNING, DONE, FAILED, SKIPPED = range(6)
Node = tuple[int, int]
"""(stage number, unit index)"""


def _nothing(_: Unit) -> Iterable[Node]:
    return ()


def all_of_it(_: Unit) -> float:
    """Say of any unit that the device has to compute all of it."""
    return 1.0


@dataclass(frozen=True, slots=True)
class Stage:
    """One kind of work on one grid of units."""

    name: str
    level: int
    grid: Grid
    rank: int = 0
    """Ready units of the highest rank are handed out first."""
    needs: Callable[[Unit], Iterable[Node]] = _nothing
    """Nodes that must be done before the unit may run."""
    feeds: Callable[[Unit], Iterable[Node]] = _nothing
    """Nodes that may have become ready when the unit is done."""
    after: int | None = None
    """Number of a stage that all units need as a whole: told here, not unit by unit, it is asked
    for once and not by every unit of both."""
    on_device: bool = False
    """Needs the device; few of these are in flight at a time."""
    share: Callable[[Unit], float] = all_of_it
    """How much of a unit the device has to compute, 0 to 1; 0: that unit does not wait for it."""
    root: bool = False
    """Needs nothing: handed out in order without being queued."""
    band: int = 0
    """Units go in bands of so many columns, so that neighbours come soon after each other and the
    unit above them too; 0: in reading order."""


class Dag:
    """The units of a job and their states."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = tuple(stages)
        self._state: list[NDArray[np.uint8]] = [
            np.full(len(stage.grid), WAITING, np.uint8) for stage in self.stages
        ]
        self._ready: list[list[tuple[int, int]]] = [[] for _ in self.stages]
        """Heaps of (band, unit index)."""
        self._light: list[list[tuple[int, int]]] = [[] for _ in self.stages]
        """The same of device stages, units that need no device."""
        self._backlog = 0.0
        self._roots = [self._in_order(stage) for stage in self.stages]
        self._done = [0] * len(self.stages)
        self._order = sorted(range(len(self.stages)), key=lambda number: -self.stages[number].rank)
        self._behind: list[list[int]] = [
            [later for later, stage in enumerate(self.stages) if stage.after == number]
            for number in range(len(self.stages))
        ]
        """Stages that need a stage as a whole."""
        self.failed: dict[Node, str] = {}

    def start(
        self,
        recorded: Mapping[int, Iterable[int]],
        wanted: Mapping[int, Iterable[int]] | None = None,
    ) -> None:
        """Mark what is ``recorded`` (stage number → unit indices) as done and find what may run.

        With ``wanted``, everything else is left alone, for another part of the job.
        """
        if wanted is not None:
            for number, state in enumerate(self._state):
                state[:] = SKIPPED
                state[np.fromiter(wanted.get(number, ()), dtype=np.int64)] = WAITING
        for number, indices in recorded.items():
            found = np.fromiter(indices, dtype=np.int64)
            self._state[number][found] = DONE
            self._done[number] = int(np.count_nonzero(self._state[number] == DONE))
        for number, stage in enumerate(self.stages):
            if not stage.root:
                self._offer_all(number)
        self._lead_with_first()

    def _lead_with_first(self) -> None:
        """Put the roots that the device's first unit needs before all others: it waits for them."""
        for number, stage in enumerate(self.stages):
            if not stage.on_device or stage.root:
                continue
            state = self._state[number]
            first = next((i for i in self._in_order(stage) if state[i] == WAITING), None)
            if first is None:
                return
            wanted: dict[int, set[int]] = {}
            todo, seen = [(number, first)], {(number, first)}
            while todo:
                here, index = todo.pop()
                if self.stages[here].root:
                    wanted.setdefault(here, set()).add(index)
                    continue
                needed = self.stages[here].needs(self.stages[here].grid.at(index))
                fresh = [node for node in needed if node not in seen and not self.is_done(node)]
                seen.update(fresh)
                todo += fresh
            for root, indices in wanted.items():
                self._roots[root] = chain(sorted(indices), self._roots[root])
            return

    @staticmethod
    def _in_order(stage: Stage) -> Iterator[int]:
        return stage.grid.banded(stage.band or max(1, stage.grid.shape[1]))

    @property
    def backlog(self) -> float:
        """Units that are ready for the device and wait for it, each by its share."""
        return self._backlog

    def needs_device(self, number: int, units: Iterable[int]) -> bool:
        """Tell whether one of a stage's units is computed by the device."""
        stage = self.stages[number]
        return stage.on_device and any(stage.share(stage.grid.at(index)) > 0 for index in units)

    @property
    def is_for_device(self) -> bool:
        """Whether units that need the device are still to be handed out."""
        return any(
            stage.on_device and bool(np.any((state == WAITING) | (state == READY)))
            for stage, state in zip(self.stages, self._state, strict=True)
        )

    def count(self, number: int) -> tuple[int, int]:
        """Return (done, total) units of a stage."""
        return self._done[number], len(self._state[number])

    def is_done(self, node: Node) -> bool:
        """Tell whether a unit is done."""
        return bool(self._state[node[0]][node[1]] == DONE)

    def take(
        self,
        *,
        device: bool,
        roots: bool = True,
        limit: Callable[[Stage, bool], int] = lambda *_: 1,
    ) -> tuple[int, list[int]] | None:
        """Hand out some ready units of one stage; None where nothing may run now.

        ``limit`` says of a stage how many at the most, and of those that need the device (True)
        another number than of the others.
        ``device`` False passes over the units that need the device, ``roots`` False over those
        that only feed them. Units that need the device come without others.
        """
        for number in self._order:
            stage = self.stages[number]
            if self._light[number]:
                return number, self._take(self._light, number, limit(stage, False))
            if stage.on_device and not device:
                continue
            if stage.root and not stage.on_device and not roots:
                continue
            most = limit(stage, stage.on_device)
            taken = (
                self._take_root(number, most)
                if stage.root
                else self._take(self._ready, number, most)
            )
            if taken:
                return number, taken
        return None

    def _take(self, heaps: list[list[tuple[int, int]]], number: int, limit: int) -> list[int]:
        ready, state = heaps[number], self._state[number]
        taken: list[int] = []
        while ready and len(taken) < limit:
            _, index = heapq.heappop(ready)
            state[index] = RUNNING
            taken.append(index)
        if heaps is self._ready:
            self._wait(number, taken, -1)
        return taken

    def _wait(self, number: int, units: Iterable[int], sign: int) -> None:
        """Add units to the backlog, or take them out: it is asked for before every task."""
        stage = self.stages[number]
        if stage.on_device:
            self._backlog += sign * sum(stage.share(stage.grid.at(index)) for index in units)

    def _take_root(self, number: int, limit: int) -> list[int]:
        taken = self._take(self._ready, number, limit)  # handed back by a lost worker
        state = self._state[number]
        while len(taken) < limit:
            index = next(self._roots[number], None)
            if index is None:
                break
            if state[index] == WAITING:
                state[index] = RUNNING
                taken.append(index)
        return taken

    def _push(self, number: int, index: int) -> None:
        self._state[number][index] = READY
        stage = self.stages[number]
        place = (0, index)
        if stage.band:
            place = (index % stage.grid.shape[1] // stage.band, index)
        light = stage.on_device and not self.needs_device(number, (index,))
        heapq.heappush((self._light if light else self._ready)[number], place)
        if not light:
            self._wait(number, (index,), 1)

    def give_back(self, node: Node) -> None:
        """Put a running unit back among the ready ones."""
        number, index = node
        if self._state[number][index] == RUNNING:
            self._push(number, index)

    def complete(self, node: Node) -> bool:
        """Mark a unit done and offer what it feeds; False if it was done already."""
        number, index = node
        if self._state[number][index] == DONE:
            return False
        self._state[number][index] = DONE
        self._done[number] += 1
        stage = self.stages[number]
        for fed in stage.feeds(stage.grid.at(index)):
            self._offer(fed)
        if self._is_whole(number):
            for later in self._behind[number]:
                self._offer_all(later)
        return True

    def fail(self, node: Node, reason: str) -> None:
        """Mark a unit failed; what needs it stays waiting for good."""
        self._state[node[0]][node[1]] = FAILED
        self.failed[node] = reason

    @property
    def finished(self) -> bool:
        """Whether every unit that is this run's is done."""
        return all(bool(np.all((state == DONE) | (state == SKIPPED))) for state in self._state)

    @property
    def skipped(self) -> int:
        """Units that are left to other parts of the job."""
        return sum(int(np.count_nonzero(state == SKIPPED)) for state in self._state)

    @property
    def exhausted(self) -> bool:
        """Whether nothing may run and nothing runs: done, or stopped by failures."""
        return not any(
            ready or light or np.any(state == RUNNING) or (stage.root and np.any(state == WAITING))
            for stage, ready, light, state in zip(
                self.stages, self._ready, self._light, self._state, strict=True
            )
        )

    @property
    def blocked(self) -> int:
        """Units that wait for a failed one."""
        return sum(int(np.count_nonzero(state == WAITING)) for state in self._state)

    def _is_whole(self, number: int) -> bool:
        return self._done[number] == len(self._state[number])

    def _offer_all(self, number: int) -> None:
        for index in np.flatnonzero(self._state[number] == WAITING):
            self._offer((number, int(index)))

    def _offer(self, node: Node) -> None:
        number, index = node
        state = self._state[number]
        if state[index] != WAITING:
            return
        stage = self.stages[number]
        if stage.after is not None and not self._is_whole(stage.after):
            return
        if all(self.is_done(need) for need in stage.needs(stage.grid.at(index))):
            self._push(number, index)
