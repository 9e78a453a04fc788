"""Memory: what a forward needs and what is free."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import DTypeLike
from torch.utils._python_dispatch import TorchDispatchMode

from tilepipe.infer.blend import MAX_SUM_BYTES
from tilepipe.infer.caches import key_of, read_cached, write_cached
from tilepipe.infer.cutting import has_small_cores, sizes_of
from tilepipe.models import Model
from tilepipe.packages import version_of

if TYPE_CHECKING:
    from tilepipe.infer.settings import Settings

CGROUP = Path("/sys/fs/cgroup")
"""Where the kernel tells what a container, or a batch system's job, may take."""
OPENVINO_BYTES = 200 << 20
FORWARD_BYTES = 512 << 20
"""What the activations of all batches under way may take on a processor where that is a choice."""


def free_bytes(device: str = "cpu") -> int:
    """Return the memory that is free on a device."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    available = 4 << 30
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    with contextlib.suppress(OSError, ValueError):
        limit = int((CGROUP / "memory.max").read_text(encoding="ascii"))
        used = int((CGROUP / "memory.current").read_text(encoding="ascii"))
        for line in (CGROUP / "memory.stat").read_text(encoding="ascii").splitlines():
            if line.startswith("inactive_file "):
                # Files that were read: the kernel takes it back first, and it fills a container's
                # memory as soon as a slide is read.
                used -= int(line.split()[1])
        available = min(available, max(0, limit - used))
    return available


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the storages alive while a network runs on tensors without data."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._watch(tensor)
        return result

    def _watch(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


_MEASURED: dict[str, float] = {}


def peak_activation_bytes(model: Model, *, precision: str = "fp32") -> float:
    """Return the bytes per input px that a forward of one tile holds at its peak.

    The network runs on tensors without data; only what is alive at once counts. Kept between
    runs: torch loads its tracer for it, which takes longer than the measurement (0.8 s).
    """
    key = "activations-" + key_of(
        model.name, dict(model.arguments), model.in_channels, model.n_outputs,
        version_of("torch"), version_of("tilepipe"),
    )  # fmt: skip
    if key not in _MEASURED:
        kept = (read_cached(key) or {}).get("bytes_per_px")
        if isinstance(kept, float) and isfinite(kept) and kept > 0:
            _MEASURED[key] = kept
    if key not in _MEASURED:
        locality = model.locality
        step_px = max(1, locality.input_step_px)
        side = locality.least_input_px + -(-512 // step_px) * step_px
        network = copy.deepcopy(model.module).to("meta")
        tracker = _LiveBytes()
        with torch.inference_mode(mode=False), torch.no_grad(), tracker:
            network(torch.empty((1, model.in_channels, side, side), device="meta"))
        _MEASURED[key] = tracker.peak / side**2
        write_cached(key, {"bytes_per_px": _MEASURED[key]})
    return _MEASURED[key] * {"fp64": 2.0, "fp32": 1.0}.get(precision, 0.5)


def streams_of(backend: str, model: Model, *, precision: str, px: int, threads: int) -> int:
    """Return how many batches of ``px`` px in all a processor's threads compute at once.

    Threads that share a batch wait for the slowest after every layer, and beside lanes one of them
    is always slow. With two batches at once, each by half of the threads, torch makes 4.1 MPix/s
    for 3.2 (base 16) and 0.57 for 0.50 (base 64). OpenVINO gains some 3 % at base 16 and nothing
    at base 64: not worth much memory (benchmarks/NOTES.md).
    """
    if threads < 2:
        return 1
    if backend != "openvino":
        return 2
    return 2 if 2 * px * peak_activation_bytes(model, precision=precision) <= FORWARD_BYTES else 1


def at_once(model: Model, settings: Settings) -> int:
    """Return how many batches hold their activations at once in host memory."""
    if settings.device != "cpu":
        return 1
    return streams_of(
        settings.backend,
        model,
        precision=settings.precision,
        px=settings.batch * settings.plan.input_px**2,
        threads=settings.threads or torch.get_num_threads(),
    )


def forward_bytes(model: Model, settings: Settings) -> int:
    """Return the bytes that the activations of the batches under way take at their peak."""
    precision = "fp32" if settings.backend == "openvino" else settings.precision
    per_px = peak_activation_bytes(model, precision=precision)
    return int(per_px * settings.batch * settings.plan.input_px**2) * at_once(model, settings)


def estimate_memory(
    model: Model,
    settings: Settings,
    *,
    dtype: DTypeLike = np.uint8,
    probabilities: bool = False,
    skips: bool = False,
) -> int:
    """Return the bytes that the engine of one worker process adds at its peak (host memory).

    Weights, one forward, and the pixels of a unit with its halo; not the process itself, nor the
    units that its lanes read and write. ``probabilities``: the float32 maps of a batch that are
    quantised, three at a time, come on top of the forward. ``skips``: empty parts of tiles may be
    left out.
    """
    plan = settings.plan
    weights = 4 * sum(parameter.numel() for parameter in model.module.parameters())
    side = min(plan.unit_px, max(plan.extent)) + 2 * plan.halo_px
    pixels = model.in_channels * np.dtype(dtype).itemsize * side**2
    if plan.mode == "blended":
        pixels += min(MAX_SUM_BYTES, 4 * (model.n_outputs + 1) * plan.unit_px**2)
    if settings.device != "cpu":
        return int(weights + pixels)
    forward = forward_bytes(model, settings)
    if probabilities and plan.mode != "blended":
        maps = 3 * 4 * model.n_outputs * settings.batch * plan.core_px**2
        forward += maps * at_once(model, settings)
    extra = OPENVINO_BYTES if settings.backend == "openvino" else 0
    sizes = sizes_of(model, settings.backend)
    if extra and settings.trims and (skips or has_small_cores(plan, sizes)):
        forward = int(forward * (1 + sizes.most_share))  # the network for other shapes
    return int(2 * weights + pixels + forward + extra)
