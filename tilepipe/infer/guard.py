"""The precision guard: reduced precision held against fp32 on places of this very slide."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from tilepipe.infer.account import Account
from tilepipe.infer.backends import make_backend
from tilepipe.infer.cutting import read_finite
from tilepipe.models import Model
from tilepipe.tiling import Box, TilePlan, round_up
from tilepipe.tiling.plan import legal_input

if TYPE_CHECKING:
    from tilepipe.infer.settings import Settings

SAMPLES = 4
SAMPLE_CORE_PX = 512
CANDIDATES = 5
"""Places looked at per axis; the samples are those with the most texture."""
MANY_CANDIDATES = 16
FLAT = 0.03
"""Deviation of glass, as a share of its brightness, at the most: 0.01 is usual, tissue has 0.1."""


@dataclass(frozen=True, slots=True)
class GuardResult:
    """What reduced precision changed."""

    precision: str
    flips: float
    """Share of sampled pixels whose class differs from fp32."""
    max_probability_error: float
    sampled_px: int

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def compare(
    trial: Settings,
    model: Model,
    *,
    dtype: np.dtype[Any],
    read: Callable[[Box], NDArray[Any]],
) -> GuardResult:
    """Run sampled places in the trial's precision and back-end and in fp32 on torch.

    Numbers that overflow count as flips of the whole tile.
    """
    plan = sample_plan(trial.plan, model)
    account = Account()
    pixels = [read_finite(read, box, plan.extent)[0] for box in sample_boxes(plan, read)]
    answers = []
    for name, precision in ((trial.backend, trial.precision), ("torch", "fp32")):
        backend = make_backend(
            name,
            model,
            plan,
            batch=1,
            dtype=dtype,
            device=trial.device,
            precision=precision,
            threads=trial.threads,
            output="probabilities",
        )
        made = []
        with closing(backend):
            for tile in pixels:
                values = backend.collect(backend.submit([tile], account), account).values
                made.append(values[0].to("cpu", torch.float32, copy=True))
        answers.append(torch.stack(made))
    reduced, full = answers
    if model.activation == "sigmoid":
        flipped = (reduced > 0.5) != (full > 0.5)
        flipped = flipped.any(dim=1)
    else:
        flipped = reduced.argmax(dim=1) != full.argmax(dim=1)
    flipped |= ~torch.isfinite(reduced).all(dim=1)
    error = (torch.nan_to_num(reduced, nan=2.0) - full).abs().max()
    return GuardResult(
        precision=trial.precision,
        flips=float(flipped.float().mean()),
        max_probability_error=min(1.0, float(error)),
        sampled_px=flipped.numel(),
    )


def sample_plan(plan: TilePlan, model: Model) -> TilePlan:
    """Return the plan with tiles small enough for a quick look; blended tiles stay as they are."""
    core_px = round_up(SAMPLE_CORE_PX, plan.alignment_px)
    if plan.mode == "blended" or core_px >= plan.core_px:
        return plan
    side = legal_input(
        core_px + 2 * plan.halo_px,
        least_px=model.locality.least_input_px,
        step_px=max(1, model.locality.input_step_px),
    )
    return replace(plan, core_px=core_px, input_px=side)


def sample_boxes(plan: TilePlan, read: Callable[[Box], NDArray[Any]]) -> Iterator[Box]:
    """Inputs of the sampled tiles: where there is the most texture."""
    for y, x in textured_places(plan, read)[:SAMPLES]:
        # On the alignment, as tiles of the job are.
        y0 = max(0, y - plan.core_px // 2) // plan.alignment_px * plan.alignment_px
        x0 = max(0, x - plan.core_px // 2) // plan.alignment_px * plan.alignment_px
        y0, x0 = y0 - plan.halo_px, x0 - plan.halo_px
        yield Box(y0, x0, y0 + plan.input_px, x0 + plan.input_px)


def textured_places(plan: TilePlan, read: Callable[[Box], NDArray[Any]]) -> list[tuple[int, int]]:
    """Return a fixed set of places (y, x) of a level, those with the most texture first.

    Where nearly all of them are flat, little of the slide is tissue, and it is looked for closer.
    """
    looks = _looks(plan, read, CANDIDATES)
    if sum(look.is_textured for look in looks) < SAMPLES:
        looks += _looks(plan, read, MANY_CANDIDATES)
    looks.sort(key=lambda look: (-look.texture, look.y, look.x))
    return [(look.y, look.x) for look in looks]


@dataclass(frozen=True, slots=True)
class _Look:
    """What was seen at a place (y, x)."""

    y: int
    x: int
    texture: float
    is_textured: bool


def _looks(plan: TilePlan, read: Callable[[Box], NDArray[Any]], count: int) -> list[_Look]:
    """Look at ``count`` places an axis, evenly over the level."""
    height, width = plan.extent
    found = []
    for iy in range(count):
        for ix in range(count):
            y, x = (2 * iy + 1) * height // (2 * count), (2 * ix + 1) * width // (2 * count)
            look = Box(max(0, y - 64), max(0, x - 64), min(height, y + 64), min(width, x + 64))
            seen = read_finite(read, look, plan.extent)[0].astype(np.float32)
            # Of each channel by itself: glass that is not grey has no texture.
            deviations, means = seen.std(axis=(1, 2)), seen.mean(axis=(1, 2))
            textured = bool((deviations > FLAT * np.abs(means)).any())
            found.append(_Look(y, x, float(deviations.max()), textured))
    return found
