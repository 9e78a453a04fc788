"""``prepare``: from a slide and settings to a job that is planned, checked and ready to run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace

from tilepipe.errors import MismatchError, ModelError, PlanError, StoreError, argument
from tilepipe.pipeline.cells import Rule
from tilepipe.pipeline.choice import Segmentation, choose
from tilepipe.pipeline.context import forget
from tilepipe.pipeline.events import Note, OnEvent, Warned
from tilepipe.pipeline.instances import instances_of, open_instances
from tilepipe.pipeline.job import (
    FIND,
    INGEST,
    JOIN,
    LABEL_REDUCE,
    OBJECT_REDUCE,
    PAINT,
    REDUCE,
    SEGMENT,
    Ticket,
    fingerprint,
    is_whole,
)
from tilepipe.pipeline.lanes import lanes_of, recent_bytes, slack_bytes
from tilepipe.pipeline.mask import open_mask
from tilepipe.pipeline.output import exclusive, open_image, running
from tilepipe.pipeline.source import Source, absolute, open_source, portable
from tilepipe.pipeline.stages import Layout, build_stages
from tilepipe.pipeline.stored import Lost, content_of, lost_of_label, lost_units
from tilepipe.pipeline.tissue import Find, keep_tissue, look_for_tissue, tissue_share
from tilepipe.schedule import Stage
from tilepipe.spec import JobSpec
from tilepipe.store import Journal, Store, leased
from tilepipe.store.layout import downsampled


@dataclass(frozen=True, slots=True)
class Job:
    """A job ready to run: its output exists and belongs to it."""

    source: Source
    ticket: Ticket
    stages: list[Stage]
    recorded: dict[int, Iterable[int]]
    store: Store
    segmentation: Segmentation | None
    held: ExitStack
    """The open input and the locks on the output; close it when the job is over."""


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
    held = ExitStack()
    held.callback(source.close)
    try:
        return _prepare(source, spec, held, segment=segment, trace=trace, on_event=on_event)
    except BaseException:
        held.close()
        raise


def _prepare(
    source: Source, spec: JobSpec, held: ExitStack, *, segment: bool, trace: bool, on_event: OnEvent
) -> Job:
    if source.store is not None:
        if not segment:
            raise PlanError(
                f"{source.output}: is an OME-Zarr already, there is nothing to ingest; to copy it, "
                "name another place with -o"
            )
        spec = spec.replace(in_place=False)  # nothing is copied, and there is no slide to read
    for note in source.notes:
        on_event(Note(source.name, note))
    tissue = look_for_tissue(source, spec, on_event) if segment else None
    chosen = choose(source, spec, on_event) if segment else None
    if source.store is None and spec.in_place and chosen is None:
        raise PlanError("--in-place copies no image: there is nothing to ingest")
    with exclusive(source.output, "preparation", wait=True), ExitStack() as lease:
        check_turn = _hold_for_parts(lease, source, on_event) if spec.part else _always
        sole = held.enter_context(running(source.output))
        what = f"label {chosen.name} {spec.part or ''}" if chosen is not None else "the image"
        held.enter_context(exclusive(source.output, what.rstrip()))
        alone = chosen is None or held.enter_context(running(source.output, chosen.name))
        return _open_job(
            source, spec, chosen, tissue, held,
            sole=sole, alone=alone, check_turn=check_turn, trace=trace, on_event=on_event,
        )  # fmt: skip


def _always() -> None:
    """Let a job that is no part create what it needs: no other machine waits for its turn."""


def _hold_for_parts(lease: ExitStack, source: Source, on_event: OnEvent) -> Callable[[], None]:
    """Hold the output against the parts of other machines, which may begin at the same moment.

    Returns what raises StoreError if another has taken it over meanwhile.
    """

    def tell(who: str) -> None:
        on_event(Note(source.name, f"waits for {who}, which prepares {source.output}"))

    try:
        return lease.enter_context(leased(source.output, on_wait=tell))
    except StoreError as error:
        on_event(Warned(source.name, "parts on other machines are not kept out while the output "
                        f"is prepared; begin one of them before the others: {error}"))  # fmt: skip
        return _always


def _open_job(
    source: Source,
    spec: JobSpec,
    chosen: Segmentation | None,
    tissue: Find | None,
    held: ExitStack,
    *,
    sole: bool,
    alone: bool,
    check_turn: Callable[[], None],
    trace: bool,
    on_event: OnEvent,
) -> Job:
    lost: Lost = {}
    if source.slide is not None:
        device = chosen.settings.device if chosen is not None else "cpu"
        image = open_image(
            source.slide, source.output, spec,
            device=device, overwrite=spec.overwrite, sole=sole, check_turn=check_turn,
        )  # fmt: skip
        store, mark, unit_px = image.store, image.fingerprint, image.unit_px
        lost = lost_units(store, mark)
        copied = not spec.in_place and (not image.complete or bool(lost))
    else:
        assert source.store is not None
        store, mark = source.store, fingerprint(**content_of(source.store))
        unit_px, copied = 0, False
    _warn_of(lost, "the image", source, on_event)
    if chosen is not None and copied and chosen.settings.plan.unit_px != unit_px:
        raise MismatchError(
            f"{source.output}: its image is to be completed in units of {unit_px} px, but the mask "
            f"asks for {chosen.settings.plan.unit_px}; complete it first with `tilepipe ingest "
            f"{argument(source.name)} -o {argument(source.output)}`, then give this command again"
        )
    forget(absolute(source.output))  # as tickets, and so contexts, call it
    if sole:
        store.clean_partial()
    extents = source.extents
    tile = source.slide.levels[0].tile if source.slide is not None else None
    unit_px = chosen.settings.plan.unit_px if chosen is not None else unit_px
    lanes = lanes_of(spec, chosen.settings if chosen is not None else None)
    in_strips = source.slide is not None and tile is None
    layout = Layout(
        image=extents if copied else (),
        # As many levels as the image: a reader of OME-Zarr 0.5 refuses a label with fewer.
        label=downsampled(extents[chosen.level], len(extents)) if chosen is not None else (),
        unit_px=unit_px,
        level=chosen.level if chosen is not None else 0,
        plan=chosen.settings.plan if chosen is not None else None,
        gate=chosen is not None and spec.cgm == "slide" and chosen.model.has_gate,
        # Strips lie under a whole row of units: those go in reading order.
        band=0
        if in_strips
        else _band(source, unit_px, recent_bytes(spec, lanes), _channels(spec, chosen)),
        objects_halo_px=Rule.of_classes(chosen.model.classes).halo_px
        if chosen is not None and spec.instances
        else None,
    )
    label_mark = ""
    if chosen is not None:
        label_mark, begins = open_mask(
            source, store, spec, chosen, mark, sole=alone, check_turn=check_turn
        )
        if tissue is not None:
            mask = keep_tissue(store, chosen.name, tissue, anew=begins)
            on_event(Note(source.name, mask.note))
            if not mask.mask.any():
                on_event(Warned(source.name, f"{mask.note}: shows no tissue, so nothing at all is "
                                "segmented; look at the mask, or leave --tissue out"))  # fmt: skip
            share = tissue_share(
                mask, plan=chosen.settings.plan, downsample=source.downsample(chosen.level)
            )
            layout = replace(layout, share=share)
    stages = build_stages(layout)
    objects: str | None = None
    object_mark = ""
    if chosen is not None and spec.instances:
        objects = instances_of(chosen.name)
        object_mark = open_instances(
            store,
            store.label(chosen.name),
            mask_fingerprint=label_mark,
            overwrite=spec.overwrite and begins,
            check_turn=check_turn,
        )
    recorded: dict[int, Iterable[int]] = {}
    gone: dict[str, Lost] = {INGEST: lost, REDUCE: lost}
    image_journal = store.journal(None, mark)
    label_journal = store.journal(chosen.name, label_mark) if chosen is not None else None
    object_journal = store.journal(objects, object_mark) if objects is not None else None
    for name, kept, made_by in (
        (chosen.name if chosen is not None else None, label_journal, (SEGMENT, LABEL_REDUCE)),
        (objects, object_journal, (PAINT, OBJECT_REDUCE)),
    ):
        if name is not None and kept is not None:
            missing = lost_of_label(store.label(name), kept, made_by)
            gone.update(dict.fromkeys(made_by, missing))
            _warn_of(missing, f"label {name}", source, on_event)
    for number, stage in enumerate(stages):
        journal: Journal | None = label_journal
        if stage.name in (INGEST, REDUCE):
            journal = image_journal
        elif stage.name in (FIND, JOIN, PAINT, OBJECT_REDUCE):
            journal = object_journal
        assert journal is not None
        if stage.name in (FIND, JOIN) and gone.get(PAINT, {}).get(0):
            recorded[number] = []  # what they found is kept until all objects are painted only
            continue
        rows, columns = stage.grid.shape
        recorded[number] = [
            stage.grid.index(iy, ix)
            for (iy, ix), record in journal.recorded(stage.name, stage.level).items()
            if iy < rows
            and ix < columns
            and (iy, ix) not in gone.get(stage.name, {}).get(stage.level, ())
            and is_whole(
                record.facts,
                probabilities=spec.probabilities and stage.name in (SEGMENT, LABEL_REDUCE),
            )
        ]
    warms = any(
        stage.name == SEGMENT and len(list(recorded[number])) < len(stage.grid)
        for number, stage in enumerate(stages)
    )
    if warms and chosen is not None and spec.scheduler == "local":
        from tilepipe.infer.backends import device_here

        try:
            device_here(chosen.settings.device, spec.device)
        except ModelError as error:  # told once, not by every unit
            raise ModelError(f"{source.output}: {error}") from error
    ticket = Ticket(
        slide=absolute(source.slide.path) if source.slide is not None else None,
        output=absolute(source.output),
        stages=tuple((stage.name, stage.level) for stage in stages),
        image_fingerprint=mark,
        label_fingerprint=label_mark,
        label=chosen.name if chosen is not None else None,
        level=layout.level,
        spec=portable(spec).to_json(),
        settings=chosen.settings.to_json() if chosen is not None else {},
        in_channels=chosen.model.in_channels if chosen is not None else source.channels,
        network=chosen.model.identity if chosen is not None else "",
        trace=trace,
        instances=objects,
        instances_fingerprint=object_mark,
        slack_bytes=slack_bytes(spec, chosen.forward_bytes if chosen is not None else 0, lanes),
        recent_bytes=recent_bytes(spec, lanes),
        shared_tiles=spec.in_place
        or tile is None
        or any(layout.unit_px % px or px > layout.unit_px for px in tile),
        warms=warms,
    )
    for journal in filter(None, (image_journal, label_journal, object_journal)):
        for reason in journal.rejected:
            on_event(Warned(source.name, f"journal record not believed, unit done again: {reason}"))
    return Job(source, ticket, stages, recorded, store, chosen, held)


def _warn_of(lost: Lost, what: str, source: Source, on_event: OnEvent) -> None:
    if count := sum(map(len, lost.values())):
        on_event(Warned(source.name, f"{count} units of {what} in {source.output} were written "
                        "and are gone; they are made again"))  # fmt: skip


def _channels(spec: JobSpec, chosen: Segmentation | None) -> int:
    """Count the channels of the probabilities that a job makes."""
    return len(chosen.model.classes) - 1 if chosen is not None and spec.probabilities else 0


def _band(source: Source, unit_px: int, kept_bytes: int, channels: int) -> int:
    """Columns of units whose neighbours are still in memory when they are needed: an even number.

    A row of the band waits for the one below it and is seen by that, too: three rows are held, and
    what was read ahead. Masks, and ``channels`` of probabilities, lie beside them.
    """
    unit_bytes = (source.channels * source.dtype.itemsize + 1 + channels) * unit_px**2
    return max(2, (kept_bytes // unit_bytes - 3) // 3 // 2 * 2)
