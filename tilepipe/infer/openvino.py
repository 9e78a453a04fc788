"""OpenVINO on a processor: the network converted in memory, compiled for one shape."""

from __future__ import annotations

import importlib
import importlib.util
import io
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tilepipe.errors import ModelError
from tilepipe.infer.account import Account
from tilepipe.infer.backends import BatchResult, cpu_has_bf16, stack_tiles, staging_dtype
from tilepipe.infer.caches import device_name, key_of, read_blob, version_of, write_blob
from tilepipe.infer.network import TileNetwork

HINTS = {"fp32": "f32", "bf16": "bf16"}


def openvino_fits(device: str, precision: str, *, gated: bool = False) -> str:
    """Return "" if OpenVINO can be used, else why not."""
    if importlib.util.find_spec("openvino") is None:
        return "OpenVINO is not installed (pip install 'tilepipe[openvino]')"
    if device != "cpu":
        return f"it runs on processors, not on {device}"
    if precision not in HINTS:
        return f"it has no {precision} on processors"
    if precision == "bf16" and not cpu_has_bf16():
        return "this processor has no bf16"
    if gated:
        return "a gate in each tile (--cgm tile) runs on torch only"
    return ""


@dataclass(frozen=True, slots=True)
class _Slot:
    """What one batch under way needs."""

    staging: NDArray[Any]
    """(B, C, Y, X)."""
    pixels: Any
    """The same memory as OpenVINO's tensor."""
    request: Any


class OpenVinoBackend:
    """One compiled network of static shape (B, C, Y, X); a smaller batch is filled up.

    It computes ``streams`` batches at once, each by its part of the threads; one more waits for the
    first that is done.
    """

    name = "openvino"
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
        openvino = import_openvino()

        self.precision = precision
        self.depth = streams + 1
        properties: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": HINTS[precision],
            "NUM_STREAMS": streams,
            "INFERENCE_NUM_THREADS": threads,
        }
        try:
            compiled = _compiled(openvino, network, shape, staging_dtype(dtype), properties)
        except Exception as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ModelError(f"OpenVINO cannot take this network: {first[:300]}") from error
        self._has_probabilities = network.output == "ids+probabilities"
        self._slots = []
        for _ in range(self.depth):
            staging = np.zeros(shape, staging_dtype(dtype))
            pixels = openvino.Tensor(staging, shared_memory=True)
            self._slots.append(_Slot(staging, pixels, compiled.create_infer_request()))
        self._turn = 0

    def submit(self, tiles: Sequence[NDArray[Any]], account: Account) -> tuple[_Slot, int]:
        """Put a batch on its way; returns at once."""
        slot = self._slots[self._turn]
        self._turn = (self._turn + 1) % self.depth
        with account.span("host-to-device"):
            stack_tiles(tiles, slot.staging)
        slot.request.start_async([slot.pixels])
        return slot, len(tiles)

    def collect(self, ticket: tuple[_Slot, int], account: Account) -> BatchResult:
        """Wait until a batch is computed."""
        slot, count = ticket
        with account.span("compute"):
            slot.request.wait()
            # Views of the request's memory: used up before its next turn.
            values, sums, *more = (
                slot.request.get_output_tensor(number).data[:count]
                for number in range(2 + self._has_probabilities)
            )
            finite = bool(np.isfinite(sums).all())
        return BatchResult(torch.from_numpy(values), finite, *map(torch.from_numpy, more))

    def close(self) -> None:
        """Free the compiled network."""
        self._slots.clear()


def import_openvino() -> Any:
    """Import OpenVINO without its usage reports, which fork this process and call a server.

    Its converter falls back to a stub of its own where the reporting package is missing.
    """
    if "openvino.tools.ovc" not in sys.modules:
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    return importlib.import_module("openvino")


def _compiled(
    openvino: Any,
    network: TileNetwork,
    shape: tuple[int, int, int, int],
    dtype: np.dtype[Any],
    properties: dict[str, Any],
) -> Any:
    """Return the network compiled for tiles of ``shape``, from the cache where it is kept there.

    Converting takes a second and compiling half of one; a kept network is there in 0.05 s.
    """
    core = openvino.Core()
    name = "openvino-" + key_of(
        network.identity, shape, str(dtype), properties,
        device_name("cpu"), version_of("openvino"), version_of("tilepipe"),
    )  # fmt: skip
    blob = read_blob(name)
    if blob is not None:
        with suppress(RuntimeError):  # cut off, or of another kind: compiled anew
            return core.import_model(io.BytesIO(blob), "CPU", properties)
    compiled = core.compile_model(_convert(network, shape, dtype), "CPU", properties)
    with suppress(RuntimeError):
        write_blob(name, compiled.export_model().getvalue())
    return compiled


def _convert(network: TileNetwork, shape: tuple[int, int, int, int], dtype: np.dtype[Any]) -> Any:
    """Return the OpenVINO form of a float32 network for tiles of ``shape``.

    It is traced on the smallest tile that leaves a core, not on the real one: tracing runs the
    network in torch, which takes longer than everything else for a large tile.
    """
    openvino = import_openvino()

    side = network.trace_px
    example = torch.zeros(
        (1, shape[1], side, side), dtype=torch.from_numpy(np.empty(0, dtype)).dtype
    )
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        # Without torch's own check of the trace, which runs the network twice more.
        trace: Any = torch.jit.trace
        traced = trace(network, example, check_trace=False)
        return openvino.convert_model(
            traced, example_input=example, input=[openvino.PartialShape(list(shape))]
        )
