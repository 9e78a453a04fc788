"""``Ticket``: all that a worker needs to know of a job, as plain values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

INGEST, REDUCE, GATE, SEGMENT, LABEL_REDUCE = (
    "ingest",
    "reduce",
    "gate",
    "segment",
    "label-reduce",
)
FIND, JOIN, PAINT, OBJECT_REDUCE = "find-objects", "join-objects", "paint-objects", "object-reduce"


@dataclass(frozen=True, slots=True)
class Ticket:
    """A job as it travels to workers: a few kB, pickled with every task."""

    slide: str | None
    """Path of the slide; None when the store itself is the input."""
    output: str
    """Location of the store."""
    stages: tuple[tuple[str, int], ...]
    """(stage, level) by stage number."""
    image_fingerprint: str
    label_fingerprint: str
    label: str | None
    level: int
    """Image level that is segmented."""
    spec: dict[str, Any]
    settings: dict[str, Any]
    in_channels: int
    network: str = ""
    """``Model.identity`` of what the job was planned with; a file of weights may change."""
    instances: str | None = None
    """Label of the mask's objects."""
    instances_fingerprint: str = ""
    trace: bool = False
    slack_bytes: int = 0
    """Freed memory that a process may hold on to."""
    recent_bytes: int = 0
    """Units that a process keeps for the stages that read them next."""
    shared_tiles: bool = True
    """Tiles of the slide lie under several units: decoded ones are worth keeping."""
    warms: bool = False
    """Units wait for the network: it can be built while the first are read."""


def is_whole(facts: Mapping[str, Any], *, probabilities: bool) -> bool:
    """Tell whether a unit's record is of all that its stage writes: probabilities too, if asked."""
    return not probabilities or isinstance(facts.get("probabilities"), str)


def fingerprint(**facts: Any) -> str:
    """Return 32 hex digits that change when any fact does."""
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
