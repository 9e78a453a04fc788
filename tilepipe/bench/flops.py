"""What a network has to compute for a px, and what the device can: its share of the peak."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from math import lcm

import torch
from torch.utils.flop_counter import FlopCounterMode

from tilepipe.infer.network import TORCH_DTYPES
from tilepipe.models import Model

_SIDES = {"cpu": 2048, "cuda": 8192}


def flops_per_px(model: Model) -> float:
    """Return the floating-point operations per output px of a map without borders.

    Of a tile of n px a layer computes ``(n / 2**k - c)**2`` px, so all together are a quadratic in
    n, and its leading term is what no halo and no valid convolution's border adds to. It comes from
    three sizes, on tensors without data. Products count as two operations; convolutions and matrix
    products alone are counted (torch's ``FlopCounterMode``).
    """
    locality = model.locality
    step = lcm(max(1, locality.input_step_px), 64)  # some networks round sides up by themselves
    network = copy.deepcopy(model.module).to("meta")
    counts = []
    for times in (1, 2, 3):
        side = locality.least_input_px + times * step
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(torch.empty((1, model.in_channels, side, side), device="meta"))
        counts.append(counter.get_total_flops())
    return (counts[2] - 2 * counts[1] + counts[0]) / (2 * step**2)


def matrix_tflops(
    device: str,
    precision: str,
    *,
    side: int | None = None,
    seconds: float = 1.0,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Measure the rate of a large product of random matrices: 10**12 operations per second.

    Random, because products of zeros run faster than those of data; for ``seconds`` in all, because
    a GPU is faster for a moment than it is while a network keeps it hot.
    """
    kind = device.partition(":")[0]
    side = side or _SIDES[kind]
    draw = torch.Generator(device).manual_seed(0)
    a, b = (
        torch.randn((side, side), generator=draw, device=device).to(TORCH_DTYPES[precision])
        for _ in range(2)
    )

    def took_s(count: int) -> float:
        started_s = clock()
        for _ in range(count):
            a @ b
        if kind == "cuda":
            torch.cuda.synchronize(device)
        return max(clock() - started_s, 1e-9) / count

    once_s = min(took_s(1), took_s(1))
    count = max(1, int(seconds / 3 / once_s))
    return 2 * side**3 / min(took_s(count) for _ in range(3)) / 1e12
