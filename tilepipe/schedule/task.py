"""What travels through the scheduler: indices out, small records back, never pixels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Task:
    """Some units of one stage of one job, done one after the other by one worker."""

    job: int
    """Running number of the job in the stream."""
    stage: int
    units: tuple[int, ...]
    """Running numbers of units in the stage's grid."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one unit."""

    unit: int
    ok: bool
    elapsed_s: float = 0.0
    worker: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    """Small figures of a done unit: seconds per step, class counts, precision, …"""
    error: str = ""
    permanent: bool = False
    """The same input would fail the same way anywhere: not tried again."""
    unfit: bool = False
    """No unit of the job can be done on this worker: the output refuses bytes there (disk full,
    read-only, no permission), or slide, output or weights are not there, or others."""
    spans: tuple[tuple[str, float, float, int], ...] = ()
    """For ``--trace``: (name, start epoch s, seconds, thread)."""
