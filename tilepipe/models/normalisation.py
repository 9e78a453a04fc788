"""``Normalisation``: how pixels become the numbers that a network was trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tilepipe.errors import ModelError

_FULL_SCALE = {torch.uint8: 255.0, torch.uint16: 65535.0}


def full_scale(dtype: torch.dtype) -> float:
    """Return the value that becomes 1: 255, 65535, or 1 for floats."""
    return _FULL_SCALE.get(dtype, 1.0)


@dataclass(frozen=True, slots=True)
class Normalisation:
    """``unit``: x / full scale. ``mean-std``: (x / full scale - mean) / std, per channel.

    Full scale is 255 for uint8, 65535 for uint16, 1 for floats; it never depends on the pixels of
    a tile, or tiling could not be exact.
    """

    kind: Literal["unit", "mean-std"] = "unit"
    mean: tuple[float, ...] = ()
    """In units of the full scale; one for each channel or one for all."""
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind == "unit":
            if self.mean or self.std:
                raise ModelError("normalisation unit takes no mean and std; use kind mean-std")
            return
        if not self.mean or len(self.mean) != len(self.std):
            raise ModelError(
                f"normalisation mean-std needs as many means as stds; got {len(self.mean)} "
                f"and {len(self.std)}"
            )
        if any(not 0 < value < float("inf") for value in self.std):
            raise ModelError(f"normalisation std {self.std}: each must be above 0")
        if any(not abs(value) < float("inf") for value in self.mean):
            raise ModelError(f"normalisation mean {self.mean}: each must be finite")

    def check_channels(self, channels: int) -> None:
        """Raise ModelError if there is neither one mean nor one for each channel."""
        if self.kind == "mean-std" and len(self.mean) not in (1, channels):
            raise ModelError(
                f"normalisation has {len(self.mean)} means for {channels} channels; "
                f"give 1 or {channels}"
            )

    def __call__(self, x: Tensor) -> Tensor:
        """(B, C, Y, X) or (C, Y, X), uint8, uint16 or float -> the same shape, float32 (or 64)."""
        scale = full_scale(x.dtype)
        x = x.to(torch.float32) if x.dtype != torch.float64 else x
        x = x / scale
        if self.kind == "mean-std":
            mean = torch.tensor(self.mean, dtype=x.dtype, device=x.device)[:, None, None]
            std = torch.tensor(self.std, dtype=x.dtype, device=x.device)[:, None, None]
            x = (x - mean) / std
        return x
