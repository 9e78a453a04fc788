"""The precision guard: reduced precision held against fp32 on places of this very slide."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
        for tile in pixels:
            values = backend.collect(backend.submit([tile], account), account).values
            made.append(values[0].to("cpu", torch.float32, copy=True))
        backend.close()
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
    """Inputs of the sampled tiles: of a fixed set of places, those with the most texture."""
    height, width = plan.extent
    looks: list[tuple[float, int, int]] = []
    for iy in range(CANDIDATES):
        for ix in range(CANDIDATES):
            cy, cx = (
                (2 * iy + 1) * height // (2 * CANDIDATES),
                (2 * ix + 1) * width // (2 * CANDIDATES),
            )
            look = Box(max(0, cy - 64), max(0, cx - 64), min(height, cy + 64), min(width, cx + 64))
            seen, _ = read_finite(read, look, plan.extent)
            texture = float(seen.astype(np.float32).std())
            looks.append((-texture, cy, cx))
    for _, cy, cx in sorted(looks)[:SAMPLES]:
        # On the alignment, as tiles of the job are.
        y0 = max(0, cy - plan.core_px // 2) // plan.alignment_px * plan.alignment_px
        x0 = max(0, cx - plan.core_px // 2) // plan.alignment_px * plan.alignment_px
        y0, x0 = y0 - plan.halo_px, x0 - plan.halo_px
        yield Box(y0, x0, y0 + plan.input_px, x0 + plan.input_px)
