"""``labels/NAME-instances``: the objects of a mask as an int32 label pyramid.

Three steps over the units of the mask's finest level: *find* what is in each unit and what crosses
its border, *join* all that into one numbering, *paint* each unit with the final ids, which are then
reduced to a pyramid. Each step is recorded in the label's own journal. What units tell of their
edges lies under ``tilepipe/objects/`` in the store until the label is complete.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tilepipe.errors import MismatchError, StoreError
from tilepipe.pipeline.cells import Cells, Rule, find_cells
from tilepipe.pipeline.job import FIND, JOIN, OBJECT_REDUCE, PAINT, fingerprint
from tilepipe.pipeline.joining import (
    join_cells,
    pack_cells,
    pack_numbers,
    unpack_cells,
    unpack_numbers,
)
from tilepipe.pipeline.kin import Node, children, nothing, parent
from tilepipe.pipeline.output import is_begun, versions
from tilepipe.schedule import Stage
from tilepipe.spec import OBJECTS_SUFFIX, LabelClass
from tilepipe.store import Journal, Label, Level, Store
from tilepipe.tiling import Box, Grid, Unit

OBJECTS = "tilepipe/objects"
_FILE_LIMIT_BYTES = 1 << 30
_BACKGROUND = LabelClass(name="background", color=(0, 0, 0, 0))


def instances_of(name: str) -> str:
    """Return the name of the label that holds the objects of mask ``name``."""
    return f"{name}{OBJECTS_SUFFIX}"


def open_instances(
    store: Store,
    mask: Label,
    *,
    mask_fingerprint: str,
    overwrite: bool,
    check_turn: Callable[[], None],
) -> str:
    """Create the label for a mask's objects or take up the one there; return its fingerprint.

    ``check_turn`` raises StoreError where another machine has come to create it. Raises
    MismatchError if a label of that name is of another job.
    """
    name = instances_of(mask.name)
    rule = Rule.of_classes(mask.classes)
    mark = fingerprint(mask=mask_fingerprint, rule=rule.to_json(), numbering=1)
    kept = mask.read_record()
    if isinstance(kept.get("spec"), dict) and kept["spec"].get("instances") is not True:
        # So that `tilepipe finish` makes them too.
        mask.write_record({**kept, "spec": {**kept["spec"], "instances": True}})
    # Stopped between the label's creation and its first record: it begins anew.
    begun = name in store.labels and is_begun(store, name)
    if name in store.labels and not begun:
        found = store.label(name).read_record()
        if not overwrite and found.get("fingerprint") == mark:
            return mark
        if not overwrite:
            raise MismatchError(
                f"{store.location}: the label {name!r} is of another job; make it anew with "
                "--overwrite, or keep both with another --name"
            )
        if found and found.get("instances_of") != mask.name:
            raise MismatchError(
                f"{store.location}: the label {name!r} is no label of the objects of "
                f"{mask.name!r}, and --overwrite would take it away for them; give the mask "
                "another --name"
            )
    finest = mask.level(0)
    check_turn()
    label = store.create_label(
        name,
        # A colour for every id would be a list as long as the objects; only 0 is no object.
        classes=[_BACKGROUND],
        level=mask.image_level,
        unit_px=finest.unit_px,
        dtype="int32",
        overwrite=overwrite or begun,
    )
    label.write_record(
        {
            "fingerprint": mark,
            "instances_of": mask.name,
            "rule": rule.to_json(),
            "connectivity": 4,
            "versions": versions(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "state": "running",
        }
    )
    return mark


def forget_instances(store: Store, mask: str) -> None:
    """Remove the objects of a mask that is about to be made anew."""
    name = instances_of(mask)
    if name in store.labels and store.label(name).read_record().get("instances_of") == mask:
        store.remove_label(name)


def object_stages(
    label: Sequence[Grid], *, first: int, segment: int, halo_px: int
) -> tuple[list[Stage], Callable[[Unit], Iterable[Node]]]:
    """Return the stages after the mask, and what a segmented unit feeds.

    ``first`` is the number of the first of them, ``segment`` that of the mask's finest level.
    """
    grid = label[0]
    find, join, paint = first, first + 1, first + 2

    def near(number: int) -> Callable[[Unit], Iterable[Node]]:
        def nodes(unit: Unit) -> Iterable[Node]:
            for other in grid.touching(unit.box.grow(halo_px)):
                yield number, grid.index(other.iy, other.ix)

        return nodes

    stages = [
        Stage(FIND, 0, grid, rank=5, needs=near(segment)),
        Stage(JOIN, 0, Grid((1, 1), 1), rank=6, after=find),
    ]
    for level, current in enumerate(label):
        stages.append(
            Stage(
                PAINT if level == 0 else OBJECT_REDUCE,
                level,
                current,
                rank=4,
                needs=nothing if level == 0 else children(paint + level - 1, label[level - 1]),
                after=join if level == 0 else None,
                feeds=parent(paint + level + 1, label[level + 1])
                if level + 1 < len(label)
                else nothing,
            )
        )
    return stages, near(find)


class Objects:
    """The work of the three steps on one mask."""

    def __init__(self, store: Store, mask: str, journal: Journal) -> None:
        self._store = store
        self._mask = store.label(mask)
        self._journal = journal
        self._rule = Rule.of_classes(self._mask.classes)
        self._folder = f"{OBJECTS}/{mask}"

    @property
    def _level(self) -> Level:
        return self._mask.level(0)

    def find(self, index: int) -> dict[str, Any]:
        """Find the objects of a unit and keep what its neighbours must know."""
        unit = self._level.grid.at(index)
        raw = pack_cells(self._cells(unit))
        self._store.check_current(self._journal)
        self._store.files.put(self._key("edges", unit), raw)
        self._journal.write(FIND, 0, unit, checksum=hashlib.sha256(raw).hexdigest()[:16])
        return {}

    def join(self) -> dict[str, Any]:
        """Number the objects of the whole mask."""
        grid = self._level.grid
        count, shares = join_cells(grid, self._told, self._rule)
        self._store.check_current(self._journal)
        digest = hashlib.sha256()
        for unit, numbers in shares:
            raw = pack_numbers(numbers)
            digest.update(raw)
            self._store.files.put(self._key("ids", unit), raw)
        self._journal.write(
            JOIN, 0, grid.at(0), checksum=digest.hexdigest()[:16], facts={"count": count}
        )
        return {"count": count}

    def paint(self, label: Label, index: int) -> dict[str, Any]:
        """Write the final ids of a unit."""
        unit = self._level.grid.at(index)
        cells = self._cells(unit)
        key = self._key("ids", unit)
        try:
            raw = self._store.files.get(key, limit_bytes=_FILE_LIMIT_BYTES)
            if raw is None:
                raise StoreError("is missing")
            ids = unpack_numbers(raw, cells).paint(cells)
        except StoreError as error:
            # Their journal goes, so that the next run numbers the objects anew.
            self._journal.forget(JOIN)
            raise StoreError(
                f"{self._store.location}: {key} {error}; give the same command again"
            ) from error
        self._store.check_current(self._journal)
        checksum = label.level(0).write_unit(unit, ids)
        self._journal.write(PAINT, 0, unit, checksum=checksum)
        return {}

    def _cells(self, unit: Unit) -> Cells:
        shape = self._level.shape
        seen = unit.box.grow(self._rule.halo_px).intersect(Box.of_shape(shape))
        return find_cells(self._level.read(seen), unit.box, shape, self._rule)

    def _told(self, unit: Unit) -> Cells:
        """What a unit told; found again where that was lost."""
        try:
            raw = self._store.files.get(self._key("edges", unit), limit_bytes=_FILE_LIMIT_BYTES)
            if raw is not None:
                return unpack_cells(raw, unit, self._level.shape, self._rule)
        except StoreError:
            pass
        return self._cells(unit)

    def _key(self, what: str, unit: Unit) -> str:
        return f"{self._folder}/{what}/{unit.iy}.{unit.ix}"


def close_instances(
    store: Store, mask: str, mark: str, *, state: str, units: dict[str, Any], failed: list[Any]
) -> int | None:
    """Write the label's closing record; return how many objects there are, None if not known."""
    name = instances_of(mask)
    label = store.label(name)
    count: int | None = None
    for record in store.journal(name, mark).recorded(JOIN, 0).values():
        found = record.facts.get("count")
        count = found if isinstance(found, int) else None
    written = label.read_record()
    if state == "part done" and written.get("state") == "done":
        return count  # `finish` completed it before this part ended
    label.write_record(
        {
            **written,
            "state": state,
            "count": count,
            "units": units,
            "failed": failed,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
    )
    if state == "done":
        store.files.delete_tree(f"{OBJECTS}/{mask}")
    return count
