"""``Context``: what a process holds of a job; slide, store, journals, network, each opened once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tilepipe import buffers
from tilepipe.errors import SlideError, StoreError, TilepipeError, UnfitError
from tilepipe.pipeline.instances import Objects
from tilepipe.pipeline.job import GATE, Ticket
from tilepipe.pipeline.lanes import waiting_bytes
from tilepipe.pipeline.networks import engine_of, network_key
from tilepipe.pipeline.output import is_remote
from tilepipe.pipeline.tissue import read_tissue
from tilepipe.slide import Read, Slide, TissueMask, open_slide, reads_shown
from tilepipe.slide.fingerprint import content
from tilepipe.spec import JobSpec
from tilepipe.store import Journal, Label, RecentUnits, Store, open_store
from tilepipe.tiling import Box, TilePlan

if TYPE_CHECKING:
    from tilepipe.infer import Engine

SEGMENTS_BYTES = 128 << 20
"""Decoded tiles that a slide keeps for units whose tiles overlap."""
_MOST_CONTEXTS = 4


class Context:
    """One job in one process."""

    def __init__(self, ticket: Ticket) -> None:
        self.ticket = ticket
        self.spec = JobSpec.checked(ticket.spec, source="ticket")
        # A server is the same for all workers; what it does not answer now it may the next time.
        with nullcontext() if is_remote(ticket.output) else _needed():
            self.store: Store = open_store(ticket.output, writable=True)
        buffers.keep(waiting_bytes(ticket.recent_bytes))
        self.recent = self.store.recent = RecentUnits(ticket.recent_bytes)
        self.image_journal: Journal = self.store.journal(None, ticket.image_fingerprint)
        self.label_journal: Journal | None = None
        if ticket.label is not None:
            self.label_journal = self.store.journal(ticket.label, ticket.label_fingerprint)
        self.object_journal: Journal | None = None
        if ticket.instances is not None:
            self.object_journal = self.store.journal(ticket.instances, ticket.instances_fingerprint)
        self.users = 0
        """Units that are being done with it."""
        self.is_dropped = False
        self.network = ""
        """Key of the network that its units use."""
        self._opening = threading.Lock()
        self._labels: dict[str, Label] = {}
        self._slide: Slide | None = None
        self._tissue: TissueMask | None = None
        self._gate: float | None = None

    @property
    def slide(self) -> Slide:
        """The input, opened on first use."""
        with self._opening:
            if self._slide is None:
                with _needed():
                    self._slide = self._open_slide()
            return self._slide

    def _open_slide(self) -> Slide:
        assert self.ticket.slide is not None
        slide = open_slide(
            self.ticket.slide,
            mpp=self.spec.slide_mpp,
            max_pixels=self.spec.max_pixels,
            on_damage=self.spec.on_damage,
            cache_bytes=SEGMENTS_BYTES if self.ticket.shared_tiles else 0,
        )
        try:
            _check_same(slide, self.store.read_record().get("input"))
        except BaseException:
            slide.close()
            raise
        return slide

    def close(self) -> None:
        """Close the input; nobody uses it any more, or its file might be another by now."""
        if self._slide is not None:
            self._slide.close()

    def label(self, name: str) -> Label:
        """Return a label of the store, opened on first use."""
        with self._opening:
            if name not in self._labels:
                self._labels[name] = self.store.label(name)
            return self._labels[name]

    @property
    def tissue(self) -> TissueMask | None:
        """Where there is something to segment; None: everywhere."""
        if self.spec.tissue == "off":
            return None
        assert self.ticket.label is not None
        with self._opening:
            if self._tissue is None:
                self._tissue = read_tissue(self.store, self.ticket.label)
            return self._tissue

    def warm(self) -> None:
        """Have the network built while the first units are still being read.

        What goes wrong here goes wrong again, and is told, at the first unit.
        """
        if self.ticket.label is None:
            return
        with suppress(TilepipeError, OSError, RuntimeError, MemoryError):
            self.engine().warm(self.store.dtype)

    def engine(self) -> Engine:
        """The network on its device, shared by the jobs of this process that use the same one."""
        from tilepipe.infer import Settings
        from tilepipe.infer.backends import device_here

        settings = Settings.from_json(self.ticket.settings)
        with _needed():
            device = device_here(settings.device, self.spec.device)
            self.network = network_key(self.spec, self.ticket, device)
            return engine_of(
                self.network, self.spec, self.ticket, settings, device, networks_in_use
            )

    def gate(self) -> float | None:
        """By how much the first pass says that something is on the slide; None without one.

        Raises StoreError where not all that it recorded is seen here.
        """
        if not any(name == GATE for name, _ in self.ticket.stages):
            return None
        assert self.ticket.label is not None
        assert self.label_journal is not None
        units = self.label(self.ticket.label).level(0).grid
        with self._opening:
            if self._gate is None:
                facts = [r.facts for r in self.label_journal.recorded(GATE, 0).values()]
                if len(facts) != len(units):
                    # A file system of several machines may list a folder as it was a moment ago;
                    # the largest of some would be another gate.
                    raise StoreError(
                        f"{self.ticket.output}: of {len(units)} units whose gate was measured "
                        f"{len(facts)} are seen{on_worker()}; give the same command again"
                    )
                nothing, something = (
                    max(float(one[key]) for one in facts) for key in ("nothing", "something")
                )
                self._gate = something - nothing
            return self._gate

    def objects(self) -> Objects:
        """The mask's objects."""
        assert self.ticket.label is not None
        assert self.object_journal is not None
        return Objects(self.store, self.ticket.label, self.object_journal)

    def footprint(self, box: Box) -> Box:
        """Return the px of the level, inside it, that a unit of the mask depends on."""
        return TilePlan.from_json(self.ticket.settings["plan"]).footprint(box)

    def level_reader(self) -> Read:
        """Read boxes of the level that is segmented, with the network's channels."""
        if self.spec.in_place:
            number = slide_level(self.slide, self.ticket.level)
            return reads_shown(partial(self.slide.read, level=number), self.ticket.in_channels)
        return reads_shown(self.store.image(self.ticket.level).read, self.ticket.in_channels)


@contextmanager
def _needed() -> Iterator[None]:
    """Tell a process that lacks what the job needs from a unit that cannot be done."""
    try:
        yield
    except (TilepipeError, OSError) as error:
        raise UnfitError(str(error)) from error


def on_worker() -> str:
    """Say on which worker of a cluster this is; nothing for a thread of the job's own process."""
    address = worker_address() or ""
    return f" (on the worker {address})" if address.startswith(("tcp", "tls")) else ""


def worker_address() -> str | None:
    """Return the address of the worker that this thread is of; None outside one."""
    from distributed import get_worker

    try:
        address: str = get_worker().address
    except ValueError:
        return None
    return address


def _check_same(slide: Slide, planned: Any) -> None:
    """Raise SlideError if this is not the input that the job was planned for.

    Its time may differ: each machine may have a copy of its own.
    """
    if not isinstance(planned, dict):
        return
    facts = Path(slide.path).stat()
    looked = (planned.get("size"), planned.get("mtime_ns"))
    # Of a set of files the others may be those of another.
    if looked == (facts.st_size, facts.st_mtime_ns) and "parts" not in planned:
        return
    if content(planned) != content(slide.fingerprint()):
        raise SlideError(
            f"{slide.path}: is another file than the one that this job was planned for; restore "
            "that and run the same command again, or begin anew with --overwrite"
        )


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


_contexts: OrderedDict[tuple[str | None, ...], Context] = OrderedDict()
_lock = threading.Lock()


@contextmanager
def context_of(ticket: Ticket) -> Iterator[Context]:
    """Lend what this process holds of a job, opened when it is first asked for."""
    # A worker of a cluster outlives jobs: the next may want more of the same mask, its objects.
    key = (ticket.output, ticket.slide, ticket.image_fingerprint, ticket.label_fingerprint,
           ticket.instances_fingerprint)  # fmt: skip
    with _lock:
        if key not in _contexts:
            for other in _contexts.values():  # a slide that ends leaves its room to the next
                other.recent.resize(0)
            context = _contexts[key] = Context(ticket)
            while len(_contexts) > _MOST_CONTEXTS:
                _drop(next(iter(_contexts)))
            if ticket.warms:
                # No daemon, as the lanes are that start it: it is in torch's C++ while a job that
                # fails at once, or needs no network, ends the process, and would abort that.
                threading.Thread(target=context.warm, name="tilepipe-warm", daemon=False).start()
        _contexts.move_to_end(key)
        context = _contexts[key]
        context.users += 1
    try:
        yield context
    finally:
        with _lock:
            context.users -= 1
            if context.is_dropped and not context.users:
                context.close()


def networks_in_use() -> set[str]:
    """Return the keys of the networks of all that this process holds of jobs."""
    with _lock:
        return {context.network for context in _contexts.values()}


def forget(output: str) -> None:
    """Let go of what this process holds of an output; a unit that is under way still ends."""
    with _lock:
        for key in [key for key in _contexts if key[0] == output]:
            _drop(key)


def _drop(key: tuple[str | None, ...]) -> None:
    context = _contexts.pop(key)
    context.is_dropped = True
    if not context.users:
        context.close()
