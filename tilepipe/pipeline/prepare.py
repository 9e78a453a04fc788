"""``prepare``: from a slide and settings to a job that is planned, checked and ready to run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace

from tilepipe.errors import MismatchError, ModelError, PlanError, StoreError, argument
from tilepipe.pipeline.cells import Rule
from tilepipe.pipeline.choice import Segmentation, choose
from tilepipe.pipeline.context import forget
from tilepipe.pipeline.events import Note, OnEvent, Warned
from tilepipe.pipeline.instances import instances_of, open_instances
from tilepipe.pipeline.job import INGEST, REDUCE, SEGMENT, Ticket, fingerprint
from tilepipe.pipeline.lanes import lanes_of, recent_bytes, slack_bytes
from tilepipe.pipeline.mask import open_mask
from tilepipe.pipeline.output import exclusive, open_image, running
from tilepipe.pipeline.recorded import OF_MASK, OF_PAINTED, Journals, recorded_units
from tilepipe.pipeline.source import Source, absolute, open_source, portable
from tilepipe.pipeline.stages import Layout, build_stages
from tilepipe.pipeline.stored import Lost, content_of, lost_of_label, lost_units
from tilepipe.pipeline.tissue import Find, keep_tissue, look_for_tissue, tissue_share
from tilepipe.schedule import Stage
from tilepipe.spec import JobSpec
from tilepipe.store import Store, leased
from tilepipe.store.layout import downsampled
from tilepipe.tiling import Box


@dataclass(frozen=True, slots=True)
class Job:
    """A job ready to run: its output exists and belongs to it."""

    source: Source
    ticket: Ticket
    stages: list[Stage]
    recorded: dict[int, list[int]]
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
    begun = _begin(source, spec, chosen, sole=sole, check_turn=check_turn, on_event=on_event)
    store = begun.store
    forget(absolute(source.output))  # as tickets, and so contexts, call it
    if sole:
        store.clean_partial()
    lanes = lanes_of(spec, chosen.settings if chosen is not None else None)
    layout = _layout_of(source, spec, chosen, begun, lanes)
    journals = Journals(store.journal(None, begun.mark))
    objects: str | None = None
    gone: dict[str, Lost] = {INGEST: begun.lost, REDUCE: begun.lost}
    if chosen is not None:
        label_mark, begins = open_mask(
            source, store, spec, chosen, begun.mark, sole=alone, check_turn=check_turn
        )
        journals = replace(journals, mask=store.journal(chosen.name, label_mark))
        if tissue is not None:
            share = _share_of_tissue(source, store, chosen, tissue, anew=begins, on_event=on_event)
            layout = replace(layout, share=share)
        if spec.instances:
            objects = instances_of(chosen.name)
            object_mark = open_instances(
                store,
                store.label(chosen.name),
                mask_fingerprint=label_mark,
                overwrite=spec.overwrite and begins,
                check_turn=check_turn,
            )
            journals = replace(journals, objects=store.journal(objects, object_mark))
        for label, made_by in ((chosen.name, OF_MASK), (objects, OF_PAINTED)):
            if label is not None:
                lost = lost_of_label(store.label(label), journals.of(made_by[0]), made_by)
                gone.update(dict.fromkeys(made_by, lost))
                _warn_of(lost, f"label {label}", source, on_event)
    stages = build_stages(layout)
    recorded = recorded_units(stages, journals, gone, probabilities=spec.probabilities)
    warms = chosen is not None and any(
        stage.name == SEGMENT and len(recorded[number]) < len(stage.grid)
        for number, stage in enumerate(stages)
    )
    if warms and chosen is not None and spec.scheduler == "local":
        _check_device(source, spec, chosen)
    ticket = Ticket(
        slide=absolute(source.slide.path) if source.slide is not None else None,
        output=absolute(source.output),
        stages=tuple((stage.name, stage.level) for stage in stages),
        image_fingerprint=journals.image.fingerprint,
        label_fingerprint=journals.mask.fingerprint if journals.mask is not None else "",
        label=chosen.name if chosen is not None else None,
        level=layout.level,
        spec=portable(spec).to_json(),
        settings=chosen.settings.to_json() if chosen is not None else {},
        in_channels=chosen.model.in_channels if chosen is not None else source.channels,
        network=chosen.model.identity if chosen is not None else "",
        trace=trace,
        instances=objects,
        instances_fingerprint=journals.objects.fingerprint if journals.objects is not None else "",
        slack_bytes=slack_bytes(spec, chosen.forward_bytes if chosen is not None else 0, lanes),
        recent_bytes=recent_bytes(spec, lanes),
        shared_tiles=spec.in_place or _shares_tiles(source, layout.unit_px),
        warms=warms,
    )
    for reason in journals.rejected:
        on_event(Warned(source.name, f"journal record not believed, unit done again: {reason}"))
    return Job(source, ticket, stages, recorded, store, chosen, held)


@dataclass(frozen=True, slots=True)
class _Begun:
    """An output with its image: there already, or about to be copied."""

    store: Store
    mark: str
    """Fingerprint of the image."""
    unit_px: int
    """Of the image that is copied; 0 where the store was there."""
    copied: bool
    """Whether units of the image are to be written."""
    lost: Lost


def _begin(
    source: Source,
    spec: JobSpec,
    chosen: Segmentation | None,
    *,
    sole: bool,
    check_turn: Callable[[], None],
    on_event: OnEvent,
) -> _Begun:
    """Create the output or take it up; MismatchError where its image is in other units."""
    if source.slide is None:
        assert source.store is not None
        return _Begun(source.store, fingerprint(**content_of(source.store)), 0, False, {})
    device = chosen.settings.device if chosen is not None else "cpu"
    image = open_image(
        source.slide, source.output, spec,
        device=device, overwrite=spec.overwrite, sole=sole, check_turn=check_turn,
    )  # fmt: skip
    lost = lost_units(image.store, image.fingerprint)
    _warn_of(lost, "the image", source, on_event)
    copied = not spec.in_place and (not image.complete or bool(lost))
    if chosen is not None and copied and chosen.settings.plan.unit_px != image.unit_px:
        raise MismatchError(
            f"{source.output}: its image is to be completed in units of {image.unit_px} px, but "
            f"the mask asks for {chosen.settings.plan.unit_px}; complete it first with `tilepipe "
            f"ingest {argument(source.name)} -o {argument(source.output)}`, then give this "
            "command again"
        )
    return _Begun(image.store, image.fingerprint, image.unit_px, copied, lost)


def _layout_of(
    source: Source, spec: JobSpec, chosen: Segmentation | None, begun: _Begun, lanes: int
) -> Layout:
    extents = source.extents
    image = extents if begun.copied else ()
    kept_bytes = recent_bytes(spec, lanes)
    # Strips lie under a whole row of units: those go in reading order.
    in_strips = source.slide is not None and source.slide.levels[0].tile is None
    if chosen is None:
        band = 0 if in_strips else _band(source, begun.unit_px, kept_bytes, 0)
        return Layout(image, (), begun.unit_px, 0, None, band=band)
    plan, classes = chosen.settings.plan, chosen.model.classes
    channels = len(classes) - 1 if spec.probabilities else 0
    return Layout(
        image=image,
        # As many levels as the image: a reader of OME-Zarr 0.5 refuses a label with fewer.
        label=downsampled(extents[chosen.level], len(extents)),
        unit_px=plan.unit_px,
        level=chosen.level,
        plan=plan,
        gate=spec.cgm == "slide" and chosen.model.has_gate,
        band=0 if in_strips else _band(source, plan.unit_px, kept_bytes, channels),
        objects_halo_px=Rule.of_classes(classes).halo_px if spec.instances else None,
    )


def _share_of_tissue(
    source: Source,
    store: Store,
    chosen: Segmentation,
    tissue: Find,
    *,
    anew: bool,
    on_event: OnEvent,
) -> Callable[[Box], float]:
    """Keep the tissue's mask with the label; return how much of a box the network is run on."""
    found = keep_tissue(store, chosen.name, tissue, anew=anew)
    on_event(Note(source.name, found.note))
    if not found.mask.any():
        on_event(Warned(source.name, f"{found.note}: shows no tissue, so nothing at all is "
                        "segmented; look at the mask, or leave --tissue out"))  # fmt: skip
    downsample = source.downsample(chosen.level)
    return tissue_share(found, plan=chosen.settings.plan, downsample=downsample)


def _check_device(source: Source, spec: JobSpec, chosen: Segmentation) -> None:
    """Raise ModelError if the device of a job that is gone on with is not here.

    Told once, not by every unit.
    """
    from tilepipe.infer.backends import device_here

    try:
        device_here(chosen.settings.device, spec.device)
    except ModelError as error:
        raise ModelError(f"{source.output}: {error}") from error


def _shares_tiles(source: Source, unit_px: int) -> bool:
    """Tell whether tiles of the slide lie under several units."""
    tile = source.slide.levels[0].tile if source.slide is not None else None
    return tile is None or any(unit_px % px or px > unit_px for px in tile)


def _warn_of(lost: Lost, what: str, source: Source, on_event: OnEvent) -> None:
    if count := sum(map(len, lost.values())):
        on_event(Warned(source.name, f"{count} units of {what} in {source.output} were written "
                        "and are gone; they are made again"))  # fmt: skip


def _band(source: Source, unit_px: int, kept_bytes: int, channels: int) -> int:
    """Return columns of units whose neighbours are still in memory when needed: an even number.

    A row of the band waits for the one below it and is seen by that, too: three rows are held, and
    what was read ahead. Masks, and ``channels`` of probabilities, lie beside them.
    """
    unit_bytes = (source.channels * source.dtype.itemsize + 1 + channels) * unit_px**2
    return max(2, (kept_bytes // unit_bytes - 3) // 3 // 2 * 2)
