"""The bare network: how fast it could go if pixels came and went by themselves."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilepipe.errors import ModelError
from tilepipe.infer.account import Account
from tilepipe.infer.backends import (
    make_backend,
    means_out_of_memory,
    seconds_a_batch,
    supported_precisions,
)
from tilepipe.infer.engine import Engine
from tilepipe.infer.memory import free_bytes, peak_activation_bytes
from tilepipe.infer.openvino import openvino_fits
from tilepipe.infer.plans import plan_for
from tilepipe.infer.settings import Settings
from tilepipe.infer.tuning import MEMORY_SHARE
from tilepipe.models import Model
from tilepipe.spec import JobSpec
from tilepipe.tiling import Box, TilePlan

CORES_PX = {"cpu": (384, 768, 1024, 1280), "cuda": (1024, 2048, 4096)}
GPU_UNITS = 16
"""Units that the engine computes from memory on a GPU, at the least."""


@dataclass(frozen=True, slots=True)
class Speed:
    """One way to run the network, measured."""

    backend: str
    precision: str
    input_px: int
    batch: int
    mpix_per_s: float
    """Px of the network's whole output per second: no core, no halo taken off."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def bare_speeds(
    model: Model,
    *,
    device: str,
    threads: int,
    dtype: np.dtype[Any],
    precisions: Sequence[str] | None = None,
    backends: Sequence[str] = ("torch", "openvino"),
    cores_px: Sequence[int] | None = None,
    own: Settings | None = None,
    seconds: float = 1.5,
) -> list[Speed]:
    """Time tiles of several sizes on every back-end and precision that the device has.

    ``own`` adds the job's own tile. What runs out of memory or cannot be converted is left out.
    """
    kind = device.partition(":")[0]
    found: list[Speed] = []
    allowed = MEMORY_SHARE * free_bytes(device)
    for precision in precisions or supported_precisions(device):
        names = [
            name for name in backends if name == "torch" or not openvino_fits(device, precision)
        ]
        plans = _plans(model, CORES_PX[kind] if cores_px is None else cores_px, own)
        for name in names:
            for plan in plans:
                per_px = peak_activation_bytes(model, precision=precision)
                if per_px * plan.input_px**2 > allowed:
                    continue
                try:
                    found.append(
                        _time(model, plan, name, precision, device, threads, dtype, seconds)
                    )
                except ModelError:
                    break
                except Exception as error:
                    if not means_out_of_memory(error):
                        raise
    return found


def _plans(model: Model, cores_px: Sequence[int], own: Settings | None) -> list[TilePlan]:
    plans = {} if own is None else {own.plan.input_px: own.plan}
    blended = own is not None and own.plan.mode == "blended"
    for core in () if blended else cores_px:
        side = model.next_legal(core + 2 * model.locality.halo_px)
        spec = JobSpec(tile=side)
        plan, _ = plan_for(model, (1 << 15, 1 << 15), spec, unit_px=1 << 15)
        plans.setdefault(side, plan)
    return [plans[side] for side in sorted(plans)]


def _time(
    model: Model,
    plan: TilePlan,
    name: str,
    precision: str,
    device: str,
    threads: int,
    dtype: np.dtype[Any],
    seconds: float,
) -> Speed:
    backend = make_backend(
        name,
        model,
        plan,
        batch=1,
        dtype=dtype,
        device=device,
        precision=precision,
        threads=threads,
    )
    rng = np.random.default_rng(0)
    tile = rng.integers(0, 255, (model.in_channels, plan.input_px, plan.input_px)).astype(dtype)
    seconds_a_batch(backend, [tile], count=1)
    best_s, count, stop_s = float("inf"), 4, time.perf_counter() + seconds
    while best_s == float("inf") or time.perf_counter() < stop_s:
        best_s = min(best_s, seconds_a_batch(backend, [tile], count=count))
        if device != "cpu":
            # Of few short batches the copies of the first and the last are a good part.
            count = max(4, int(seconds / 3 / best_s))
    backend.close()
    return Speed(name, precision, plan.input_px, 1, plan.output_px**2 / best_s / 1e6)


def engine_speed(model: Model, settings: Settings, image: NDArray[Any]) -> dict[str, Any]:
    """Time the engine on an image (c, y, x) in memory, two lanes; the first unit warms it up.

    A GPU, four lanes, gets the image again and again: it takes a unit that is as large as the image
    in less than a lane needs to cut it, and only those that follow show how fast it goes.
    """
    account = Account()
    engine = Engine(
        model,
        plan=settings.plan,
        device=settings.device,
        precision=settings.precision,
        backend=settings.backend,
        batch=settings.batch,
        threads=settings.threads,
        trims=settings.trims,
        account=account,
    )
    extent = settings.plan.extent

    def read(box: Box) -> NDArray[Any]:
        return image[(slice(None), *box.slices)]

    units = list(settings.plan.grid)
    on_cpu = settings.device == "cpu"
    rounds = 1 if on_cpu else -(-GPU_UNITS // len(units))
    engine.segment(read, units[0].box)
    before = account.seconds
    started_s = time.perf_counter()
    with ThreadPoolExecutor(2 if on_cpu else 4) as lanes:
        list(lanes.map(lambda unit: engine.segment(read, unit.box), units * rounds))
    elapsed_s = time.perf_counter() - started_s
    engine.close()
    spent = {step: value - before.get(step, 0.0) for step, value in account.seconds.items()}
    return {
        "mpix_per_s": rounds * extent[0] * extent[1] / elapsed_s / 1e6,
        "seconds": elapsed_s,
        "steps": {step: round(value, 4) for step, value in spent.items()},
    }
