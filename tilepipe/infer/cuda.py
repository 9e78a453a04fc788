"""torch on an NVIDIA device: pinned staging, copies and forwards on streams of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tilepipe.infer.account import Account
from tilepipe.infer.backends import BatchResult, stack_tiles, staging_dtype
from tilepipe.infer.network import TileNetwork


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
    done: Any = None
    """Event after which ``values`` and ``sums`` are whole."""


class CudaBackend:
    """Two batches under way: one computes while the next is copied in and the last is copied out.

    Every batch has the same shape (short ones are filled up), so that cuDNN chooses once.
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
        self._network = network.to(device).channels_last()
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
        if precision == "fp32":
            # TF32 keeps 10 bits: that would not be float32.
            torch.backends.cudnn.allow_tf32 = False
            torch.backends.cuda.matmul.allow_tf32 = False
        # Weights and buffers are made on the default stream, which the others do not wait for.
        cuda.synchronize()

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
                values, sums, *more = self._network(slot.pixels)
                computed = self._forward.record_event()
            with self._cuda.stream(self._copy_out):
                self._copy_out.wait_event(computed)
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

    def collect(self, ticket: tuple[_Slot, int], account: Account) -> BatchResult:
        """Wait until a batch is back."""
        slot, count = ticket
        with account.span("compute"):
            slot.done.synchronize()
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
        del self._network
        self._cuda.empty_cache()


def _to_host(values: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
    """Copy to pinned memory without waiting; ``kept`` is used again where it fits."""
    if kept is None or kept.shape != values.shape or kept.dtype != values.dtype:
        kept = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
    kept.copy_(values, non_blocking=True)
    return kept
