"""The image that a store holds: whether all of it is there, which it is, and as tissue is sought.

A part that is not stored reads as 0 and would be segmented as if it were black glass. So before
anything is computed from a store of ours, its journal is held against its files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilepipe.errors import MismatchError, StoreError, argument
from tilepipe.pipeline.inspect import units_of
from tilepipe.pipeline.job import INGEST, LABEL_REDUCE, OBJECT_REDUCE, PAINT, REDUCE, SEGMENT
from tilepipe.pipeline.output import is_blank
from tilepipe.slide import LevelInfo
from tilepipe.slide.fingerprint import fingerprint_folder
from tilepipe.store import EXPORTED, Files, Journal, Label, Level, LocalFiles, Record, Store
from tilepipe.tiling import Box

Lost = dict[int, frozenset[tuple[int, int]]]
"""Units (iy, ix) by level."""


def check_whole(store: Store) -> None:
    """Raise StoreError if a store of ours lacks a part of its image; others' are believed."""
    reason = what_lacks(store)
    if reason is not None:
        raise StoreError(reason)


def what_lacks(store: Store) -> str | None:
    """Say what of its image a store of ours lacks, and what to do; None if nothing."""
    if not (store.own and store.has_image):
        return None
    record = store.read_record()
    # Without a state: made through the library, by who knows best what is in it.
    state = record.get("state")
    if is_blank(store) if state is None else state not in ("done", EXPORTED):
        return _unfinished(store, record)
    lost = lost_units(store, record.get("fingerprint"))
    count = sum(map(len, lost.values()))
    if not count:
        return None
    level, units = next(iter(lost.items()))
    box = store.image(level).grid.unit(*min(units)).box
    return (
        f"{store.location}: the image lacks {count} units that were written, the first at "
        f"level {level}, {box}: their files are gone and would be read as 0; "
        + _remedy(store, record)
    )


def _unfinished(store: Store, record: dict[str, Any]) -> str:
    origin = record.get("exported_from")
    if origin is not None:
        return (
            f"{store.location}: holds a part of an image, {record['state']}, and the rest would be "
            f"read as 0; export {origin} again when that is finished"
        )
    units = units_of(store, None, record.get("fingerprint"))
    told = ", ".join(f"{name} {row['done']} of {row['total']} units" for name, row in units.items())
    return (
        f"{store.location}: its image is not finished ({told or 'nothing is there yet'}), and the "
        f"rest would be read as 0; {_remedy(store, record)}"
    )


def _remedy(store: Store, record: dict[str, Any]) -> str:
    source = record.get("source")
    path = source.get("path") if isinstance(source, dict) else None
    again = f"tilepipe ingest {argument(path) if path else 'SLIDE'} -o {argument(store.location)}"
    return f"make them with `tilepipe finish {argument(store.location)}`, or `{again}`"


def check_kept(store: Store, labels: Sequence[Label] = (), *, image: bool = True) -> None:
    """Raise StoreError if files that a job wrote are gone, of a mask or (with ``image``) the image.

    They would be read as 0: handed on, background. What is not finished yet is another matter, and
    ``unfinished`` tells it: while a job writes, what it does meanwhile would look gone here.
    """
    record = store.read_record()
    if image and record.get("state") == "done":
        lost = lost_units(store, record.get("fingerprint"))
        _refuse_lost(store, "the image", lost, store.image)
    for label in labels:
        _check_label(store, label)
        # How probable its objects are is read beside the mask.
        mask = label.read_record().get("instances_of")
        if mask in store.labels:
            _check_label(store, store.label(mask))


def _check_label(store: Store, label: Label) -> None:
    record = label.read_record()
    mark = record.get("fingerprint")
    if unfinished(label) is not None or not isinstance(mark, str):
        return
    stages = (PAINT, OBJECT_REDUCE) if "instances_of" in record else (SEGMENT, LABEL_REDUCE)
    with suppress(MismatchError):  # the records are another job's and tell nothing of this one
        lost = lost_of_label(label, store.journal(label.name, mark), stages)
        _refuse_lost(store, label.what, lost, label.level)


def _refuse_lost(store: Store, what: str, lost: Lost, level: Callable[[int], Level]) -> None:
    if count := sum(map(len, lost.values())):
        number, units = next(iter(lost.items()))
        raise StoreError(
            f"{store.location}: {what} lacks {count} units that were written, the first at level "
            f"{number}, {level(number).grid.unit(*min(units)).box}: their files are gone and would "
            f"be read as 0; restore them, or make them with "
            f"`tilepipe finish {argument(store.location)}`"
        )


def unfinished(label: Label) -> str | None:
    """Say that the job of a mask has not done all of it; None if it has, or if none is recorded."""
    state = label.read_record().get("state")
    if state in (None, "done", EXPORTED):
        return None
    return (
        f"{label.what} is not finished ({state}): what is not there yet is read as background; "
        "`tilepipe finish` makes the rest"
    )


def lost_units(store: Store, fingerprint: Any) -> Lost:
    """Return the units of the image that the journal has and the store has not.

    A unit that is all 0 is not stored on purpose: its record has the checksum of zeros. Only the
    records of units without a file are read. {} where no job of ours keeps a journal.
    """
    if not (store.own and store.has_image and isinstance(fingerprint, str)):
        return {}
    levels = [store.image(number) for number in range(store.n_levels)]
    return lost_of(levels, store.journal(None, fingerprint), (INGEST, REDUCE))


def lost_of(
    levels: Sequence[Level],
    journal: Journal,
    stages: tuple[str, str],
    checksum_in: Callable[[Record], Any] = lambda record: record.checksum,
) -> Lost:
    """Return the same of any pyramid; ``stages`` made its level 0 and the coarser ones.

    ``checksum_in`` finds a unit's checksum in its record.
    """
    lost: Lost = {}
    if not journal.begun:
        return lost
    for number, level in enumerate(levels):
        absent = {(unit.iy, unit.ix): unit for unit in level.not_stored()}
        if not absent:
            continue
        records = journal.recorded(stages[min(number, 1)], number, only=absent)
        gone = frozenset(
            place
            for place, record in records.items()
            if checksum_in(record) != level.checksum_of_zeros(absent[place])
        )
        if gone:
            # Written between the two looks by another process, a part of this job?
            gone &= {(unit.iy, unit.ix) for unit in level.not_stored()}
        if gone:
            lost[number] = gone
    return lost


def lost_of_label(label: Label, journal: Journal, stages: tuple[str, str]) -> Lost:
    """Return the same of a label and its probabilities, of which one record tells."""
    mask = lost_of([label.level(k) for k in range(label.n_levels)], journal, stages)
    beside = label.probabilities
    if beside is None:
        return mask
    planes = lost_of(
        [beside.level(k) for k in range(beside.n_levels)],
        journal,
        stages,
        lambda record: record.facts.get("probabilities"),
    )
    none: frozenset[tuple[int, int]] = frozenset()
    return {k: mask.get(k, none) | planes.get(k, none) for k in {*mask, *planes}}


def content_of(store: Store) -> dict[str, Any]:
    """Say in JSON which image a store holds, whatever its path: files of level 0, shape, dtype.

    On a local disk all names and sizes and sampled bytes, as of other slides; elsewhere all names,
    sizes and what the server calls their content.
    """
    level = store.image(0)
    if isinstance(store.files, LocalFiles):
        try:
            found = fingerprint_folder(store.files.path(level.key))
        except OSError as error:
            raise StoreError(
                f"{store.location}: {level.key} cannot be read: {error.strerror or error}"
            ) from error
    else:
        names = sorted(_contents(store.files, level.key))
        found = {"n_files": len(names), "sha256": hashlib.sha256(repr(names).encode()).hexdigest()}
    return {**found, "shape": [store.channels, *level.shape], "dtype": str(store.dtype)}


def _contents(files: Files, folder: str) -> Iterator[tuple[str, int, str]]:
    for entry in files.entries(folder):
        key = f"{folder}/{entry.name}"
        if entry.is_folder:
            yield from _contents(files, key)
        else:
            yield key, entry.size_bytes, entry.tag


class StoredImage:
    """A store's image as ``tissue_mask`` looks at one."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.rgb = store.rgb
        self.dtype = store.dtype

    @cached_property
    def levels(self) -> tuple[LevelInfo, ...]:
        """The levels with their own downsample."""
        extent = self._store.extent
        found = [self._store.image(k) for k in range(self._store.n_levels)]
        return tuple(
            LevelInfo(
                level.shape,
                (extent[0] / level.shape[0], extent[1] / level.shape[1]),
                None,
                "zarr",
                piece_bytes=level.piece_bytes,
            )
            for level in found
        )

    def read(self, box: Box, *, level: int = 0) -> NDArray[np.generic]:
        """Pixels (c, y, x) of ``box``, level px."""
        return self._store.image(level).read(box)
