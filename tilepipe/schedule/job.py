"""``OpenJob``: a job in the stream, and the judgement of its units."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Protocol

from tilepipe.schedule.dag import Dag, Node
from tilepipe.schedule.task import Outcome, Task

MOST_LOSSES = 8
"""Times that Dask may give up on one unit because its workers die (each after 3 of them, by
default) before the unit is held to be what kills them."""


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
class OpenJob:
    """A job in the stream."""

    number: int
    work: Work
    retries: int
    running: int = 0
    """Tasks that are handed out."""
    given_up: str | None = None
    _trouble: dict[Node, _Trouble] = field(default_factory=dict)
    unfit: set[str] = field(default_factory=set)
    """Workers on which none of its units can be done."""

    @property
    def over(self) -> bool:
        """Whether nothing of it runs or can run any more."""
        return self.running == 0 and bool(self.given_up or self.work.dag.exhausted)

    def tasks(self, stage: int, units: list[int]) -> list[Task]:
        """Return the tasks of units that were taken; a unit that made trouble goes alone."""
        fresh = [unit for unit in units if (stage, unit) not in self._trouble]
        alone = [unit for unit in units if (stage, unit) in self._trouble]
        together = [Task(self.number, stage, tuple(fresh))] if fresh else []
        return together + [Task(self.number, stage, (unit,)) for unit in alone]

    def shunned(self, task: Task) -> set[str]:
        """Workers that should not get a task: unfit ones, and those on which its units failed."""
        workers = set(self.unfit)
        for unit in task.units:
            if (trouble := self._trouble.get((task.stage, unit))) is not None:
                workers |= trouble.workers
        return workers

    def give_back(self, task: Task) -> None:
        """Put the units of a task that could not be handed out among the ready ones."""
        for unit in task.units:
            self.work.dag.give_back((task.stage, unit))

    def lose(self, task: Task, reason: str, *, counts: bool) -> None:
        """Put the units of a task back whose worker or scheduler died under it.

        ``counts`` False: nothing speaks against the units themselves.
        """
        most = MOST_LOSSES if "KilledWorker" in reason else self.retries
        for unit in task.units:
            node = (task.stage, unit)
            trouble = self._trouble.setdefault(node, _Trouble())
            trouble.losses += counts
            if counts and trouble.losses > most:
                self.work.dag.fail(node, f"its worker was lost {trouble.losses} times: {reason}")
            else:
                self.work.dag.give_back(node)

    def judge(self, stage: int, outcome: Outcome, *, workers: Collection[str]) -> None:
        """Record a done unit; try a failed one again, fail it, or give the whole job up.

        Of what an unfit worker says nothing speaks against the unit.
        """
        node = (stage, outcome.unit)
        dag = self.work.dag
        if outcome.ok:
            self._trouble.pop(node, None)
            if dag.complete(node):
                self.work.record(stage, outcome)
            return
        trouble = self._trouble.setdefault(node, _Trouble())
        trouble.workers.add(outcome.worker)
        if outcome.unfit:
            self.unfit.add(outcome.worker)
            if set(workers) - self.unfit:
                dag.give_back(node)
            else:
                self.given_up = outcome.error
                dag.fail(node, outcome.error)
            return
        trouble.attempts += 1
        if outcome.permanent or trouble.attempts > self.retries:
            dag.fail(node, outcome.error)
        else:
            dag.give_back(node)
