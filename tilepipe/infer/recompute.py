"""Places of a finished mask computed again: other pieces, larger, in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tilepipe.infer.account import Account
from tilepipe.infer.backends import make_backend
from tilepipe.infer.blend import Blend
from tilepipe.infer.coverage import boxes_of
from tilepipe.infer.cutting import read_finite
from tilepipe.infer.network import ids_of, quantise
from tilepipe.infer.settings import Settings
from tilepipe.models import Model
from tilepipe.tiling import Box, TilePlan, round_up
from tilepipe.tiling.plan import legal_input

SAMPLE_PX = 256
"""Side of a recomputed place."""
TIE = 1e-4
"""Classes whose probabilities are closer than this are a tie: the last bits decide them, and
another back-end has other last bits."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One place computed again."""

    box: Box
    compared_px: int
    flips: int
    """Pixels of another class, ties apart."""
    ties: int
    """Pixels of another class whose probabilities differ by less than ``TIE``."""
    max_probability_error: float
    """Between a piece with the job's own halo and the larger one, both in float32."""
    probability_off: int = 0
    """Largest difference of a stored probability, of 255."""
    probability_mean_off: float = 0.0
    """Mean difference of the stored probabilities, of 255."""


def places(plan: TilePlan, count: int, seed: int) -> Iterator[Box]:
    """Boxes at random places, corners and seams of units among them; the same for one seed."""
    height, width = plan.extent
    rng = np.random.default_rng(seed)
    for number in range(count):
        y, x = int(rng.integers(0, height)), int(rng.integers(0, width))
        if number % 2 == 0:
            # Half of them lie across the corner of a tile: where a seam would be.
            y = min(height - 1, round_up(y, plan.core_px))
            x = min(width - 1, round_up(x, plan.core_px))
        y0, x0 = max(0, y - SAMPLE_PX // 2), max(0, x - SAMPLE_PX // 2)
        yield Box(y0, x0, min(height, y0 + SAMPLE_PX), min(width, x0 + SAMPLE_PX))


def compare_place(
    model: Model,
    settings: Settings,
    box: Box,
    stored: NDArray[Any],
    read: Callable[[Box], NDArray[Any]],
    *,
    extra_px: int = 0,
    compared: NDArray[np.bool_] | None = None,
    probabilities: NDArray[np.uint8] | None = None,
) -> Comparison:
    """Compute ``box`` again and compare with the ``stored`` ids (y, x).

    ``extra_px`` is how much more context the larger piece gets; ``compared`` (y, x) leaves pixels
    out that were never computed. ``probabilities`` (classes - 1, y, x) are the stored ones.
    """
    plan = settings.plan
    gated = settings.cgm == "tile"
    if plan.mode == "blended" or gated:
        # Where the place of a tile is part of the answer, the same grid is computed again, but
        # from a box that is cut otherwise.
        reference = _by_plan(model, plan, box, read, gated=gated)
        error = 0.0
    else:
        reference = _one_piece(model, larger_plan(model, plan, extra_px), box, read)
        again = _one_piece(model, larger_plan(model, plan, 0), box, read)
        error = float((again - reference).abs().max())
    centred = reference - 0.5 if model.activation == "sigmoid" else reference
    ids = ids_of(centred[None], activation=model.activation, n_classes=len(model.classes))[
        0
    ].numpy()
    asked = np.ones(box.shape, bool) if compared is None else compared
    differs = (ids != stored) & asked
    ties = differs & _is_tie(model, reference, stored)
    off = np.zeros(1, np.int16)
    if probabilities is not None and asked.any():
        again = quantise(reference[len(reference) - len(probabilities) :])
        off = np.abs(again.numpy().astype(np.int16) - probabilities)[:, asked]
    return Comparison(
        box=box,
        compared_px=int(asked.sum()),
        flips=int((differs & ~ties).sum()),
        ties=int(ties.sum()),
        max_probability_error=error,
        probability_off=int(off.max()),
        probability_mean_off=float(off.mean()),
    )


def _is_tie(model: Model, probabilities: torch.Tensor, stored: NDArray[Any]) -> NDArray[np.bool_]:
    if model.activation == "sigmoid":
        distance = (probabilities - 0.5).abs().amin(dim=0)
    else:
        index = torch.from_numpy(np.minimum(stored, len(probabilities) - 1).astype(np.int64))
        distance = probabilities.amax(dim=0) - probabilities.gather(0, index[None])[0]
    return np.asarray((distance < TIE).numpy())


def larger_plan(model: Model, plan: TilePlan, extra_px: int) -> TilePlan:
    """Return a plan of one piece for a sample, cut elsewhere than the job's tiles and with
    ``extra_px`` more context.
    """
    alignment = plan.alignment_px
    halo = plan.halo_px + round_up(extra_px, alignment)
    core = round_up(SAMPLE_PX, alignment) + alignment
    side = legal_input(
        core + 2 * halo,
        least_px=model.locality.least_input_px,
        step_px=max(1, model.locality.input_step_px),
    )
    return replace(plan, core_px=core, halo_px=halo, input_px=side)


def _run(
    model: Model, plan: TilePlan, pixels: NDArray[Any], *, gated: bool = False
) -> torch.Tensor:
    """Return probabilities (K, core, core), or blended (K, output, output), in float32."""
    backend = make_backend(
        "torch",
        model,
        plan,
        batch=1,
        dtype=np.dtype(pixels.dtype),
        device="cpu",
        precision="fp32",
        output="probabilities",
        gated=gated,
    )
    account = Account()
    with closing(backend):
        return backend.collect(backend.submit([pixels], account), account).values[0]


def _one_piece(
    model: Model, plan: TilePlan, box: Box, read: Callable[[Box], NDArray[Any]]
) -> torch.Tensor:
    alignment = plan.alignment_px
    y0, x0 = box.y0 // alignment * alignment, box.x0 // alignment * alignment
    corner = Box(y0 - plan.halo_px, x0 - plan.halo_px, y0 - plan.halo_px, x0 - plan.halo_px)
    side = plan.input_px
    padded = Box(corner.y0, corner.x0, corner.y0 + side, corner.x0 + side)
    values = _run(model, plan, read_finite(read, padded, plan.extent)[0])
    return values[(slice(None), *box.shift(-y0, -x0).slices)]


def _by_plan(
    model: Model,
    plan: TilePlan,
    box: Box,
    read: Callable[[Box], NDArray[Any]],
    *,
    gated: bool = False,
) -> torch.Tensor:
    """Return probabilities (K, y, x) of ``box`` by the job's own tiles."""
    if plan.mode == "blended":
        blend = Blend(plan, box, model, "cpu")
        for tile in plan.tiles(box):
            blend.add(
                [tile], _run(model, plan, read_finite(read, tile.padded, plan.extent)[0])[None]
            )
        return blend.probabilities()
    made = torch.zeros((model.n_outputs, *box.shape))
    for unit in plan.grid.touching(box):
        for tile in plan.tiles(unit.box):
            part = tile.core.intersect(box)
            if part.area == 0:
                continue
            values = _run(model, plan, read_finite(read, tile.padded, plan.extent)[0], gated=gated)
            target = part.shift(-box.y0, -box.x0).slices
            inside = part.shift(-tile.core.y0, -tile.core.x0).slices
            made[(slice(None), *target)] = values[(slice(None), *inside)]
    return made


def computed_px(
    plan: TilePlan,
    box: Box,
    facts: Mapping[tuple[int, int], Mapping[str, Any]],
    stored: NDArray[Any],
) -> NDArray[np.bool_]:
    """Tell which pixels of ``box`` the network computed in full, not skipped as empty.

    ``facts`` are those that the journal keeps of each unit (row, column), ``stored`` the class ids
    (y, x): of exact tiles what is not background was computed, whatever the journal says. Raises
    ValueError where a record does not make sense.
    """
    computed = np.ones(box.shape, bool)

    def put(part: Box, value: bool) -> None:
        computed[part.intersect(box).shift(-box.y0, -box.x0).slices] = value

    for unit in plan.grid.touching(box):
        kept = facts.get((unit.iy, unit.ix), {})
        if "skipped" in kept:  # blended
            skipped = boxes_of(kept["skipped"])
            for core in [unit.box] if skipped is None else skipped:
                put(core.intersect(unit.box), False)
        elif "computed" in kept:
            put(unit.box, False)
            # Of what was cut into too many boxes to be recorded only the foreground is compared.
            for core in boxes_of(kept["computed"]) or ():
                put(core.intersect(unit.box), True)
    return computed if plan.mode == "blended" else computed | (stored != 0)
