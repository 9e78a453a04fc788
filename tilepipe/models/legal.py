"""Which input sides a network takes, found by trying."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tilepipe.errors import ModelError
from tilepipe.models.causes import named_in
from tilepipe.tiling import round_up

_FROM_PX = 64
_WINDOW_PX = 65
_LARGEST_PX = 1100


@dataclass(frozen=True, slots=True)
class LegalSizes:
    """Legal sides are ``least_px + k * step_px``; the output is ``2 * margin_px`` smaller."""

    least_px: int
    step_px: int
    margin_px: int

    def next_legal(self, px: int) -> int:
        """Return the smallest legal side that is at least ``px``."""
        return self.least_px + round_up(max(0, px - self.least_px), self.step_px)


def one_map(out: Any) -> Tensor:
    """Return the first (B, K, Y, X) tensor of whatever a network returns."""
    found = next(_tensors(out), None)
    if found is None:
        raise ModelError("its output holds no (B, K, Y, X) tensor")
    return found


def _tensors(out: Any) -> Iterator[Tensor]:
    if isinstance(out, Tensor):
        if out.dim() == 4:
            yield out
    elif isinstance(out, dict):
        for part in out.values():
            yield from _tensors(part)
    elif isinstance(out, list | tuple):
        for part in out:
            yield from _tensors(part)


def find_legal_sizes(module: nn.Module, in_channels: int) -> LegalSizes:
    """Try square inputs; legal are the sides of which the network consumes least.

    Raises ModelError if no side from 64 to 1100 px works or the output is of another scale.
    """
    output_side = _side_on_meta(module, in_channels) or _side_by_running(module, in_channels)
    start = _FROM_PX
    consumed: dict[int, int] = {}
    while len(_legal(consumed)) < 2 and start < _LARGEST_PX:
        for side in range(start, start + _WINDOW_PX):
            out = output_side(side)
            if out is not None:
                consumed[side] = side - out
        start += _WINDOW_PX
    if not consumed:
        raise ModelError(
            f"it takes no square input of {_FROM_PX} to {_LARGEST_PX} px with {in_channels} "
            f"channels; check the channels and that it takes (B, C, Y, X)"
        )
    legal = _legal(consumed)
    least = min(consumed.values())
    if least < 0 or least % 2:
        raise ModelError(
            f"its output is {abs(least)} px {'larger' if least < 0 else 'smaller'} than its "
            f"input; wanted the same scale and equal margins"
        )
    # One legal side alone says nothing about a step: it is taken for the step itself.
    step = legal[1] - legal[0] if len(legal) > 1 else legal[0]
    smallest = legal[0]
    while smallest - step > 0 and output_side(smallest - step) == smallest - step - least:
        smallest -= step
    return LegalSizes(smallest, step, least // 2)


def _legal(consumed: dict[int, int]) -> list[int]:
    """Sides of which the network consumes least, in rising order."""
    least = min(consumed.values(), default=0)
    return [side for side, eaten in consumed.items() if eaten == least]


def _side_on_meta(module: nn.Module, in_channels: int) -> Callable[[int], int | None] | None:
    """Shapes without arithmetic, or None where the network cannot run that way.

    Norms have no quick shapes: torch derives them in Python, slower than running them.
    """
    if any(cause.endswith("norm") for cause in named_in(module)):
        return None
    try:
        shadow = copy.deepcopy(module).to("meta")
        one_map(shadow(torch.empty(1, in_channels, 512, 512, dtype=torch.float64, device="meta")))
    except Exception:
        return None
    return _sides(shadow, in_channels, torch.float64, "meta")


def _side_by_running(module: nn.Module, in_channels: int) -> Callable[[int], int | None]:
    return _sides(copy.deepcopy(module).float(), in_channels, torch.float32, "cpu")


def _sides(
    module: nn.Module, in_channels: int, dtype: torch.dtype, device: str
) -> Callable[[int], int | None]:
    def output_side(side: int) -> int | None:
        x = torch.zeros(1, in_channels, side, side, dtype=dtype, device=device)
        try:
            with torch.no_grad():
                out = one_map(module(x))
        except (RuntimeError, ValueError, IndexError, AssertionError):
            return None  # a refused size is an answer, not a fault
        height, width = int(out.shape[-2]), int(out.shape[-1])
        return width if height == width and width > 0 else None

    return output_side
