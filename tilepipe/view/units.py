"""``UnitTracker``: which units of a pyramid are written, watched while a job runs."""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilepipe.store import Files
from tilepipe.store.journal import JOURNAL
from tilepipe.tiling import Box, Grid

_RECORD = re.compile(r"(\d{1,7})\.(\d{1,7})\.json")
IMAGE_STAGES = (("ingest",), ("reduce", "ingest"))
LABEL_STAGES = (("segment", "paint-objects"), ("label-reduce", "object-reduce"))
"""Stages whose records count: at level 0, at coarser levels."""

Change = tuple[int, int, int, int]
"""Sequence number, level, iy, ix."""


class UnitTracker:
    """Done units per level, and a sequence number for every change.

    A unit counts when its record is in the journal, never because a file is there: so nothing
    half-written is ever shown.
    """

    def __init__(
        self,
        files: Files,
        journal: str,
        stages: tuple[tuple[str, ...], tuple[str, ...]],
        grids: Sequence[Grid],
        clock: itertools.count[int],
    ) -> None:
        self._files = files
        self._folder = f"{JOURNAL}/{journal}"
        self._stages = stages
        self._grids = list(grids)
        self._clock = clock
        self._lock = threading.Lock()
        self._done: list[NDArray[np.bool_]] = [np.zeros(g.shape, dtype=bool) for g in grids]
        self._versions: list[NDArray[np.int64]] = [
            np.zeros(grid.shape, dtype=np.int64) for grid in grids
        ]
        self._changes: list[Change] = []

    def refresh(self) -> None:
        """Look at the journal again; only names are listed, nothing is read."""
        with self._lock:
            for level, grid in enumerate(self._grids):
                before = self._done[level]
                if level and before.all():
                    continue
                now = self._listed(level, grid)
                # Before the versions: a block that is made meanwhile without a unit would be kept
                # as that of the version that has it.
                self._done[level] = now
                for iy, ix in np.argwhere(now != before).tolist():
                    self._note(level, iy, ix)

    def _listed(self, level: int, grid: Grid) -> NDArray[np.bool_]:
        now = np.zeros(grid.shape, dtype=bool)
        for stage in self._stages[min(level, 1)]:
            for entry in self._files.entries(f"{self._folder}/{stage}/{level}"):
                match = _RECORD.fullmatch(entry.name)
                if match is None or entry.size_bytes == 0:
                    continue
                iy, ix = int(match[1]), int(match[2])
                if iy < grid.shape[0] and ix < grid.shape[1]:
                    now[iy, ix] = True
        return now

    def _note(self, level: int, iy: int, ix: int) -> None:
        seq = next(self._clock)
        self._changes.append((seq, level, iy, ix))
        for up in range(level, len(self._grids)):
            rows, columns = self._grids[up].shape
            y, x = iy >> (up - level), ix >> (up - level)
            self._versions[up][min(y, rows - 1), min(x, columns - 1)] = seq

    @property
    def any_done(self) -> bool:
        """Whether anything is there at all."""
        return any(bool(done.any()) for done in self._done)

    @property
    def complete(self) -> bool:
        """Whether every unit of every level is there."""
        return all(bool(done.all()) for done in self._done)

    def is_done(self, level: int, iy: int, ix: int) -> bool:
        """Whether a unit is written and recorded."""
        return bool(self._done[level][iy, ix])

    def done_units(self, level: int) -> list[list[int]]:
        """Return the (iy, ix) of the units that are there."""
        listed: list[list[int]] = np.argwhere(self._done[level]).tolist()
        return listed

    def version(self, level: int, box: Box) -> int:
        """Sequence number of the last change under ``box``; 0 if there is nothing yet."""
        grid = self._grids[level]
        side = grid.unit_px
        part = self._versions[level][
            box.y0 // side : (box.y1 - 1) // side + 1, box.x0 // side : (box.x1 - 1) // side + 1
        ]
        return int(part.max(initial=0))

    @property
    def last_seq(self) -> int:
        """Sequence number of the latest change; 0 before any."""
        with self._lock:
            return self._changes[-1][0] if self._changes else 0

    def changes_since(self, seq: int) -> list[Change]:
        """Return the changes after ``seq``."""
        with self._lock:
            return [change for change in self._changes if change[0] > seq]


def tracker_of(
    files: Files,
    journal: str,
    stages: tuple[tuple[str, ...], tuple[str, ...]],
    grids: Sequence[Grid],
    clock: itertools.count[int],
    *,
    record: dict[str, Any],
) -> UnitTracker | None:
    """Return a tracker, or None where no job of ours wrote: then everything counts as there."""
    tracker = UnitTracker(files, journal, stages, grids, clock)
    tracker.refresh()
    return tracker if tracker.any_done or record.get("state") == "running" else None
