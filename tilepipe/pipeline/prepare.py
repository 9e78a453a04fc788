"""``prepare``: from a slide and settings to a job that is planned, checked and ready to run."""

from __future__ import annotations

import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tilepipe.errors import MismatchError, PlanError, SlideError
from tilepipe.pipeline.cells import Rule
from tilepipe.pipeline.events import Note, OnEvent, Warned
from tilepipe.pipeline.instances import forget_instances, instances_of, open_instances
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
    fingerprint,
)
from tilepipe.pipeline.output import (
    exclusive,
    is_begun,
    is_remote,
    open_image,
    running,
    unit_for,
    versions,
)
from tilepipe.pipeline.stages import Layout, build_stages
from tilepipe.pipeline.worker import Read, forget, slide_level, spread
from tilepipe.schedule import Stage
from tilepipe.slide import Slide, open_slide
from tilepipe.spec import JobSpec
from tilepipe.store import Journal, Store, open_files, open_store, what_is_at
from tilepipe.tiling import Shape, round_up
from tilepipe.tiling.grid import level_extents

if TYPE_CHECKING:
    from tilepipe.infer import Settings
    from tilepipe.models import Model


@dataclass(frozen=True, slots=True)
class Source:
    """What is to be segmented, before anything is planned."""

    slide: Slide | None
    store: Store | None
    """An existing OME-Zarr that is segmented without being copied."""
    output: str

    @property
    def name(self) -> str:
        """How the user knows it."""
        return self.slide.path if self.slide is not None else self.output

    @property
    def extents(self) -> tuple[Shape, ...]:
        """Extents of the pyramid's levels."""
        if self.store is not None:
            return tuple(self.store.image(k).shape for k in range(self.store.n_levels))
        assert self.slide is not None
        return level_extents(self.slide.levels[0].shape)

    @property
    def mpp(self) -> tuple[float, float] | None:
        """µm per level-0 px (y, x)."""
        return self.store.mpp if self.store is not None else self._slide.mpp

    @property
    def channels(self) -> int:
        """Channels of the image."""
        return self.store.channels if self.store is not None else self._slide.channels

    @property
    def dtype(self) -> Any:
        """Dtype of the image."""
        return self.store.dtype if self.store is not None else self._slide.dtype

    @property
    def _slide(self) -> Slide:
        assert self.slide is not None
        return self.slide


@dataclass(frozen=True, slots=True)
class Segmentation:
    """The network and how it will be run."""

    model: Model
    settings: Settings
    name: str
    level: int


@dataclass(frozen=True, slots=True)
class Job:
    """A job ready to run: its output exists and belongs to it."""

    source: Source
    ticket: Ticket
    stages: list[Stage]
    recorded: dict[int, Iterable[int]]
    store: Store
    segmentation: Segmentation | None
    rejected: tuple[str, ...]
    """Journal records that could not be believed; their units are done again."""
    held: ExitStack
    """Locks on the output; close it when the job is over."""


def open_source(slide: str, output: str | None, spec: JobSpec) -> Source:
    """Open the input; an OME-Zarr without another output is segmented in place."""
    if (output is None or _same(slide, output)) and what_is_at(open_files(slide)) in (
        "ours",
        "ome-zarr",
    ):
        return Source(None, open_store(slide, writable=True), slide)
    opened = open_slide(
        slide, mpp=spec.slide_mpp, max_pixels=spec.max_pixels, on_damage=spec.on_damage
    )
    return Source(opened, None, output or default_output(slide))


def default_output(slide: str) -> str:
    """``slide.ome.tif`` → ``slide.zarr`` in the current folder."""
    name = Path(slide.rstrip("/")).name
    for suffix in (".ome.tiff", ".ome.tif", ".ome.zarr"):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)] + ".zarr"
    return f"{Path(name).stem}.zarr"


def _same(one: str, other: str) -> bool:
    if is_remote(one) or is_remote(other):
        return one.rstrip("/") == other.rstrip("/")
    return Path(one).resolve() == Path(other).resolve()


def resolve_level(
    extents: tuple[Shape, ...], mpp: tuple[float, float] | None, spec: JobSpec
) -> int:
    """Return the image level to segment, from ``--level`` or ``--mpp``; PlanError lists them."""
    listed = "; ".join(
        f"level {k}: {height} x {width} px"
        + (f", {mpp[0] * 2**k:.4g} µm/px" if mpp is not None else "")
        for k, (height, width) in enumerate(extents)
    )
    if spec.level is not None and spec.mpp is not None:
        raise PlanError("--level and --mpp both say where to segment; give one of them")
    if spec.level is not None:
        if spec.level >= len(extents):
            raise PlanError(f"there is no level {spec.level}; the pyramid has {listed}")
        return spec.level
    if spec.mpp is None:
        return 0
    if mpp is None:
        raise PlanError(
            f"--mpp {spec.mpp} needs the pixel size of the slide, which its tags do not say; "
            "pass --slide-mpp, e.g. --slide-mpp 0.25, or choose with --level"
        )
    best = min(range(len(extents)), key=lambda k: abs(mpp[0] * 2**k / spec.mpp - 1))
    if abs(mpp[0] * 2**best / spec.mpp - 1) > 0.1:
        raise PlanError(f"no level is within 10 % of --mpp {spec.mpp}; the pyramid has {listed}")
    return best


def choose(source: Source, spec: JobSpec, on_event: OnEvent) -> Segmentation:
    """Load the network and plan how it covers the level; nothing is written."""
    from tilepipe.infer import Settings, choose_settings
    from tilepipe.models import load_model

    channels = source.channels
    model = load_model(
        spec.model,
        weights=spec.weights,
        # Weights of a file say themselves what they take; random ones are made to fit.
        in_channels=channels if (spec.weights or "").startswith("random:") else None,
        classes=spec.classes,
        base=spec.base,
        options=spec.options,
    )
    if model.in_channels != channels:
        if channels != 1:
            raise PlanError(
                f"{source.name}: has {channels} channels, but {spec.model} ({model.source}) takes "
                f"{model.in_channels}; use weights trained on {channels} channels"
            )
        on_event(Note(source.name, f"one channel, shown to all {model.in_channels} of the network"))
    extents = source.extents
    level = resolve_level(extents, source.mpp, spec)
    if source.mpp is not None and model.mpp is not None:
        here = source.mpp[0] * 2**level
        if not 0.5 < here / model.mpp < 2:
            on_event(
                Warned(
                    source.name,
                    f"level {level} has {here:.3g} µm/px, the weights were made at {model.mpp:.3g}",
                )
            )
    name = spec.name or model.name
    recorded = _recorded_settings(source, name, spec, model, level)
    if recorded is not None:
        return Segmentation(model, Settings.from_json(recorded), name, level)
    if source.store is not None:
        unit = spec.unit or min(2048, round_up(max(extents[level]), 512))
        read: Read | None = source.store.image(level).read
    else:
        assert source.slide is not None
        unit = unit_for(source.slide, spec.unit)
        slide = source.slide
        if spec.in_place:
            number = slide_level(slide, level)
            read = partial(slide.read, level=number)
        else:
            # Places for the precision guard; coarser levels do not exist before ingest.
            read = slide.read if level == 0 else None
    alignment = model.locality.alignment_px
    if spec.unit is None:
        unit = round_up(unit, alignment)
    settings = choose_settings(
        model,
        extent=extents[level],
        unit_px=unit,
        spec=spec,
        channels=model.in_channels,
        dtype=source.dtype,
        read=spread(read, model.in_channels) if read is not None else None,
        workers=spec.workers or 1,
    )
    for note in settings.notes:
        on_event(Note(source.name, note))
    return Segmentation(model, settings, name, level)


def _recorded_settings(
    source: Source, name: str, spec: JobSpec, model: Model, level: int
) -> dict[str, Any] | None:
    """Settings of the run that is taken up again: measured choices must not change half-way."""
    if spec.overwrite:
        return None
    try:
        store = source.store or open_store(source.output)
        record = store.label(name).read_record()
    except OSError:
        return None
    if record.get("asked") != asked(spec, model, level):
        return None
    settings = record.get("settings")
    return settings if isinstance(settings, dict) else None


def asked(spec: JobSpec, model: Model, level: int) -> dict[str, Any]:
    """Return what the user asked for that shapes the mask; equal requests resume each other."""
    keys = ("model", "classes", "base", "options", "precision", "backend", "tolerance", "tile",
            "batch", "halo", "exact", "cgm", "unit", "tissue", "in_place")  # fmt: skip
    values = spec.to_json()
    return {**{key: values[key] for key in keys}, "weights": model.sha256, "level": level}


def prepare(
    slide: str,
    output: str | None,
    spec: JobSpec,
    *,
    segment: bool = True,
    trace: bool = False,
    on_event: OnEvent,
) -> Job:
    """Plan a job, create or take up its output, and find what is done already.

    Raises SlideError, PlanError, ModelError before anything is written; MismatchError or
    StoreError if the output belongs to another job or cannot be written.
    """
    source = open_source(slide, output, spec)
    if source.slide is not None:
        for note in source.slide.notes:
            on_event(Note(source.name, note))
    chosen = choose(source, spec, on_event) if segment else None
    if source.store is None and spec.in_place and chosen is None:
        raise PlanError("--in-place copies no image: there is nothing to ingest")
    held = ExitStack()
    try:
        with exclusive(source.output, "preparation", wait=True):
            sole = held.enter_context(running(source.output))
            what = f"label {chosen.name} {spec.part or ''}" if chosen is not None else "the image"
            held.enter_context(exclusive(source.output, what.rstrip()))
            return _open_job(source, spec, chosen, held, sole=sole, trace=trace, on_event=on_event)
    except BaseException:
        held.close()
        raise


def _open_job(
    source: Source,
    spec: JobSpec,
    chosen: Segmentation | None,
    held: ExitStack,
    *,
    sole: bool,
    trace: bool,
    on_event: OnEvent,
) -> Job:
    if source.slide is not None:
        image = open_image(source.slide, source.output, spec, overwrite=spec.overwrite)
        store, mark, unit_px = image.store, image.fingerprint, image.unit_px
        copied = not image.complete and not spec.in_place
    else:
        assert source.store is not None
        store, mark = source.store, fingerprint(store=source.output, extent=source.extents)
        unit_px, copied = 0, False
    if chosen is not None and copied and chosen.settings.plan.unit_px != unit_px:
        raise MismatchError(
            f"{source.output}: its image is half made in units of {unit_px} px, but the mask asks "
            f"for {chosen.settings.plan.unit_px}; use --unit {unit_px}"
        )
    forget(source.output)
    if sole:
        store.clean_partial()
    extents = source.extents
    layout = Layout(
        image=extents if copied else (),
        label=_halved(extents[chosen.level], len(extents)) if chosen is not None else (),
        unit_px=chosen.settings.plan.unit_px if chosen is not None else unit_px,
        level=chosen.level if chosen is not None else 0,
        plan=chosen.settings.plan if chosen is not None else None,
        gate=chosen is not None and spec.cgm == "slide" and chosen.model.has_gate,
        objects_halo_px=Rule.of_classes(chosen.model.classes).halo_px
        if chosen is not None and spec.instances
        else None,
    )
    stages = build_stages(layout)
    label_mark = ""
    if chosen is not None:
        label_mark = _open_label(source, store, spec, chosen, mark)
    objects: str | None = None
    object_mark = ""
    if chosen is not None and spec.instances:
        objects = instances_of(chosen.name)
        object_mark = open_instances(
            store,
            store.label(chosen.name),
            mask_fingerprint=label_mark,
            overwrite=spec.overwrite,
            versions=versions(),
        )
    rejected: list[str] = []
    recorded: dict[int, Iterable[int]] = {}
    image_journal = store.journal(None, mark)
    label_journal = store.journal(chosen.name, label_mark) if chosen is not None else None
    object_journal = store.journal(objects, object_mark) if objects is not None else None
    for number, stage in enumerate(stages):
        journal: Journal | None = label_journal
        if stage.name in (INGEST, REDUCE):
            journal = image_journal
        elif stage.name in (FIND, JOIN, PAINT, OBJECT_REDUCE):
            journal = object_journal
        assert journal is not None
        rows, columns = stage.grid.shape
        recorded[number] = [
            stage.grid.index(iy, ix)
            for iy, ix in journal.recorded(stage.name, stage.level)
            if iy < rows and ix < columns
        ]
    for journal in (image_journal, label_journal, object_journal):
        rejected += journal.rejected if journal is not None else []
    ticket = Ticket(
        slide=_absolute(source.slide.path) if source.slide is not None else None,
        output=_absolute(source.output),
        stages=tuple((stage.name, stage.level) for stage in stages),
        image_fingerprint=mark,
        label_fingerprint=label_mark,
        label=chosen.name if chosen is not None else None,
        level=layout.level,
        spec=_portable(spec).to_json(),
        settings=chosen.settings.to_json() if chosen is not None else {},
        in_channels=chosen.model.in_channels if chosen is not None else source.channels,
        trace=trace,
        instances=objects,
        instances_fingerprint=object_mark,
    )
    for reason in rejected:
        on_event(Warned(source.name, f"journal record not believed, unit done again: {reason}"))
    return Job(source, ticket, stages, recorded, store, chosen, tuple(rejected), held)


def _halved(extent: Shape, count: int) -> tuple[Shape, ...]:
    """Extents of a label pyramid: as many levels as the image, from the segmented one down.

    A reader of OME-Zarr 0.5 refuses a label with fewer levels than its image.
    """
    extents = [extent]
    while len(extents) < count:
        y, x = extents[-1]
        extents.append((-(-y // 2), -(-x // 2)))
    return tuple(extents)


def _absolute(location: str) -> str:
    return location if is_remote(location) else str(Path(location).absolute())


def _portable(spec: JobSpec) -> JobSpec:
    """Make the paths in the settings absolute: a worker may stand in another folder."""
    changes: dict[str, Any] = {}
    if spec.weights is not None and not spec.weights.startswith("random:"):
        changes["weights"] = str(Path(spec.weights).absolute())
    if spec.tissue not in ("auto", "off"):
        changes["tissue"] = str(Path(spec.tissue).absolute())
    if Path(spec.model).is_file():
        changes["model"] = str(Path(spec.model).absolute())
    return spec.replace(**changes) if changes else spec


def _open_label(
    source: Source, store: Store, spec: JobSpec, chosen: Segmentation, image_mark: str
) -> str:
    """Create the label or take up the one that is there; return its fingerprint."""
    wanted = asked(spec, chosen.model, chosen.level)
    mark = fingerprint(image=image_mark, asked=wanted, settings=chosen.settings.to_json())
    name = chosen.name
    # Stopped between the label's creation and its first record: it begins anew.
    begun = name in store.labels and is_begun(store, name)
    if name in store.labels and not spec.overwrite and not begun:
        record = store.label(name).read_record()
        if record.get("fingerprint") == mark:
            return mark
        then = record.get("asked")
        then = then if isinstance(then, dict) else {}
        changed = sorted(key for key in wanted if then.get(key) != wanted[key])
        told = ", ".join(f"{key} {_short(then.get(key))} then, {_short(wanted[key])} now"
                         for key in changed)  # fmt: skip
        raise MismatchError(
            f"{source.output}: the label {name!r} is of another job "
            f"({told or 'the plan or the input differ'}); make it anew with --overwrite, or keep "
            "both with another --name"
        )
    forget_instances(store, name)
    label = store.create_label(
        name,
        classes=chosen.model.classes,
        level=chosen.level,
        unit_px=chosen.settings.plan.unit_px,
        overwrite=spec.overwrite or begun,
    )
    label.write_record(
        {
            "fingerprint": mark,
            "asked": wanted,
            "spec": spec.replace(overwrite=False, part=None).to_json(),
            "settings": chosen.settings.to_json(),
            "plan": chosen.settings.plan.to_json(),
            "model": {
                "name": chosen.model.name,
                "arguments": chosen.model.arguments,
                "sha256": chosen.model.sha256,
                "source": chosen.model.source,
                "locality": chosen.model.locality.kind,
                "context_px": chosen.model.locality.context_px,
            },
            "versions": versions(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "state": "running",
        }
    )
    return mark


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] + "…" if len(text) > 40 else text


_STAGE_WORDS = {INGEST: "ingest", REDUCE: "image pyramid", GATE: "gate", SEGMENT: "segment",
                LABEL_REDUCE: "mask pyramid", FIND: "find objects", JOIN: "join objects",
                PAINT: "instances", OBJECT_REDUCE: "instance pyramid"}  # fmt: skip


def stage_word(stage: Stage) -> str:
    """Name a stage as the user sees it; all levels of a pyramid have one word."""
    return _STAGE_WORDS[stage.name]


__all__ = ["Job", "Segmentation", "SlideError", "Source", "choose", "open_source", "prepare"]
