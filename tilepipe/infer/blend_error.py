"""How far a blended mask is from one with a much larger context, measured on this very slide."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tilepipe.infer.account import Account
from tilepipe.infer.backends import make_backend
from tilepipe.infer.blend import Blend
from tilepipe.infer.cutting import read_finite
from tilepipe.infer.guard import textured_places
from tilepipe.infer.memory import peak_activation_bytes
from tilepipe.infer.network import ids_of
from tilepipe.models import Model
from tilepipe.tiling import Box, TilePlan
from tilepipe.tiling.plan import legal_input

REFERENCE_PX = 2048
"""Side of the tile that is taken for the truth, where memory allows it."""
REFERENCE_BYTES = 3 << 29


@dataclass(frozen=True, slots=True)
class BlendError:
    """Blended tiles against one large tile, over the part of it that is far from its border."""

    flips: float
    """Share of pixels whose class differs."""
    mean_probability_error: float
    max_probability_error: float
    compared_px: int
    reference_px: int
    """Side of the large tile; as large as the image, the comparison is with the whole image."""
    halo_px: int
    """Halo of the blended tiles."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"blended with a halo of {self.halo_px} px: {self.flips:.2%} of pixels and "
            f"{self.mean_probability_error:.2g} of mean probability off a tile of "
            f"{self.reference_px} px"
        )


def estimate_blend_error(
    model: Model,
    plan: TilePlan,
    read: Callable[[Box], NDArray[Any]],
    *,
    device: str = "cpu",
    threads: int | None = None,
    reference_px: int = REFERENCE_PX,
) -> BlendError:
    """Compare the region with the most texture, in fp32 on torch: on glass both are the same.

    ``read`` takes a box inside the level and returns pixels (c, y, x).
    """
    large = _reference_plan(model, plan, reference_px)
    box = _textured(large, read)
    reference = _probabilities(model, large, box, read, device, threads)
    blended = _probabilities(model, plan, box, read, device, threads)
    error = (reference - blended).abs()
    return BlendError(
        flips=int((_ids(model, reference) != _ids(model, blended)).sum()) / box.area,
        mean_probability_error=float(error.mean(dtype=torch.float64)),
        max_probability_error=float(error.max()),
        compared_px=box.area,
        reference_px=min(large.input_px, max(plan.extent) + 2 * large.halo_px),
        halo_px=plan.halo_px,
    )


def _reference_plan(model: Model, plan: TilePlan, reference_px: int) -> TilePlan:
    """Return a plan of one large tile: its core is compared, the rest is context."""
    locality = model.locality
    step_px = max(1, locality.input_step_px)
    per_px = max(1.0, peak_activation_bytes(model))
    most_px = min(reference_px, int((REFERENCE_BYTES / per_px) ** 0.5))
    # An image that fits whole needs no more context than the mirrored halo of the job itself.
    whole_px = max(plan.extent) + 2 * plan.halo_px
    fits = whole_px <= most_px
    wanted = whole_px if fits else max(most_px, plan.input_px)
    side = legal_input(wanted, least_px=locality.least_input_px, step_px=step_px)
    beyond = max(0, (side - 512) // 2) // plan.alignment_px * plan.alignment_px
    halo = plan.halo_px if fits else max(plan.halo_px, plan.margin_px + beyond)
    core = max(1, side - 2 * halo)
    return replace(plan, mode="exact", input_px=side, halo_px=halo, core_px=core, unit_px=core)


def _textured(large: TilePlan, read: Callable[[Box], NDArray[Any]]) -> Box:
    """Return the core that is compared, all of it inside the level where there is room."""
    is_all = large.core_px >= max(large.extent)
    place = (0, 0) if is_all else textured_places(large, read)[0]
    # On the alignment, as the blended tiles are: elsewhere the network answers otherwise
    # (test_seams_tiling.py::test_blended_tiles_that_miss_no_context_have_no_error).
    side, alignment = large.core_px, large.alignment_px
    y0, x0 = (
        max(0, min(at - side // 2, px - side)) // alignment * alignment
        for at, px in zip(place, large.extent, strict=True)
    )
    return Box(y0, x0, y0 + side, x0 + side).intersect(Box.of_shape(large.extent))


def _probabilities(
    model: Model,
    plan: TilePlan,
    box: Box,
    read: Callable[[Box], NDArray[Any]],
    device: str,
    threads: int | None,
) -> torch.Tensor:
    """Return (K, y, x) float32 of ``box`` on the processor, by the tiles of ``plan``."""
    account = Account()
    blend = Blend(plan, box, model, device) if plan.mode == "blended" else None
    backend = None
    made = torch.zeros(0)
    with ExitStack() as held:
        for tile in plan.tiles(box):
            pixels, _ = read_finite(read, tile.padded, plan.extent)
            if backend is None:
                backend = make_backend(
                    "torch",
                    model,
                    plan,
                    batch=1,
                    dtype=np.dtype(pixels.dtype),
                    device=device,
                    precision="fp32",
                    threads=threads,
                    output="probabilities",
                )
                held.enter_context(closing(backend))
            values = backend.collect(backend.submit([pixels], account), account).values
            if blend is None:
                made = values[0, :, : box.shape[0], : box.shape[1]].cpu()
            else:
                blend.add([tile], values)
    return made if blend is None else blend.probabilities().cpu()


def _ids(model: Model, probabilities: torch.Tensor) -> torch.Tensor:
    centred = probabilities - 0.5 if model.activation == "sigmoid" else probabilities
    return ids_of(centred[None], activation=model.activation, n_classes=len(model.classes))
