"""Does the shape of a tile change its bits? Seen once, on this device with this network.

In float32 it did on no processor that was measured; in bf16 OpenVINO and torch choose their kernels
by the shape where there is AMX, and last bits differ (``benchmarks/NOTES.md``). Where no bit
differs, a tile may be as small as what it has to compute.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tilepipe.infer.account import Account
from tilepipe.infer.backends import make_backend, means_out_of_memory
from tilepipe.infer.caches import device_name, key_of, read_cached, write_cached
from tilepipe.infer.cutting import CELL_PX, Sizes, sizes_of
from tilepipe.models import Model
from tilepipe.packages import version_of
from tilepipe.tiling import Box, TilePlan, round_up

if TYPE_CHECKING:
    from tilepipe.infer.settings import Settings

BUDGET_S = 12.0
"""A network that would take longer keeps its one shape."""


def may_trim(settings: Settings, model: Model, *, dtype: np.dtype[Any], looks: bool) -> bool:
    """Tell whether tiles smaller than the plan's compute the same bits.

    torch's do in float32 on a processor (``tests/seams``). Other precisions and OpenVINO are looked
    at, once a machine and network, if ``looks``. A GPU keeps the one shape it is set up for, a gate
    and blending need whole tiles.
    """
    if settings.device != "cpu" or settings.plan.mode == "blended" or settings.cgm == "tile":
        return False
    if settings.backend == "torch" and settings.precision == "fp32":
        return True
    if not looks:
        return False
    name = "shapes-" + key_of(
        device_name(settings.device),
        [model.name, dict(model.arguments), model.in_channels, model.n_outputs],
        [settings.precision, settings.backend, settings.threads, settings.batch, str(dtype)],
        [version_of("torch"), version_of("openvino"), version_of("tilepipe")],
        settings.plan.input_px,
    )
    kept = read_cached(name)
    if kept is not None and isinstance(kept.get("same"), bool):
        return bool(kept["same"])
    same = keeps_bits(settings, model, dtype=dtype)
    write_cached(name, {"same": same})
    return same


def keeps_bits(
    settings: Settings,
    model: Model,
    *,
    dtype: np.dtype[Any],
    budget_s: float = BUDGET_S,
    clock: Callable[[], float] = time.perf_counter,
) -> bool:
    """Compare the logits of a whole tile of noise with those of smaller tiles cut from it.

    False where a bit differs, where there is nothing smaller, and where it would take longer than
    ``budget_s``.
    """
    plan = settings.plan
    sizes = replace(sizes_of(model, settings.backend), most_share=1.0)
    side = plan.input_px
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (model.in_channels, side, side)).astype(dtype)
    parts = [(core, tile) for core, tile in _parts(plan, sizes) if tile.shape != (side, side)]
    if not parts:
        return False
    account = Account()

    def logits(tile: Box) -> NDArray[Any]:
        cut = noise[(slice(None), *tile.slices)]
        result = backend.collect(backend.submit([cut], account), account)
        return result.values[0].numpy().copy()

    try:
        backend = make_backend(
            settings.backend,
            model,
            plan,
            batch=settings.batch,
            dtype=dtype,
            device=settings.device,
            precision=settings.precision,
            threads=settings.threads,
            output="logits",
        )
        try:
            total_px = side**2 + sum(tile.area for _, tile in parts)
            small, done_px, before_s = [], 0, clock()
            for _, tile in parts:
                small.append(logits(tile))
                done_px += tile.area
                # The first, a tenth of all, has the second network compiled for it.
                share = 0.5 if len(small) == 1 else done_px / total_px
                if clock() - before_s > budget_s * share:
                    return False
            whole = logits(Box(0, 0, side, side))
        finally:
            backend.close()
    except Exception as error:
        if not means_out_of_memory(error):
            raise
        return False
    return all(
        np.array_equal(whole[(..., *core.slices)], made[..., : core.shape[0], : core.shape[1]])
        for (core, _), made in zip(parts, small, strict=True)
    )


def _parts(plan: TilePlan, sizes: Sizes) -> Iterator[tuple[Box, Box]]:
    """Yield parts of a core and the tiles that compute them, px from the tile's corner.

    Narrow and low ones, from the corner and from within.
    """
    cell = round_up(CELL_PX, plan.alignment_px)
    core, side = plan.core_px, plan.input_px
    half, quarter = (max(cell, core // n // cell * cell) for n in (2, 4))
    for y, x, height, width in (
        (0, 0, quarter, half),
        (0, half, core, quarter),
        (quarter, cell, half, core),
    ):
        height, width = min(height, core), min(width, core)
        high, wide = sizes.shape(plan, Box(0, 0, height, width))
        y0 = min(y, (side - high) // plan.alignment_px * plan.alignment_px)
        x0 = min(x, (side - wide) // plan.alignment_px * plan.alignment_px)
        yield (
            Box(y0, x0, min(y0 + height, core), min(x0 + width, core)),
            Box(y0, x0, y0 + high, x0 + wide),
        )
