"""``Backend``: what runs a batch of tiles, and the one for torch on a CPU."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from tilepipe.errors import ModelError
from tilepipe.infer.account import Account
from tilepipe.infer.memory import streams_of
from tilepipe.infer.network import Output, TileNetwork
from tilepipe.models import Model
from tilepipe.tiling import TilePlan


@dataclass(frozen=True, slots=True)
class BatchResult:
    """What the device made of a batch."""

    values: torch.Tensor
    """Class ids (B, y, x) uint8, or float32 (B, K, y, x), on ``Backend.result_device``."""
    finite: bool
    """False where a number overflowed: the values cannot be trusted."""
    probabilities: torch.Tensor | None = None
    """Quantised, (B, classes - 1, y, x) uint8 beside the ids, where they were asked for."""


class Backend(Protocol):
    """Runs batches of tiles of one shape; used by one thread at a time."""

    name: str
    precision: str
    depth: int
    """Batches that may be under way at once."""
    result_device: str

    def submit(self, tiles: Sequence[NDArray[Any]], account: Account) -> Any:
        """Start on tiles (C, Y, X), at most the batch; returns a ticket."""
        ...

    def is_done(self, ticket: Any, *, within_s: float) -> bool:
        """Wait so long for a ticket at the most; tell whether ``collect`` would not wait."""
        ...

    def collect(self, ticket: Any, account: Account) -> BatchResult:
        """Wait for a ticket, in the order of ``submit``."""
        ...

    def close(self) -> None:
        """Give back what the device holds."""
        ...


class OutOfDeviceMemoryError(RuntimeError):
    """A batch did not fit; a smaller batch or tile may."""


_MEMORY_WORDS = ("out of memory", "can't allocate memory", "not enough memory", "bad alloc",
                 "bad_alloc", "failed to allocate", "could not create a memory",
                 "alloc_failed",  # cuBLAS and cuDNN
                 "unable to find an engine",  # cuDNN's workspace fits for no algorithm
                 "int_max elements", "32-bit index")  # fmt: skip
"""The last two are torch's of a map that a layer of its own cannot count on a GPU: the 1024
channels that UNet 3+ enlarges to 2272 px are 5e9 numbers."""


def means_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error of a back-end says that memory ran out."""
    if isinstance(error, (MemoryError, OutOfDeviceMemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in _MEMORY_WORDS)


def stack_tiles(tiles: Sequence[NDArray[Any]], out: NDArray[Any]) -> NDArray[Any]:
    """Copy tiles (C, Y, X) of one shape to the start of ``out``'s memory, a contiguous array.

    Returns that part as (B, C, Y, X); of tiles of its own shape it is the first of ``out``.
    """
    shape = (len(tiles), *tiles[0].shape)
    part = out.reshape(-1)[: prod(shape)].reshape(shape)
    for place, tile in enumerate(tiles):
        np.copyto(part[place], tile, casting="same_kind" if out.dtype.kind == "f" else "safe")
    return part


def staging_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return what pixels of ``dtype`` travel to the device as: bytes stay, the rest is float32."""
    return np.dtype(np.uint8) if dtype == np.uint8 else np.dtype(np.float32)


WAITING = 2
"""Batches that wait for a stream of a processor. They are taken back in order: behind a large tile
that is not done, two small ones may be, and with one that waits a stream would have nothing to do
(9 tiles and 3 of half their size: 6.2 s with 1, 5.75 with 2, 5.65 with 3)."""


class TorchCpuBackend:
    """torch on the processor: channels-last, weights in the precision itself (no autocast).

    It computes ``streams`` batches at once, each by its part of the threads; ``WAITING`` more wait
    for the first that is done.
    """

    name = "torch"
    result_device = "cpu"

    def __init__(
        self,
        network: TileNetwork,
        *,
        shape: tuple[int, int, int, int],
        dtype: np.dtype[Any],
        precision: str,
        threads: int,
        streams: int,
    ) -> None:
        self.precision = precision
        self._network = network.for_processor()
        self.depth = streams + WAITING
        self._staging = [np.empty(shape, staging_dtype(dtype)) for _ in range(self.depth)]
        self._turn = 0
        # torch counts threads for each thread that calls it.
        self._pool = ThreadPoolExecutor(
            streams,
            thread_name_prefix="tilepipe-forward",
            initializer=torch.set_num_threads,
            initargs=(threads // streams,),
        )

    def submit(
        self, tiles: Sequence[NDArray[Any]], account: Account
    ) -> Future[tuple[torch.Tensor, ...]]:
        """Put a batch on its way; returns at once."""
        staging = self._staging[self._turn]
        self._turn = (self._turn + 1) % self.depth
        with account.span("host-to-device"):
            pixels = torch.from_numpy(stack_tiles(tiles, staging))
        return self._pool.submit(self._run, pixels)

    def _run(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with torch.inference_mode():
            result: tuple[torch.Tensor, ...] = self._network(pixels)
            return result

    def is_done(self, ticket: Future[tuple[torch.Tensor, ...]], *, within_s: float) -> bool:
        """Wait so long for a batch at the most; tell whether it is computed."""
        return bool(wait((ticket,), within_s).done)

    def collect(self, ticket: Future[tuple[torch.Tensor, ...]], account: Account) -> BatchResult:
        """Wait until a batch is computed."""
        with account.span("compute"):
            values, sums, *more = ticket.result()
        return BatchResult(values, bool(torch.isfinite(sums).all()), *more)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=True)


def seconds_a_batch(
    backend: Backend,
    tiles: Sequence[NDArray[Any]],
    *,
    count: int = 4,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Time ``count`` batches of the same tiles, as many under way as the back-end takes."""
    account = Account()
    under_way: deque[Any] = deque()
    started_s = clock()
    for _ in range(count):
        under_way.append(backend.submit(tiles, account))
        if len(under_way) >= backend.depth:
            backend.collect(under_way.popleft(), account)
    while under_way:
        backend.collect(under_way.popleft(), account)
    return max(clock() - started_s, 1e-9) / count


def supported_precisions(device: str) -> tuple[str, ...]:
    """Return the precisions that ``device`` computes faster than, or as, fp32."""
    if device.startswith("cuda"):
        # Older GPUs have it too, but convert back and forth for it.
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return ("fp32", "fp16", "bf16") if has_bf16 else ("fp32", "fp16")
    return ("fp32", "bf16") if cpu_has_bf16() else ("fp32",)


def cpu_has_bf16() -> bool:
    """Tell whether this processor multiplies bfloat16 in hardware (AMX or AVX512-BF16)."""
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    found: list[Callable[[], bool]] = [
        getattr(torch.cpu, name) for name in checks if hasattr(torch.cpu, name)
    ]
    return any(check() for check in found)


def gpu_count() -> int:
    """Return how many CUDA devices torch can use here."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def why_no_gpu() -> str:
    """Say in brackets what torch lacks where it finds no GPU, after a space."""
    if torch.version.cuda is None:
        return f" (torch {torch.__version__} is built without CUDA)"
    return (
        f" (torch {torch.__version__} needs a driver for CUDA {torch.version.cuda}; nvidia-smi "
        "tells whether there is one, and for which)"
    )


def resolve_device(asked: str) -> str:
    """Return ``cpu`` or ``cuda:N`` for what the settings ask; ModelError if it is not there."""
    if asked == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    if asked.startswith("cuda"):
        count = gpu_count()
        index = int(asked.partition(":")[2] or 0)
        if index >= count:
            raise ModelError(
                f"--device {asked}: this machine has {count} CUDA devices that torch can use"
                f"{'' if count else why_no_gpu()}; use --device cpu"
            )
        return f"cuda:{index}"
    return asked


def check_gpus(gpus: str) -> None:
    """Raise ModelError where a process a GPU is asked for and torch finds none at all here.

    The processes would compute on the processor, and count as so many GPUs.
    """
    if not gpu_count():
        raise ModelError(f"--gpus {gpus}: torch finds no GPU here{why_no_gpu()}; leave --gpus out")


def device_here(chosen: str, asked: str) -> str:
    """Return what computes here for settings whose device is ``chosen``.

    Which of its machine's GPUs is nothing of a job: it goes on with another number, or where
    ``--gpus`` shows each process its own alone. Raises ModelError where there is no GPU at all.
    """
    if not chosen.startswith("cuda"):
        return chosen
    count = gpu_count()
    for name in (asked, chosen, "cuda:0"):
        kind, _, number = name.partition(":")
        if kind == "cuda" and int(number or 0) < count:
            return f"cuda:{int(number or 0)}"
    raise ModelError(
        "the label is computed on a GPU, whose last bits are its own, and torch finds none here; "
        "go on where there is one, or make the label anew with --overwrite --device cpu"
    )


def make_backend(
    name: str,
    model: Model,
    plan: TilePlan,
    *,
    batch: int,
    dtype: np.dtype[Any],
    device: str,
    precision: str,
    threads: int | None = None,
    output: Output = "ids",
    gated: bool = False,
) -> Backend:
    """Build the back-end called ``name`` for batches of a plan's tiles of pixels of ``dtype``.

    Raises ModelError for one that is unknown or cannot take this network.
    """
    if name not in ("torch", "openvino"):
        raise ModelError(f"back-end {name!r} is unknown; the back-ends are torch and openvino")
    network = TileNetwork(
        model,
        plan,
        dtype=dtype,
        # OpenVINO takes the float32 network and reduces the precision itself.
        precision="fp32" if name == "openvino" else precision,
        output=output,
        gated=gated,
    )
    shape = (batch, model.in_channels, plan.input_px, plan.input_px)
    if device.startswith("cuda"):
        from tilepipe.infer.cuda import CudaBackend

        return CudaBackend(network, shape=shape, dtype=dtype, device=device, precision=precision)
    threads = threads or torch.get_num_threads()
    streams = streams_of(
        name, model, precision=precision, px=batch * plan.input_px**2, threads=threads
    )
    options: dict[str, Any] = {
        "shape": shape, "dtype": dtype, "precision": precision, "threads": threads,
        "streams": streams,
    }  # fmt: skip
    if name == "openvino":
        from tilepipe.infer.openvino import OpenVinoBackend

        return OpenVinoBackend(network, **options)
    return TorchCpuBackend(network, **options)
