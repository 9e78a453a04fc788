"""The plan of a job: mode, unit, tile and halo for one network on one level."""

from __future__ import annotations

from tilepipe.errors import PlanError
from tilepipe.models import Locality, Model
from tilepipe.spec import JobSpec
from tilepipe.tiling import Shape, TilePlan, plan_tiles, round_up
from tilepipe.tiling.plan import Mode, legal_input

WIDE_CONTEXT_PX = 512
"""Contexts beyond this are blended: an exact tile would be nearly all halo."""
BLEND_TILE_PX = 1024
BLEND_HALO_PX = 128
CORE_PX = {"cpu": 1024, "cuda": 2048}
"""Cores aimed at where nothing was measured."""


def choose_unit(model: Model, extent: Shape, asked_px: int | None) -> int:
    """Return the side of a write unit: as asked, or 4096 and 2048 for large and small levels."""
    if asked_px is not None:
        return asked_px
    side = 4096 if max(extent) > 8192 else 2048
    return round_up(side, max(1, model.locality.alignment_px))


def choose_mode(model: Model, spec: JobSpec) -> tuple[Mode, list[str]]:
    """Return how tiles of this network make a mask, and why.

    Raises PlanError for ``--exact`` where no context would be enough, and for a gate that the
    network does not have.
    """
    if spec.cgm != "off" and not model.has_gate:
        raise PlanError(
            f"--cgm {spec.cgm}: {model.name} has no classification gate; use unet3plus-cgm, or "
            "leave --cgm off"
        )
    locality = model.locality
    notes: list[str] = []
    if locality.kind != "local":
        if spec.exact:
            raise PlanError(
                f"--exact: {model.name} can never be tiled exactly: {locality.reason}; "
                "leave --exact off to blend overlapping tiles"
            )
        notes.append(f"blended: {locality.reason or 'the network is not local'}")
        return "blended", notes
    if locality.context_px > WIDE_CONTEXT_PX and not spec.exact:
        notes.append(
            f"blended: exact tiles of {model.name} would need a halo of "
            f"{locality.context_px} px (--exact does that)"
        )
        return "blended", notes
    return "two-pass" if spec.cgm == "slide" else "exact", notes


def usual_halo(locality: Locality) -> int:
    """Return the px that a tile reads around its core, where a job asks for nothing else."""
    if locality.exact and locality.context_px <= WIDE_CONTEXT_PX:
        return locality.halo_px
    return _blend_halo(locality)


def _blend_halo(locality: Locality) -> int:
    return locality.margin_px + BLEND_HALO_PX


def plan_for(
    model: Model,
    extent: Shape,
    spec: JobSpec,
    *,
    unit_px: int,
    device: str = "cpu",
    core_px: int | None = None,
) -> tuple[TilePlan, list[str]]:
    """Plan the level; ``core_px`` aims at a core where ``spec.tile`` does not say the tile.

    Returns the plan and notes for people. Raises PlanError.
    """
    locality = model.locality
    mode, notes = choose_mode(model, spec)
    alignment_px = max(1, locality.alignment_px)
    least_px, step_px = locality.least_input_px, max(1, locality.input_step_px)
    halo_px = spec.halo
    input_px = spec.tile
    if mode == "blended":
        if halo_px is None:
            halo_px = _blend_halo(locality)
        if input_px is None:
            wanted = min(BLEND_TILE_PX, max(extent) + 2 * halo_px)
            least = max(wanted, 2 * halo_px + alignment_px)
            input_px = legal_input(least, least_px=least_px, step_px=step_px)
    else:
        needed_px = locality.halo_px
        if halo_px is not None and halo_px < locality.context_px:
            notes.append(
                f"warning: --halo {halo_px} px is less than the {locality.context_px} px that "
                f"{model.name} sees; using {needed_px} px"
            )
        halo = max(needed_px, halo_px or 0)
        halo = locality.margin_px + round_up(halo - locality.margin_px, alignment_px)
        if input_px is None:
            aim_px = core_px or CORE_PX[device.partition(":")[0]]
            core = even_core(unit_px, extent, aim_px, alignment_px)
            input_px = legal_input(core + 2 * halo, least_px=least_px, step_px=step_px)
    plan = plan_tiles(
        extent,
        unit_px=unit_px,
        context_px=locality.context_px,
        alignment_px=alignment_px,
        margin_px=locality.margin_px,
        least_input_px=least_px,
        input_step_px=step_px,
        input_px=input_px,
        halo_px=halo_px,
        mode=mode,
    )
    if plan.halo_overhead > 3:
        notes.append(
            f"warning: the halo of {plan.halo_px} px makes each output pixel cost "
            f"{plan.halo_overhead:.1f} input pixels{_what_costs_less(plan)}"
        )
    return plan, notes


def _what_costs_less(plan: TilePlan) -> str:
    """Say what makes the halo's share smaller; nothing does where one tile is the whole level."""
    if plan.core_px >= max(plan.extent):
        return ""
    # A tile that is exact writes no more than a unit, however large it is.
    is_unit = plan.mode != "blended" and plan.core_px >= plan.unit_px
    return f"; a larger --{'unit' if is_unit else 'tile'} costs less"


def even_core(unit_px: int, extent: Shape, aim_px: int, alignment_px: int) -> int:
    """Return a core near ``aim_px`` that cuts the unit, or a smaller image, into even parts."""
    side = min(unit_px, round_up(max(extent), alignment_px))
    parts = max(1, round(side / aim_px))
    return min(side, round_up(-(-side // parts), alignment_px))
