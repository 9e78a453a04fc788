"""What a run tells while it runs; ``cli`` draws it, a notebook may listen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class StageProgress:
    """Units of one kind of work."""

    name: str
    done: int
    total: int
    at_start: int
    """Units found recorded by an earlier run."""


@dataclass(frozen=True, slots=True)
class Note:
    """Something the user should know; nothing is wrong."""

    slide: str
    text: str


@dataclass(frozen=True, slots=True)
class Warned:
    """Something that may be wrong."""

    slide: str
    text: str


@dataclass(frozen=True, slots=True)
class Opened:
    """A job was planned and its output is ready."""

    slide: str
    output: str
    plan: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a job stands."""

    slide: str
    stages: tuple[StageProgress, ...]
    elapsed_s: float
    mpix_per_s: float
    """Segmented (else ingested) output px of this run per second."""
    left_s: float | None
    failed: int
    workers: int


@dataclass(frozen=True, slots=True)
class Finished:
    """A job came to its end."""

    slide: str
    output: str
    state: str
    """done, part done, units failed, or failed."""
    summary: dict[str, Any] = field(default_factory=dict)


Event = Note | Warned | Opened | Progress | Finished
OnEvent = Callable[[Event], None]


def ignore(_: Event) -> None:
    """Listen to nothing."""
