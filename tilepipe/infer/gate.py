"""The gate of classification-guided networks, in tiles: the largest logit that an encoder saw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tilepipe.infer.account import Account
from tilepipe.infer.network import TileNetwork
from tilepipe.models import Model
from tilepipe.tiling import Box, Tile, TilePlan


def gate_of(
    model: Model,
    plan: TilePlan,
    tiles: Sequence[Tile],
    hull: Box,
    pixels: NDArray[Any],
    account: Account,
    device: str = "cpu",
    precision: str = "fp32",
) -> float:
    """Return the largest gate logit of ``tiles``, whose pixels (c, y, x) start at ``hull``."""
    network = TileNetwork(model, plan, dtype=pixels.dtype, precision=precision, output="ids")
    if device.startswith("cuda"):
        network.for_gpu(device)
    gate_map: Any = network.network.gate_map
    largest = -float("inf")
    with account.span("compute"), torch.inference_mode():
        for tile in tiles:
            rows, columns = tile.padded.shift(-hull.y0, -hull.x0).slices
            cut = np.ascontiguousarray(pixels[None, :, rows, columns])
            x = network.normalise(torch.from_numpy(cut).to(device))
            logits = gate_map(x)[0]
            # Cells of the core alone: those of the halo have seen a tile's border, and those
            # beyond the image are only its mirror.
            cell_px = tile.padded.shape[0] // logits.shape[0]
            first = plan.halo_px // cell_px
            stops = [first + -(-side // cell_px) for side in tile.core.shape]
            largest = max(largest, float(logits[first : stops[0], first : stops[1]].max()))
    return largest
