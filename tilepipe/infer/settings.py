"""``Settings``: how a job runs its network; chosen once, recorded, the same again on resume."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from tilepipe.errors import ModelError, PlanError
from tilepipe.infer import guard, shapes, tuning
from tilepipe.infer.backends import means_out_of_memory, resolve_device, supported_precisions
from tilepipe.infer.blend_error import estimate_blend_error
from tilepipe.infer.openvino import openvino_fits
from tilepipe.infer.plans import choose_unit, plan_for
from tilepipe.models import Model
from tilepipe.spec import JobSpec
from tilepipe.threads import cores
from tilepipe.tiling import Box, Shape, TilePlan

SMALL_PX = 4096 * 4096
"""Levels smaller than this run in fp32 on torch: they take seconds, and exactness is free."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that decides the pixels of a mask, and how fast they come."""

    plan: TilePlan
    device: str
    precision: str
    backend: str
    batch: int
    threads: int
    """Threads of the device's back-end in one worker process (CPU only)."""
    cgm: str = "off"
    trims: bool = False
    """Tiles may be smaller than the plan's: on this device no bit of their result changes."""
    notes: tuple[str, ...] = ()
    """What was decided and why, for people."""
    guard: dict[str, Any] | None = None
    """What the precision guard measured, if it did."""
    blend_error: dict[str, Any] | None = None
    """How far blended tiles are from a much larger context, where they are blended."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values, as the store records them."""
        return {**asdict(self), "plan": self.plan.to_json(), "notes": list(self.notes)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Settings:
        """Read what ``to_json`` wrote; PlanError if it is not that."""
        try:
            settings = cls(
                **{
                    **values,
                    "plan": TilePlan.from_json(values["plan"]),
                    "notes": tuple(str(note) for note in values.get("notes", ())),
                }
            )
        except (KeyError, TypeError) as error:
            raise PlanError(f"recorded settings cannot be read: {error}") from error
        return settings


def choose_settings(
    model: Model,
    *,
    extent: Shape,
    spec: JobSpec,
    dtype: DTypeLike = np.uint8,
    channels: int | None = None,
    unit_px: int | None = None,
    workers: int = 1,
    read: Callable[[Box], NDArray[Any]] | None = None,
) -> Settings:
    """Choose plan, device, precision, back-end, batch and threads for a level of ``extent``.

    ``read`` gives pixels of the level for the precision guard and the blend's error; without it
    ``--precision auto`` means fp32. Precision and back-end follow from what the machine can do and
    from the guard, never from a measured speed, so that a resumed job computes the same pixels.

    Raises PlanError, ModelError where the job cannot run as asked.
    """
    if channels is not None and channels != model.in_channels:
        raise ModelError(
            f"model {model.name} takes {model.in_channels} channels and the image has {channels}; "
            "use weights made for this kind of image"
        )
    device = resolve_device(spec.device)
    unit = choose_unit(model, extent, spec.unit if spec.unit is not None else unit_px)
    plan, notes = plan_for(model, extent, spec, unit_px=unit, device=device)
    settings = Settings(
        plan=plan,
        device=device,
        precision="fp32",
        backend="torch",
        batch=spec.batch or 1,
        threads=max(1, cores() // max(1, workers)),
        cgm=spec.cgm,
        notes=tuple(notes),
    )
    settings = _with_precision(settings, model, spec, np.dtype(dtype), read)
    if plan.mode == "blended":
        settings = _with_blend_error(settings, model, read)
    if spec.tune and extent[0] * extent[1] >= SMALL_PX:
        settings = tuning.tuned(settings, model, spec, dtype=np.dtype(dtype), workers=workers)
    looks = extent[0] * extent[1] >= SMALL_PX
    trims = shapes.may_trim(settings, model, dtype=np.dtype(dtype), looks=looks)
    return replace(settings, trims=trims)


def _with_blend_error(
    settings: Settings, model: Model, read: Callable[[Box], NDArray[Any]] | None
) -> Settings:
    """Measure how far blended tiles are off, or say why that is not known."""
    unknown = "how far blended tiles are off is not measured: "
    if read is None:  # a coarser level is made as the job goes
        return _noted(settings, [f"{unknown}no pixels of this level yet"])
    plan, device, threads = settings.plan, settings.device, settings.threads
    try:
        error = estimate_blend_error(model, plan, read, device=device, threads=threads)
    except Exception as problem:
        if not means_out_of_memory(problem):
            raise
        return _noted(settings, [f"{unknown}{device} has no memory for a larger tile"])
    return _noted(replace(settings, blend_error=error.to_json()), [str(error)])


def _with_precision(
    settings: Settings,
    model: Model,
    spec: JobSpec,
    dtype: np.dtype[Any],
    read: Callable[[Box], NDArray[Any]] | None,
) -> Settings:
    """Choose precision, then the back-end for it."""
    able = supported_precisions(settings.device)
    notes: list[str] = []
    small = settings.plan.extent[0] * settings.plan.extent[1] < SMALL_PX
    if spec.precision != "auto":
        if spec.precision not in able:
            notes.append(f"{settings.device} has no fast {spec.precision}: it will be slow")
        chosen = spec.precision
        return _noted(_with_backend(replace(settings, precision=chosen), spec, small), notes)
    reduced = next((name for name in ("bf16", "fp16") if name in able), None)
    full = _with_backend(settings, spec, small)
    if small or reduced is None:
        return full
    if read is None:
        return _noted(full, ["fp32: no pixels to compare a reduced precision with"])
    trial = _with_backend(replace(settings, precision=reduced), spec, small)
    try:
        found = guard.compare(trial, model, dtype=dtype, read=read)
    except Exception as problem:
        if not means_out_of_memory(problem):
            raise
        return _noted(full, [f"fp32: {settings.device} has no memory to compare {reduced} with it"])
    facts = found.to_json()
    if found.flips <= spec.tolerance:
        note = f"{reduced}: flips {found.flips:.3%} of sampled pixels, within {spec.tolerance:.3%}"
        return _noted(replace(trial, guard=facts), [note])
    note = f"fp32: {reduced} flips {found.flips:.3%} of sampled pixels, above {spec.tolerance:.3%}"
    return _noted(replace(full, guard=facts), [note])


def _with_backend(settings: Settings, spec: JobSpec, small: bool) -> Settings:
    # Converting and compiling takes seconds: worth it only for a large level.
    if spec.backend == "torch" or (spec.backend == "auto" and small):
        return replace(settings, backend="torch")
    refused = openvino_fits(settings.device, settings.precision, gated=settings.cgm == "tile")
    if not refused:
        return replace(settings, backend="openvino")
    if spec.backend == "openvino":
        raise ModelError(f"--backend openvino: {refused}; use --backend torch")
    torch = replace(settings, backend="torch")
    # Whoever installed it waits for its speed.
    note = f"torch: {refused}"
    told = "cannot be loaded" not in refused or note in settings.notes
    return torch if told else _noted(torch, [note])


def _noted(settings: Settings, notes: list[str]) -> Settings:
    return replace(settings, notes=(*settings.notes, *notes))
