"""Whole images through a network in training: tiles with mirrored context, as in inference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tilepipe.infer.backends import means_out_of_memory, supported_precisions
from tilepipe.tiling import Box, Shape, plan_tiles, read_mirrored, round_up
from tilepipe.train.losses import probabilities

TILE_PX = 768
"""Side of what one forward of a valid network writes, at most."""
WHOLE_PX = 2048
"""Images up to this side go through a padded network in one piece, as if they were one tile, or,
where that is too large for the device, in tiles."""

Forward = Callable[[Tensor], Tensor]
"""(1, C, S, S) shares -> (1, K, S - 2 margin, S - 2 margin) logits."""


class Sizes(Protocol):
    """What inputs a network takes (``models.Net`` and its inference form)."""

    margin_px: int
    least_px: int
    step_px: int

    def next_legal(self, px: int) -> int:
        """Smallest legal input side >= px."""


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Return the context in which convolutions run in ``precision``."""
    if precision == "fp32":
        return nullcontext()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    return torch.autocast(device.type, dtype=dtype)


def choose_precision(precision: str, device: torch.device) -> str:
    """Resolve ``auto``: bf16 where the hardware multiplies it fast, else fp32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if "bf16" in supported_precisions(str(device)) else "fp16"
    return "bf16" if torch.backends.cpu.get_cpu_capability() == "AMX" or _has_amx() else "fp32"


def _has_amx() -> bool:
    supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(supported()) if supported is not None else False


def iter_predicted(
    forward: Forward,
    read: Callable[[Box], NDArray[np.float32]],
    extent: Shape,
    sizes: Sizes,
    *,
    halo_px: int,
    device: torch.device,
    precision: str = "fp32",
) -> Iterator[tuple[Box, NDArray[np.float32]]]:
    """Yield the probabilities (K, y, x) of an image, tile by tile; ``read`` gives shares (c, y, x).

    ``halo_px`` are read around it and its tiles, mirrored at its borders: with ``usual_halo`` the
    classes are those of ``run``, where a padded network sees no padding either.
    """
    whole = sizes.margin_px == 0 and max(extent) <= WHOLE_PX
    options: dict[str, Any] = {"halo_px": halo_px, "device": device, "precision": precision}
    if whole:
        try:
            yield from _by_tiles(forward, read, extent, sizes, max(extent), **options)
        except (RuntimeError, MemoryError) as error:
            if not means_out_of_memory(error) or max(extent) <= TILE_PX:
                raise
        else:
            return
    # Not where that was caught: the error holds on to the memory of what failed.
    yield from _by_tiles(forward, read, extent, sizes, TILE_PX, **options)


def _by_tiles(
    forward: Forward,
    read: Callable[[Box], NDArray[np.float32]],
    extent: Shape,
    sizes: Sizes,
    side_px: int,
    *,
    halo_px: int,
    device: torch.device,
    precision: str,
) -> Iterator[tuple[Box, NDArray[np.float32]]]:
    """Do that by tiles that write about ``side_px`` to a side, at most."""
    step, margin = sizes.step_px, sizes.margin_px
    plan = plan_tiles(
        extent,
        unit_px=round_up(min(max(extent), side_px), step),
        context_px=halo_px,
        alignment_px=step,
        margin_px=margin,
        least_input_px=sizes.least_px,
        input_step_px=step,
    )
    for unit in plan.grid:
        for tile in plan.tiles(unit.box):
            pixels = torch.from_numpy(read_mirrored(read, tile.padded, extent))[None].to(device)
            with torch.no_grad(), autocast(device, precision):
                logits = forward(pixels.contiguous(memory_format=torch.channels_last))
            values = probabilities(logits.float())[0].cpu().numpy()
            y, x = tile.core.shape
            crop = plan.crop_px
            yield tile.core, values[:, crop : crop + y, crop : crop + x]


def predict(
    forward: Forward,
    share: NDArray[np.float32],
    sizes: Sizes,
    *,
    halo_px: int,
    device: torch.device,
    precision: str = "fp32",
) -> NDArray[np.float32]:
    """Probabilities of a (c, y, x) image of shares: (K, y, x) float32; see ``iter_predicted``."""
    extent = (int(share.shape[1]), int(share.shape[2]))

    def read(box: Box) -> NDArray[np.float32]:
        return share[(slice(None), *box.slices)]

    result: NDArray[np.float32] | None = None
    for core, values in iter_predicted(
        forward, read, extent, sizes, halo_px=halo_px, device=device, precision=precision
    ):
        if result is None:
            result = np.empty((values.shape[0], *extent), np.float32)
        result[(slice(None), *core.slices)] = values
    assert result is not None
    return result


def predict_turned(
    forward: Forward,
    share: NDArray[np.float32],
    sizes: Sizes,
    *,
    halo_px: int,
    device: torch.device,
    precision: str = "fp32",
) -> NDArray[np.float32]:
    """Mean of ``predict`` over the 8 flips and quarter turns of the image: (K, y, x) float32."""
    total: NDArray[np.float32] | None = None
    for turns in range(4):
        for mirror in (False, True):
            view = np.rot90(share, turns, axes=(1, 2))
            view = view[:, :, ::-1] if mirror else view
            values = predict(
                forward,
                np.ascontiguousarray(view),
                sizes,
                halo_px=halo_px,
                device=device,
                precision=precision,
            )
            values = values[:, :, ::-1] if mirror else values
            back = np.rot90(values, -turns, axes=(1, 2))
            total = back.copy() if total is None else total + back
    assert total is not None
    return total / np.float32(8)


def to_classes(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """(K, y, x) probabilities -> (y, x) uint8 ids: argmax, or > 0.5 of one channel."""
    if values.shape[0] == 1:
        return (values[0] > 0.5).astype(np.uint8)
    return values.argmax(0).astype(np.uint8)
