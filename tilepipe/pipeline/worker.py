"""What a worker does with a unit. Slide, store and network are opened once per process and job."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tilepipe.errors import SlideError, TilepipeError
from tilepipe.pipeline.instances import Objects
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
from tilepipe.schedule import Outcome
from tilepipe.slide import Slide, TissueMask, open_slide, tissue_mask
from tilepipe.spec import JobSpec
from tilepipe.store import Journal, Level, Store, open_store, reduce_image, reduce_label
from tilepipe.tiling import Box, Unit

if TYPE_CHECKING:
    from tilepipe.infer import Engine, Settings

Read = Callable[[Box], NDArray[Any]]
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
_MOST_CONTEXTS = 4


class Context:
    """One job in one process."""

    def __init__(self, ticket: Ticket) -> None:
        self.ticket = ticket
        self.spec = JobSpec.checked(ticket.spec, source="ticket")
        self.store: Store = open_store(ticket.output, writable=True)
        self.image_journal: Journal = self.store.journal(None, ticket.image_fingerprint)
        self.label_journal: Journal | None = None
        if ticket.label is not None:
            self.label_journal = self.store.journal(ticket.label, ticket.label_fingerprint)
        self.object_journal: Journal | None = None
        if ticket.instances is not None:
            self.object_journal = self.store.journal(ticket.instances, ticket.instances_fingerprint)
        self._opening = threading.Lock()
        self._slide: Slide | None = None
        self._tissue: TissueMask | None = None
        self._tissue_read = False
        self._gate: float | None = None

    @property
    def slide(self) -> Slide:
        """The input, opened on first use."""
        with self._opening:
            if self._slide is None:
                assert self.ticket.slide is not None
                self._slide = open_slide(
                    self.ticket.slide,
                    mpp=self.spec.slide_mpp,
                    max_pixels=self.spec.max_pixels,
                    on_damage=self.spec.on_damage,
                )
            return self._slide

    @property
    def tissue(self) -> TissueMask | None:
        """Where there is something to segment; None: everywhere."""
        if self.spec.tissue == "off" or self.ticket.slide is None:
            return None
        slide = self.slide
        with self._opening:
            if not self._tissue_read:
                self._tissue = (
                    tissue_mask(slide)
                    if self.spec.tissue == "auto"
                    else TissueMask.from_image(self.spec.tissue, slide.levels[0].shape)
                )
                self._tissue_read = True
            return self._tissue

    def engine(self) -> Engine:
        """The network on its device, shared by the jobs of this process that use the same one."""
        from tilepipe.infer import Settings

        settings = Settings.from_json(self.ticket.settings)
        return _engine(self.ticket, self.spec, settings)

    def gate(self) -> float | None:
        """The classification logit of the whole slide, from the first pass; None without one."""
        if not any(name == GATE for name, _ in self.ticket.stages):
            return None
        assert self.label_journal is not None
        with self._opening:
            if self._gate is None:
                records = self.label_journal.recorded(GATE, 0)
                self._gate = max(float(record.facts["logit"]) for record in records.values())
            return self._gate

    def objects(self) -> Objects:
        """The mask's objects."""
        assert self.ticket.label is not None
        assert self.object_journal is not None
        return Objects(self.store, self.ticket.label, self.object_journal)

    def level_reader(self) -> Read:
        """Read boxes of the level that is segmented, with the network's channels."""
        if self.spec.in_place:
            number = slide_level(self.slide, self.ticket.level)
            return spread(partial(self.slide.read, level=number), self.ticket.in_channels)
        return spread(self.store.image(self.ticket.level).read, self.ticket.in_channels)


def spread(read: Read, channels: int) -> Read:
    """Show a single channel to a network that takes several; otherwise read as it is."""

    def reader(box: Box) -> NDArray[Any]:
        pixels = read(box)
        if pixels.shape[0] == 1 and channels > 1:
            return np.broadcast_to(pixels, (channels, *pixels.shape[1:]))
        return pixels

    return reader


def slide_level(slide: Slide, level: int) -> int:
    """Return the slide's own level that equals pyramid level ``level``; SlideError if none does."""
    height, width = slide.levels[0].shape
    for number, found in enumerate(slide.levels):
        wanted = (-(-height // 2**level), -(-width // 2**level))
        if found.shape == wanted:
            return number
    raise SlideError(
        f"{slide.path}: has no level of its own at a downsample of {2**level}, which --in-place "
        f"with --level {level} needs; leave --in-place out"
    )


_contexts: OrderedDict[tuple[str, str, str], Context] = OrderedDict()
_engines: OrderedDict[str, Engine] = OrderedDict()
_lock = threading.Lock()
_engine_lock = threading.Lock()


def _context(ticket: Ticket) -> Context:
    key = (ticket.output, ticket.image_fingerprint, ticket.label_fingerprint)
    with _lock:
        if key not in _contexts:
            _contexts[key] = Context(ticket)
            while len(_contexts) > _MOST_CONTEXTS:
                _contexts.popitem(last=False)
        _contexts.move_to_end(key)
        return _contexts[key]


def forget(output: str) -> None:
    """Close what this process holds of an output."""
    with _lock:
        for key in [key for key in _contexts if key[0] == output]:
            del _contexts[key]


def _engine(ticket: Ticket, spec: JobSpec, settings: Settings) -> Engine:
    from tilepipe.infer import Engine, keep_memory
    from tilepipe.models import load_model

    key = repr((spec.model, spec.weights, spec.classes, spec.base, spec.options, ticket.in_channels,
                ticket.settings))  # fmt: skip
    with _engine_lock:
        if key not in _engines:
            keep_memory()
            model = load_model(
                spec.model,
                weights=spec.weights,
                in_channels=ticket.in_channels,
                classes=spec.classes,
                base=spec.base,
                options=spec.options,
            )
            while len(_engines) >= 2:  # the job that ends and the one that begins
                _engines.popitem(last=False)
            _engines[key] = Engine(
                model,
                plan=settings.plan,
                device=settings.device,
                precision=settings.precision,
                backend=settings.backend,
                batch=settings.batch,
                threads=settings.threads,
                cgm=settings.cgm if settings.cgm == "tile" else "off",
            )
        return _engines[key]


def run_units(ticket: Ticket, stage: int, units: tuple[int, ...]) -> list[Outcome]:
    """Do units of one stage; never raises for a unit's own trouble, which its Outcome tells."""
    name, level = ticket.stages[stage]
    outcomes = []
    for index in units:
        started_s, clock_s = time.time(), time.perf_counter()
        try:
            context = _context(ticket)
            facts = _STAGES[name](context, level, index)
        except (Exception, MemoryError) as error:
            outcomes.append(_failed(index, error))
            continue
        elapsed_s = time.perf_counter() - clock_s
        spans = ((name, started_s, elapsed_s, threading.get_native_id()),) if ticket.trace else ()
        outcomes.append(
            Outcome(index, True, elapsed_s=elapsed_s, worker=_here(), facts=facts, spans=spans)
        )
        _memory.give_back()
    return outcomes


class _Memory:
    """Hands freed memory back to the kernel when much of it has gathered.

    malloc keeps what units and tiles freed, which makes the next ones quick, but lanes of several
    threads tear holes into it that never close: it would grow with the number of units.
    """

    SLACK_BYTES = 32 << 20

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._floor_bytes = 0

    def give_back(self) -> None:
        """Trim the heap if this process holds much more than after the last time."""
        with contextlib.suppress(OSError, AttributeError, ValueError), self._lock:
            if self._resident() > self._floor_bytes + self.SLACK_BYTES:
                ctypes.CDLL(None).malloc_trim(0)
                self._floor_bytes = self._resident()

    @staticmethod
    def _resident() -> int:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


_memory = _Memory()


def _here() -> str:
    from distributed import get_worker

    try:
        address: str = get_worker().address
    except ValueError:  # called directly, by a test
        return f"pid {os.getpid()}"
    return address


def _failed(index: int, error: BaseException) -> Outcome:
    cause: BaseException | None = error
    number = None
    while cause is not None and number is None:
        number = cause.errno if isinstance(cause, OSError) else None
        cause = cause.__cause__
    text = str(error) if isinstance(error, TilepipeError) else f"{type(error).__name__}: {error}"
    return Outcome(
        index,
        False,
        worker=_here(),
        error=text,
        permanent=isinstance(error, SlideError),
        no_space=number in _NO_SPACE and not isinstance(error, SlideError),
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
    before = len(context.slide.damage)
    pixels = context.slide.read(unit.box)
    clock.lap("decode")
    checksum = array.write_unit(unit, pixels)
    clock.lap("ingest-write")
    damage = [tile for tile in context.slide.damage[before:] if _meets(tile.box, unit.box)]
    facts: dict[str, Any] = {"damaged": [str(tile) for tile in damage]} if damage else {}
    context.image_journal.write(INGEST, level, unit, checksum=checksum, facts=facts)
    return {**facts, "seconds": clock.seconds, "px": unit.box.area}


def _meets(one: Box, other: Box) -> bool:
    return one.intersect(other).area > 0


def _reduce(context: Context, level: int, index: int) -> dict[str, Any]:
    image = context.store.image
    clock = _Clock()
    unit, checksum = _reduce_unit(image(level - 1), image(level), index, reduce_image, clock)
    context.image_journal.write(REDUCE, level, unit, checksum=checksum)
    return {"seconds": clock.seconds}


def _label_reduce(context: Context, level: int, index: int) -> dict[str, Any]:
    assert context.ticket.label is not None
    assert context.label_journal is not None
    label = context.store.label(context.ticket.label)
    clock = _Clock()
    unit, checksum = _reduce_unit(
        label.level(level - 1), label.level(level), index, reduce_label, clock
    )
    context.label_journal.write(LABEL_REDUCE, level, unit, checksum=checksum)
    return {"seconds": clock.seconds}


def _object_reduce(context: Context, level: int, index: int) -> dict[str, Any]:
    assert context.ticket.instances is not None
    assert context.object_journal is not None
    label = context.store.label(context.ticket.instances)
    clock = _Clock()
    unit, checksum = _reduce_unit(
        label.level(level - 1), label.level(level), index, reduce_label, clock
    )
    context.object_journal.write(OBJECT_REDUCE, level, unit, checksum=checksum)
    return {"seconds": clock.seconds}


def _paint(context: Context, level: int, index: int) -> dict[str, Any]:
    del level
    assert context.ticket.instances is not None
    return context.objects().paint(context.store.label(context.ticket.instances), index)


def _reduce_unit(
    fine: Level,
    coarse: Level,
    index: int,
    reduce: Callable[[NDArray[Any]], NDArray[Any]],
    clock: _Clock,
) -> tuple[Unit, str]:
    unit = coarse.grid.at(index)
    under = unit.box.enlarged(2).intersect(Box.of_shape(fine.shape))
    pixels = fine.read(under)
    clock.lap("read")
    small = reduce(pixels)
    clock.lap("reduce")
    checksum = coarse.write_unit(unit, small)
    clock.lap("write")
    return unit, checksum


def _gate(context: Context, level: int, index: int) -> dict[str, Any]:
    assert context.ticket.label is not None
    assert context.label_journal is not None
    unit = context.store.label(context.ticket.label).level(0).grid.at(index)
    logit = context.engine().gate(context.level_reader(), unit.box)
    context.label_journal.write(GATE, level, unit, checksum="0" * 16, facts={"logit": logit})
    return {"logit": logit}


def _segment(context: Context, level: int, index: int) -> dict[str, Any]:
    del level
    assert context.ticket.label is not None
    assert context.label_journal is not None
    array = context.store.label(context.ticket.label).level(0)
    unit = array.grid.at(index)
    gate = context.gate()
    if gate is not None and gate <= 0:
        # The classifier finds none of the classes on the whole slide: every map is gated to
        # zero, and the first class wins (UNet 3+ §3.3; test_gate.py).
        ids: NDArray[np.uint8] = np.zeros(unit.box.shape, np.uint8)
        facts: dict[str, Any] = {"gated": True}
    else:
        result = context.engine().segment(
            context.level_reader(), unit.box, skip=_no_tissue(context)
        )
        _give_way(context.ticket.settings)
        ids, facts = result.ids, dict(result.facts)
    seconds: dict[str, float] = facts.pop("seconds", {})
    clock = _Clock()
    checksum = array.write_unit(unit, ids)
    clock.lap("write")
    counts = np.bincount(ids.ravel(), minlength=1)
    facts["counts"] = {str(value): int(n) for value, n in enumerate(counts) if n}
    context.label_journal.write(SEGMENT, 0, unit, checksum=checksum, facts=facts)
    return {**facts, "seconds": {**seconds, **clock.seconds}, "px": unit.box.area}


_lane = threading.local()


def _give_way(settings: dict[str, Any]) -> None:
    """Let the network's threads go before this lane's, where both share the processor.

    A forward waits for its slowest thread: a lane that takes half of one core from it halves it.
    Threads inherit the priority of the one that makes them, so this comes after the first unit,
    when the device's threads stand.
    """
    if settings.get("device") != "cpu" or getattr(_lane, "gave_way", False):
        return
    _lane.gave_way = True
    with contextlib.suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def _no_tissue(context: Context) -> Callable[[Box], bool] | None:
    """Return what tells whether a box of the level, context and all, holds empty glass only."""
    tissue, factor = context.tissue, 2**context.ticket.level
    if tissue is None:
        return None
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
