"""``Layout``: tiles and batch now in use, and what is smaller when memory ran out."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tilepipe.errors import ModelError
from tilepipe.models import Model
from tilepipe.tiling import TilePlan, round_up
from tilepipe.tiling.plan import legal_input


@dataclass(frozen=True, slots=True)
class Layout:
    """How a unit is cut and how many tiles are run at once."""

    plan: TilePlan
    batch: int


def smaller(
    layout: Layout, model: Model, *, device: str, error: Exception, gated: bool = False
) -> tuple[Layout, str]:
    """Halve the batch, then the tile's core; return the layout and what was done.

    Raises ModelError, from ``error``, where nothing can be made smaller: blended tiles, and those
    that are ``gated`` each by itself, are what the mask is made of, and an exact core is at least
    one alignment.
    """
    plan, batch = layout.plan, layout.batch
    if batch > 1:
        return Layout(plan, batch // 2), f"batch {batch} -> {batch // 2}"
    core_px = round_up(max(1, plan.core_px // 2), plan.alignment_px)
    if plan.mode == "blended" or gated or core_px >= plan.core_px:
        raise ModelError(
            f"model {model.name}: one tile of {plan.input_px} px does not fit the memory of "
            f"{device} ({str(error).splitlines()[0][:200]}); use a smaller --tile or another "
            "--device"
        ) from error
    locality = model.locality
    input_px = legal_input(
        core_px + 2 * plan.halo_px,
        least_px=locality.least_input_px,
        step_px=max(1, locality.input_step_px),
    )
    made = replace(plan, core_px=core_px, input_px=input_px)
    return Layout(made, batch), f"tile {plan.input_px} -> {input_px} px"
