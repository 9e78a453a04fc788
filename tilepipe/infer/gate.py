"""The gate of classification-guided networks, in tiles: the largest logits that an encoder saw."""

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
) -> tuple[float, float]:
    """Return the largest gate logits of ``tiles``, whose pixels (c, y, x) start at ``hull``.

    Those of "nothing" and of "something"; of the whole level, the gate is open where the second
    is larger.
    """
    network = TileNetwork(model, plan, dtype=pixels.dtype, precision=precision, output="ids")
    if device.startswith("cuda"):
        network.for_gpu(device)
    gate_map: Any = network.network.gate_map
    largest = np.full(2, -np.inf)
    with account.span("compute"), torch.inference_mode():
        for tile in tiles:
            rows, columns = tile.padded.shift(-hull.y0, -hull.x0).slices
            cut = np.ascontiguousarray(pixels[None, :, rows, columns])
            x = network.normalise(torch.from_numpy(cut).to(device))
            logits = gate_map(x)[0]
            # Cells of the core alone: those of the halo have seen a tile's border, and those
            # beyond the image are only its mirror.
            cell_px = tile.padded.shape[0] // logits.shape[1]
            first = plan.halo_px // cell_px
            stops = [first + -(-side // cell_px) for side in tile.core.shape]
            seen = logits[:, first : stops[0], first : stops[1]].amax(dim=(1, 2))
            largest = np.maximum(largest, seen.cpu().numpy())
    return float(largest[0]), float(largest[1])
