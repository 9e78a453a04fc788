"""``choose``: which network, how it is run, and what makes two requests the same."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from tilepipe.errors import PlanError, TilepipeError
from tilepipe.pipeline.context import on_worker, slide_level
from tilepipe.pipeline.events import Note, OnEvent, Warned
from tilepipe.pipeline.job import fingerprint
from tilepipe.pipeline.networks import network_for
from tilepipe.pipeline.output import unit_for
from tilepipe.pipeline.source import (
    Source,
    absolute,
    open_source,
    portable,
    resolve_level,
    told_mpp,
)
from tilepipe.pipeline.stored import content_of
from tilepipe.pipeline.tissue import asked_tissue
from tilepipe.schedule.cluster import ask_a_worker
from tilepipe.schedule.local import gpu_numbers
from tilepipe.slide import Read, reads_shown
from tilepipe.spec import JobSpec
from tilepipe.store import Store, open_store
from tilepipe.tiling import round_up

if TYPE_CHECKING:
    from tilepipe.infer import Settings
    from tilepipe.models import Model


@dataclass(frozen=True, slots=True)
class Segmentation:
    """The network and how it will be run."""

    model: Model
    settings: Settings
    name: str
    level: int

    @property
    def forward_bytes(self) -> int:
        """What a forward takes from malloc and gives back: torch's on a processor; others 0."""
        if (self.settings.device, self.settings.backend) != ("cpu", "torch"):
            return 0
        from tilepipe.infer import forward_bytes

        return forward_bytes(self.model, self.settings)


def choose(source: Source, spec: JobSpec, on_event: OnEvent) -> Segmentation:
    """Load the network and plan how it covers the level; nothing is written.

    How it runs is chosen where it will run: here, or on a worker of the cluster, whose device and
    cores may be others.
    """
    from tilepipe.infer import Settings

    model = _load(source, spec)
    if model.in_channels != source.channels:
        text = "colours, shown to the network as luminance"
        if source.channels == 1:
            text = f"one channel, shown to all {model.in_channels} of the network"
        on_event(Note(source.name, text))
    level = resolve_level(source, spec)
    if source.mpp is not None and model.mpp is not None:
        here = source.mpp_of(level)
        if not all(0.5 < side / model.mpp < 2 for side in here):
            on_event(
                Warned(
                    source.name,
                    f"level {level} has {told_mpp(here)} µm/px, the weights were made at "
                    f"{model.mpp:.3g}",
                )
            )
    name = spec.name or model.name
    recorded = _recorded_settings(source, name, spec, model, level)
    if recorded is not None:
        return Segmentation(model, Settings.from_json(recorded), name, level)
    if spec.scheduler == "local":
        settings = _settings(source, spec, model, level)
    else:
        places = absolute(source.name), absolute(source.output)
        found = ask_a_worker(spec.scheduler, settings_there, *places, portable(spec).to_json())
        settings = Settings.from_json(found)
    for note in settings.notes:
        on_event(Note(source.name, note))
    return Segmentation(model, settings, name, level)


def settings_there(slide: str, output: str, spec: dict[str, Any]) -> dict[str, Any]:
    """Choose the settings of a job in this process, a worker's; plain values in and out.

    What it lacks is told as that: on the machine that asks all may be there.
    """
    asked_for = JobSpec.checked(spec)
    try:
        source = open_source(slide, output, asked_for)
        try:
            model = _load(source, asked_for)
            level = resolve_level(source, asked_for)
            return _settings(source, asked_for, model, level).to_json()
        finally:
            source.close()
    except TilepipeError as error:
        raise type(error)(f"{error}{on_worker()}") from error


def _load(source: Source, spec: JobSpec) -> Model:
    """Load the network; PlanError if it does not take the image's channels."""
    channels = source.channels
    model = network_for(spec, channels)
    as_luminance = source.image.rgb and model.luminance
    if channels not in (1, model.in_channels) and not as_luminance:
        raise PlanError(
            f"{source.name}: has {channels} channels, but {spec.model} ({model.source}) takes "
            f"{model.in_channels}; use weights trained on {channels} channels"
        )
    return model


def _settings(source: Source, spec: JobSpec, model: Model, level: int) -> Settings:
    """Choose how the network runs on this machine, from pixels of the level."""
    from tilepipe.infer import choose_settings
    from tilepipe.infer.backends import resolve_device

    spec = _on_its_gpus(spec)
    extents = source.extents
    if source.store is not None:
        unit = spec.unit or min(2048, round_up(max(extents[level]), 512))
        read: Read | None = source.store.image(level).read
    else:
        assert source.slide is not None
        slide = source.slide
        unit = unit_for(slide, source.output, spec, device=resolve_device(spec.device))
        if spec.in_place:
            number = slide_level(slide, level)
            read = partial(slide.read, level=number)
        else:
            # Places for the precision guard; coarser levels do not exist before ingest.
            read = slide.read if level == 0 else None
    alignment = model.locality.alignment_px
    if spec.unit is None:
        unit = round_up(unit, alignment)
    return choose_settings(
        model,
        extent=extents[level],
        unit_px=unit,
        spec=spec,
        dtype=source.dtype,
        read=reads_shown(read, model.in_channels) if read is not None else None,
        workers=spec.workers or 1,
    )


def _on_its_gpus(spec: JobSpec) -> JobSpec:
    """Have the first of a job's GPUs stand for all: others of the machine may be in use.

    Raises ModelError where there is none.
    """
    from tilepipe.infer.backends import check_gpus, gpu_count

    if spec.gpus is None or spec.device not in ("auto", "cuda"):
        return spec
    check_gpus(spec.gpus)
    first = gpu_numbers(spec.gpus)[0]
    return spec.replace(device=f"cuda:{first}") if first < gpu_count() else spec


def _recorded_settings(
    source: Source, name: str, spec: JobSpec, model: Model, level: int
) -> dict[str, Any] | None:
    """Settings of the run that is taken up again: measured choices must not change half-way."""
    if spec.overwrite and spec.part is None:
        return None
    try:
        store = source.store or open_store(source.output)
        record = store.label(name).read_record()
    except OSError:
        return None
    if record.get("asked") != asked(spec, model, level):
        return None
    settings = record.get("settings")
    if not isinstance(settings, dict) or (
        spec.overwrite and not _same_input(source, store, record)
    ):
        return None
    return settings


def _same_input(source: Source, store: Store, record: dict[str, Any]) -> bool:
    """Tell whether the mask with this record is of the pixels that are to be segmented."""
    if source.slide is not None:
        return bool(store.read_record().get("input") == source.slide.fingerprint())
    image = fingerprint(**content_of(store))
    mark = fingerprint(image=image, asked=record.get("asked"), settings=record.get("settings"))
    return bool(record.get("fingerprint") == mark)


def asked(spec: JobSpec, model: Model, level: int) -> dict[str, Any]:
    """Return what the user asked for that shapes the output; equal requests resume each other."""
    keys = ("model", "classes", "base", "options", "precision", "backend", "tolerance", "tile",
            "batch", "halo", "exact", "cgm", "unit", "in_place", "probabilities")  # fmt: skip
    values = spec.to_json()
    return {
        **{key: values[key] for key in keys},
        # A gate was once the largest difference of its two logits; records hold one number then.
        **({} if spec.cgm == "off" else {"gate": "maxima"}),
        "tissue": asked_tissue(spec),
        "weights": model.sha256,
        "network": model.identity,
        "level": level,
    }
