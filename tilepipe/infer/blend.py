"""``Blend``: overlapping tiles weighted by a Hann window and summed, one unit at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from tilepipe.infer.network import ids_of, quantise
from tilepipe.models import Model
from tilepipe.tiling import Box, Tile, TilePlan

MAX_SUM_BYTES = 512 << 20
"""Bytes of sums held at once; a unit with more classes than that is done in pieces."""


def blend_boxes(plan: TilePlan, box: Box, n_outputs: int) -> Iterator[Box]:
    """Cut a unit's box so that the sums of a piece stay below ``MAX_SUM_BYTES``.

    The tile grid is fixed, so pieces give the very pixels of the whole. Exact modes: one piece.
    """
    side = max(box.shape)
    if plan.mode == "blended":
        most_px = int((MAX_SUM_BYTES / (4 * (n_outputs + 1))) ** 0.5)
        pieces = -(-side // most_px)
        side = -(-side // pieces)
    yield from box.split((side, side))


def hann(side_px: int) -> torch.Tensor:
    """Return the Hann window of ``side_px``, float32, above 0 at the ends too."""
    at = (np.arange(side_px, dtype=np.float64) + 0.5) / side_px
    return torch.from_numpy(np.sin(np.pi * at) ** 2).to(torch.float32)


class Blend:
    """Sums of one box: (K, y, x) float32 of weighted probabilities and (y, x) of weights.

    Tiles stand on the plan's fixed grid and are added in reading order, so a pixel's sum is the
    same, bit for bit, whatever the unit it is computed in.
    """

    def __init__(self, plan: TilePlan, box: Box, model: Model, device: str) -> None:
        self._plan, self._box, self._model = plan, box, model
        self._sums = torch.zeros((model.n_outputs, *box.shape), device=device)
        self._weights = torch.zeros(box.shape, device=device)
        self._window = hann(plan.output_px).to(device)

    def add(self, tiles: Sequence[Tile], probabilities: torch.Tensor) -> None:
        """Add tiles with probabilities (B, K, output, output)."""
        for tile, values in zip(tiles, probabilities, strict=False):
            output = tile.padded.grow(-self._plan.margin_px)
            part = output.intersect(self._box)
            rows, columns = part.shift(-output.y0, -output.x0).slices
            weight = self._window[rows, None] * self._window[None, columns]
            target = part.shift(-self._box.y0, -self._box.x0).slices
            self._sums[:, target[0], target[1]] += values[:, rows, columns] * weight
            self._weights[target] += weight

    def probabilities(self) -> torch.Tensor:
        """Return (K, y, x) float32."""
        # Weight 0: every tile there was skipped as empty; no class has a probability.
        return self._sums / self._weights.clamp_min(torch.finfo(torch.float32).tiny)

    def quantised(self) -> NDArray[np.uint8]:
        """Return the quantised probabilities of the foreground classes (classes - 1, y, x).

        A class at a time: together they would take the memory of the sums once more.
        """
        weights = self._weights.clamp_min(torch.finfo(torch.float32).tiny)
        first = self._model.n_outputs - (len(self._model.classes) - 1)
        planes = [quantise(sums / weights) for sums in self._sums[first:]]
        return np.asarray(torch.stack(planes).cpu().numpy(), dtype=np.uint8)

    def ids(self) -> NDArray[np.uint8]:
        """Return class ids (y, x)."""
        values = self.probabilities()
        if self._model.activation == "sigmoid":
            values -= 0.5
        ids = ids_of(
            values[None], activation=self._model.activation, n_classes=len(self._model.classes)
        )
        return np.asarray(ids[0].cpu().numpy(), dtype=np.uint8)
