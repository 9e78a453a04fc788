"""What a job finds done: units whose records are believed and whose files are there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tilepipe.pipeline.job import (
    FIND,
    INGEST,
    JOIN,
    LABEL_REDUCE,
    OBJECT_REDUCE,
    PAINT,
    REDUCE,
    SEGMENT,
    is_whole,
)
from tilepipe.pipeline.stored import Lost
from tilepipe.schedule import Stage
from tilepipe.store import Journal

OF_MASK = (SEGMENT, LABEL_REDUCE)
"""Stages whose units are those of the mask's levels: of the finest, of the others."""
OF_PAINTED = (PAINT, OBJECT_REDUCE)
"""The same of the objects' label."""


@dataclass(frozen=True, slots=True)
class Journals:
    """The journals of what a job writes."""

    image: Journal
    mask: Journal | None = None
    objects: Journal | None = None

    def of(self, stage: str) -> Journal:
        """Return the one that holds the records of a stage's units."""
        found = self.mask
        if stage in (INGEST, REDUCE):
            found = self.image
        elif stage in (FIND, JOIN, *OF_PAINTED):
            found = self.objects
        assert found is not None
        return found

    @property
    def rejected(self) -> Iterator[str]:
        """Why records were not believed."""
        for journal in filter(None, (self.image, self.mask, self.objects)):
            yield from journal.rejected


def recorded_units(
    stages: Sequence[Stage], journals: Journals, gone: Mapping[str, Lost], *, probabilities: bool
) -> dict[int, list[int]]:
    """Return the units of each stage, by its number, that need not be done again.

    ``gone`` are those that were written and are not there any more, by stage.
    """
    recorded: dict[int, list[int]] = {}
    for number, stage in enumerate(stages):
        if stage.name in (FIND, JOIN) and gone.get(PAINT, {}).get(0):
            recorded[number] = []  # what they found is kept until all objects are painted only
            continue
        rows, columns = stage.grid.shape
        asked = probabilities and stage.name in OF_MASK
        lost = gone.get(stage.name, {}).get(stage.level, ())
        recorded[number] = [
            stage.grid.index(iy, ix)
            for (iy, ix), record in journals.of(stage.name)
            .recorded(stage.name, stage.level)
            .items()
            if iy < rows
            and ix < columns
            and (iy, ix) not in lost
            and is_whole(record.facts, probabilities=asked)
        ]
    return recorded
