"""What a worker does with a unit, stage by stage."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilepipe.buffers import empty
from tilepipe.errors import MismatchError, SlideError, TilepipeError, UnfitError
from tilepipe.infer.account import merge_seconds
from tilepipe.pipeline.context import Context, context_of, on_worker, slide_level, worker_address
from tilepipe.pipeline.job import (
    FIND,
    GATE,
    INGEST,
    JOIN,
    LABEL_REDUCE,
    OBJECT_REDUCE,
    PAINT,
    REDUCE,
    SEGMENT,
    Ticket,
)
from tilepipe.pipeline.lanes import Memory
from tilepipe.schedule import Outcome
from tilepipe.slide import Slide
from tilepipe.store import Level, reduce_image, reduce_label
from tilepipe.tiling import Box, Unit

MOST_DAMAGED = 20
"""Damaged tiles that the record of a unit names: a record is small, and they may be many."""
MOST_REASON = 400
"""Letters of what is told of each; of what a library says there may be any number."""
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


def run_units(ticket: Ticket, stage: int, units: tuple[int, ...]) -> list[Outcome]:
    """Do units of one stage; never raises for a unit's own trouble, which its Outcome tells."""
    name, level = ticket.stages[stage]
    outcomes = []
    for index in units:
        started_s, clock_s = time.time(), time.perf_counter()
        try:
            with context_of(ticket) as context:
                facts = _STAGES[name](context, level, index)
        except Exception as error:
            outcomes.append(_failed(index, error))
            continue
        elapsed_s = time.perf_counter() - clock_s
        spans = ((name, started_s, elapsed_s, threading.get_native_id()),) if ticket.trace else ()
        outcomes.append(
            Outcome(index, True, elapsed_s=elapsed_s, worker=_here(), facts=facts, spans=spans)
        )
        _memory.give_back(ticket.slack_bytes)
    return outcomes


_memory = Memory()


def _here() -> str:
    return worker_address() or f"pid {os.getpid()}"  # called directly, by a test


def _failed(index: int, error: BaseException) -> Outcome:
    cause: BaseException | None = error
    number = None
    while cause is not None and number is None:
        number = cause.errno if isinstance(cause, OSError) else None
        cause = cause.__cause__
    text = str(error) if isinstance(error, TilepipeError) else f"{type(error).__name__}: {error}"
    full = number in _NO_SPACE and not isinstance(error, SlideError)
    unfit = full or isinstance(error, UnfitError | MismatchError)
    return Outcome(
        index,
        False,
        worker=_here(),
        error=text + on_worker() if unfit else text,
        # What the operating system refused here it may grant elsewhere, or next time.
        permanent=isinstance(error, SlideError) and number is None,
        unfit=unfit,
    )


class _Clock:
    """Seconds of the steps of one unit."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last_s = time.perf_counter()

    def lap(self, step: str) -> None:
        now_s = time.perf_counter()
        self.seconds[step] = self.seconds.get(step, 0.0) + now_s - self._last_s
        self._last_s = now_s


def _ingest(context: Context, level: int, index: int) -> dict[str, Any]:
    array = context.store.image(level)
    unit = array.grid.at(index)
    clock = _Clock()
    pixels = context.slide.read(unit.box)
    clock.lap("decode")
    context.store.check_current(context.image_journal)
    checksum = array.write_unit(unit, pixels)
    clock.lap("ingest-write")
    facts = _damage(context.slide, unit, unit.box, level=0)
    context.image_journal.write(INGEST, level, unit, checksum=checksum, facts=facts)
    return {**facts, "seconds": clock.seconds, "px": unit.box.area}


def _damage(slide: Slide, unit: Unit, read: Box, *, level: int) -> dict[str, Any]:
    """Return the facts of a unit for which ``read`` was read of a level: what was filled there.

    All that the slide knows of it, whoever found it: a tile is found damaged once, but it may lie
    under several units, and a unit may be tried again.
    """
    found = slide.damage.touching(level, read)
    if not found:
        return {}
    # Each is counted in one unit, that of its corner.
    corners = [Box(t.box.y0, t.box.x0, t.box.y0 + 1, t.box.x0 + 1) for t in found]
    count = sum(unit.box.contains(corner) for corner in corners)
    named = [str(tile)[:MOST_REASON] for tile in found[:MOST_DAMAGED]]
    return {"damaged": named, "n_damaged": count}


def _damage_in_place(context: Context, unit: Unit) -> dict[str, Any]:
    """Return the same of a unit of the mask, for which the slide itself was read."""
    if not context.spec.in_place:
        return {}
    number = slide_level(context.slide, context.ticket.level)
    return _damage(context.slide, unit, context.footprint(unit.box), level=number)


def _reduce(context: Context, level: int, index: int) -> dict[str, Any]:
    image, journal = context.store.image, context.image_journal
    return _reduce_unit(
        image(level - 1), image(level), index, reduce_image,
        partial(context.store.check_current, journal), partial(journal.write, REDUCE, level),
    )  # fmt: skip


def _label_reduce(context: Context, level: int, index: int) -> dict[str, Any]:
    assert context.ticket.label is not None
    assert context.label_journal is not None
    label, journal = context.label(context.ticket.label), context.label_journal
    check = partial(context.store.check_current, journal)
    facts: dict[str, Any] = {}
    seconds: dict[str, float] = {}
    beside = label.probabilities
    if beside is not None:
        done = _reduce_unit(
            beside.level(level - 1), beside.level(level), index, reduce_image, check,
            lambda _, checksum: facts.update(probabilities=checksum),
        )  # fmt: skip
        seconds = done["seconds"]
    # The record comes last and is of both.
    done = _reduce_unit(
        label.level(level - 1), label.level(level), index, reduce_label, check,
        partial(journal.write, LABEL_REDUCE, level, facts=facts),
    )  # fmt: skip
    return {"seconds": merge_seconds([seconds, done["seconds"]])}


def _object_reduce(context: Context, level: int, index: int) -> dict[str, Any]:
    assert context.ticket.instances is not None
    assert context.object_journal is not None
    label, journal = context.label(context.ticket.instances).level, context.object_journal
    return _reduce_unit(
        label(level - 1), label(level), index, reduce_label,
        partial(context.store.check_current, journal), partial(journal.write, OBJECT_REDUCE, level),
    )  # fmt: skip


def _paint(context: Context, level: int, index: int) -> dict[str, Any]:
    del level
    assert context.ticket.instances is not None
    return context.objects().paint(context.label(context.ticket.instances), index)


def _reduce_unit(
    fine: Level,
    coarse: Level,
    index: int,
    reduce: Callable[[NDArray[Any]], NDArray[Any]],
    check: Callable[[], None],
    record: Callable[..., None],
) -> dict[str, Any]:
    """Build a unit from the finer level under it, a quarter at a time."""
    unit = coarse.grid.at(index)
    clock = _Clock()
    small = empty((*coarse.lead, *unit.box.shape), coarse.dtype)
    side = -(-coarse.unit_px // 2)
    for piece in unit.box.split((side, side)):
        pixels = fine.read(piece.enlarged(2).intersect(Box.of_shape(fine.shape)))
        clock.lap("read")
        small[(..., *piece.shift(-unit.box.y0, -unit.box.x0).slices)] = reduce(pixels)
        clock.lap("reduce")
    check()
    checksum = coarse.write_unit(unit, small)
    clock.lap("write")
    record(unit, checksum=checksum)
    return {"seconds": clock.seconds}


def _gate(context: Context, level: int, index: int) -> dict[str, Any]:
    assert context.ticket.label is not None
    assert context.label_journal is not None
    unit = context.label(context.ticket.label).level(0).grid.at(index)
    nothing, something = context.engine().gate(context.level_reader(), unit.box)
    facts = {"nothing": nothing, "something": something, **_damage_in_place(context, unit)}
    context.store.check_current(context.label_journal)
    context.label_journal.write(GATE, level, unit, checksum="0" * 16, facts=facts)
    return facts


def _segment(context: Context, level: int, index: int) -> dict[str, Any]:
    del level
    assert context.ticket.label is not None
    assert context.label_journal is not None
    label = context.label(context.ticket.label)
    array = label.level(0)
    beside = label.probabilities.level(0) if label.probabilities is not None else None
    unit = array.grid.at(index)
    gate = context.gate()
    if gate is not None and gate <= 0:
        # The classifier finds none of the classes on the whole slide: every map is gated to
        # zero, and the first class wins (UNet 3+ §3.3;
        # test_run.py::test_the_classification_gate_in_two_passes).
        ids: NDArray[np.uint8] = np.zeros(unit.box.shape, np.uint8)
        planes = np.zeros((*beside.lead, *unit.box.shape), np.uint8) if beside is not None else None
        facts: dict[str, Any] = {"gated": True}
    else:
        result = context.engine().segment(
            context.level_reader(), unit.box, skip=_no_tissue(context)
        )
        ids, planes = result.ids, result.probabilities
        facts = {**result.facts, **_damage_in_place(context, unit)}
    seconds: dict[str, float] = facts.pop("seconds", {})
    clock = _Clock()
    context.store.check_current(context.label_journal)
    checksum = array.write_unit(unit, ids)
    if beside is not None:
        assert planes is not None
        facts["probabilities"] = beside.write_unit(unit, planes)
    clock.lap("write")
    facts["counts"] = _counts(ids)
    context.label_journal.write(SEGMENT, 0, unit, checksum=checksum, facts=facts)
    return {**facts, "seconds": {**seconds, **clock.seconds}, "px": unit.box.area}


def _counts(ids: NDArray[np.uint8]) -> dict[str, int]:
    """Return px by class id, those that occur."""
    top = int(ids.max())
    if top < 16:  # a pass a class over bytes; bincount makes 8-byte integers of them first
        counts = [int(np.count_nonzero(ids == value)) for value in range(top + 1)]
    else:
        counts = [int(n) for n in np.bincount(ids.ravel())]
    return {str(value): n for value, n in enumerate(counts) if n}


def _no_tissue(context: Context) -> Callable[[Box], bool] | None:
    """Return what tells whether a box of the level, context and all, holds empty glass only."""
    tissue = context.tissue
    if tissue is None:
        return None
    factor = context.store.level_downsample(context.ticket.level)
    return lambda box: not tissue.any(box.enlarged(factor))


_STAGES: dict[str, Callable[[Context, int, int], dict[str, Any]]] = {
    INGEST: _ingest,
    REDUCE: _reduce,
    GATE: _gate,
    SEGMENT: _segment,
    LABEL_REDUCE: _label_reduce,
    FIND: lambda context, _, index: context.objects().find(index),
    JOIN: lambda context, _, __: context.objects().join(),
    PAINT: _paint,
    OBJECT_REDUCE: _object_reduce,
}
