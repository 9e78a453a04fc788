"""torch on an NVIDIA device: pinned staging, copies and forwards on streams of their own."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tilepipe.infer.account import Account
from tilepipe.infer.backends import BatchResult, stack_tiles, staging_dtype
from tilepipe.infer.network import TileNetwork

SWITCH_S = 0.0005
"""How long a thread that computes in Python may keep the one that feeds the device waiting."""

LOOK_S = 0.0005
"""Between two looks at whether a batch is done. CUDA cannot wait for a while only, and its own way
to wait keeps a core busy."""


_RECORDING = threading.Lock()
"""CUDA does not wait for a device while another thread records on it, and that record is lost, nor
does torch give memory back to it: the next slide's settings may be measured while the first one's
network is made ready."""


@dataclass(slots=True)
class _Slot:
    """Buffers of one batch under way."""

    staging: torch.Tensor
    """Pinned (B, C, Y, X)."""
    pixels: torch.Tensor
    """The same on the device."""
    values: torch.Tensor | None = None
    """Pinned; made when the first result's shape is known."""
    probabilities: torch.Tensor | None = None
    """The same of the quantised probabilities, where they are asked for."""
    sums: torch.Tensor | None = None
    began: Any = None
    """Event before the forward and, next, the one after it."""
    ended: Any = None
    done: Any = None
    """Event after which ``values`` and ``sums`` are whole."""


class _Recorded:
    """A forward recorded as a CUDA graph: one call starts all of its kernels.

    torch asks for the interpreter again after every layer that it starts, and waits for whichever
    lane has it.
    """

    def __init__(self, cuda: Any, network: TileNetwork, pixels: torch.Tensor, stream: Any) -> None:
        self._pixels = torch.zeros_like(pixels)
        # All of it on this stream and its device: torch's recording waits for the current device
        # alone, and one that fails leaves its stream the current one.
        with torch.inference_mode(), cuda.stream(stream):
            for _ in range(2):  # what is made at first use may not be made while recording
                network(self._pixels)
            cuda.synchronize(pixels.device)
            self._graph = cuda.CUDAGraph()
            with cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                self._results = network(self._pixels)

    def __call__(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run it on the current stream; the results are the caller's own."""
        self._pixels.copy_(pixels)
        self._graph.replay()
        # The next run writes to the same places.
        return tuple(result.clone() for result in self._results)


class CudaBackend:
    """Two batches under way: one computes while the next is copied in and the last is copied out.

    Every batch has the same shape (short ones are filled up): it is recorded once, and a record
    that gives other bits than the network, or cannot be made, is not used. cuDNN chooses how to
    compute a layer by its rules, not by a race: the same in every process.
    ``cuda`` is ``torch.cuda``, or a stand-in in tests on machines without a device.
    """

    name = "torch"
    depth = 2

    def __init__(
        self,
        network: TileNetwork,
        *,
        shape: tuple[int, int, int, int],
        dtype: np.dtype[Any],
        device: str,
        precision: str,
        cuda: Any = torch.cuda,
    ) -> None:
        self.precision = precision
        self.device = device
        self._cuda = cuda
        self._network = network.for_gpu(device)
        self._blends = not network.output.startswith("ids")
        self.result_device = device if self._blends else "cpu"
        pinned = torch.cuda.is_available()
        tensor_dtype = torch.from_numpy(np.empty(0, staging_dtype(dtype))).dtype
        self._slots = [
            _Slot(
                staging=torch.zeros(shape, dtype=tensor_dtype, pin_memory=pinned),
                pixels=torch.zeros(shape, dtype=tensor_dtype, device=device),
            )
            for _ in range(self.depth)
        ]
        self._turn = 0
        self._copy_in = cuda.Stream(device)
        self._forward = cuda.Stream(device)
        self._copy_out = cuda.Stream(device)
        sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_S))
        with _RECORDING:
            # Weights and buffers are made on the default stream, for which the others do not wait.
            cuda.synchronize(device)
            self._run = self._recorded() or self._network

    @property
    def is_recorded(self) -> bool:
        """Whether forwards run from a record."""
        return self._run is not self._network

    def _recorded(self) -> _Recorded | None:
        """Record a forward; None where that fails or its results are not the network's."""
        pixels = torch.zeros_like(self._slots[0].pixels)
        draw = torch.Generator().manual_seed(0)
        pixels.copy_(torch.randint(0, 255, pixels.shape, generator=draw, dtype=torch.uint8))
        record: _Recorded | None = None
        try:
            with torch.inference_mode(), self._cuda.stream(self._forward):
                # To the host, and before there is a record: one of the two holds memory at a time.
                wanted = [result.cpu() for result in self._network(pixels)]
                record = _Recorded(self._cuda, self._network, pixels, self._forward)
                found = [result.cpu() for result in record(pixels)]
            if not all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True)):
                record = None
        except RuntimeError:  # a network that waits for a number, or too little memory
            logging.getLogger(__name__).debug("forwards are not recorded", exc_info=True)
            record = None
        finally:
            self._cuda.synchronize(self.device)
            self._cuda.empty_cache()  # of the plain forwards, and of a record that is not used
        return record

    def submit(self, tiles: Sequence[NDArray[Any]], account: Account) -> tuple[_Slot, int]:
        """Put a batch on its way; returns at once."""
        slot = self._slots[self._turn]
        self._turn = (self._turn + 1) % self.depth
        with account.span("host-to-device"):
            stack_tiles(tiles, slot.staging.numpy())
            with self._cuda.stream(self._copy_in):
                slot.pixels.copy_(slot.staging, non_blocking=True)
                copied = self._copy_in.record_event()
        with account.span("compute"), torch.inference_mode():
            with self._cuda.stream(self._forward):
                self._forward.wait_event(copied)
                slot.began, slot.ended = (self._cuda.Event(enable_timing=True) for _ in range(2))
                slot.began.record(self._forward)
                values, sums, *more = self._run(slot.pixels)
                slot.ended.record(self._forward)
            with self._cuda.stream(self._copy_out):
                self._copy_out.wait_event(slot.ended)
                slot.values = values if self._blends else _to_host(values, slot.values)
                slot.sums = _to_host(sums, slot.sums)
                if more:
                    slot.probabilities = _to_host(more[0], slot.probabilities)
                # The allocator must not reuse them before the copy is through.
                for tensor in (values, sums, *more):
                    if tensor.is_cuda:
                        tensor.record_stream(self._copy_out)
                slot.done = self._copy_out.record_event()
        return slot, len(tiles)

    def is_done(self, ticket: tuple[_Slot, int], *, within_s: float) -> bool:
        """Wait so long for a batch at the most; tell whether it is back."""
        until_s = time.monotonic() + within_s
        while not ticket[0].done.query():
            if time.monotonic() >= until_s:
                return False
            time.sleep(LOOK_S)
        return True

    def collect(self, ticket: tuple[_Slot, int], account: Account) -> BatchResult:
        """Wait until a batch is back."""
        slot, count = ticket
        with account.span("compute"):
            slot.done.synchronize()
        account.add_device(slot.began.elapsed_time(slot.ended) / 1000)
        if slot.values is None or slot.sums is None:
            raise RuntimeError("a batch was collected before it was submitted")
        finite = bool(torch.isfinite(slot.sums[:count]).all())
        if slot.values.is_cuda:
            # Blended on the current stream: the allocator must know before it is freed.
            slot.values.record_stream(self._cuda.current_stream(self.device))
        if slot.probabilities is None:
            return BatchResult(slot.values[:count], finite)
        return BatchResult(slot.values[:count], finite, slot.probabilities[:count])

    def close(self) -> None:
        """Give the memory back to the device."""
        self._slots.clear()
        del self._network, self._run
        with _RECORDING:
            self._cuda.empty_cache()


def _to_host(values: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
    """Copy to pinned memory without waiting; ``kept`` is used again where it fits."""
    if kept is None or kept.shape != values.shape or kept.dtype != values.dtype:
        kept = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
    kept.copy_(values, non_blocking=True)
    return kept
