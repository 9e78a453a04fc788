"""OpenVINO on a processor: the network converted in memory, compiled for the shape of a tile."""

from __future__ import annotations

import importlib
import importlib.util
import io
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tilepipe.errors import ModelError
from tilepipe.infer.account import Account
from tilepipe.infer.backends import (
    WAITING,
    BatchResult,
    cpu_has_bf16,
    means_out_of_memory,
    stack_tiles,
    staging_dtype,
)
from tilepipe.infer.caches import device_name, key_of, read_blob, write_blob
from tilepipe.infer.network import TileNetwork
from tilepipe.packages import version_of

HINTS = {"fp32": "f32", "bf16": "bf16"}


def openvino_fits(device: str, precision: str, *, gated: bool = False) -> str:
    """Return "" if OpenVINO can be used, else why not."""
    if device != "cpu":
        return f"it runs on processors, not on {device}"
    if precision not in HINTS:
        return f"it has no {precision} on processors"
    if precision == "bf16" and not cpu_has_bf16():
        return "this processor has no bf16"
    if gated:
        return "a gate in each tile (--cgm tile) runs on torch only"
    return _not_loaded()


@cache
def _not_loaded() -> str:
    if importlib.util.find_spec("openvino") is None:
        return "OpenVINO is not installed (pip install 'tilepipe[openvino]')"
    try:
        import_openvino()
    except ModelError as error:
        return (
            f"OpenVINO is installed and cannot be loaded: {_first_line(error.__cause__ or error)}"
        )
    return ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


@dataclass(slots=True)
class _Slot:
    """What one batch under way needs."""

    staging: NDArray[Any]
    """(B, C, Y, X)."""
    pixels: Any
    """The same memory as OpenVINO's tensor."""
    request: Any
    any_shape: Any = None
    """A request to the network of any shape, once it was needed."""


class OpenVinoBackend:
    """A network compiled for one shape (B, C, Y, X); a smaller batch is filled up.

    Smaller tiles go to a second network, compiled for any shape when the first of them comes: some
    networks are up to a fifth slower that way, so it is not for all tiles.

    It computes ``streams`` batches at once, each by its part of the threads; ``WAITING`` more wait
    for the first that is done.
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
        self.depth = streams + WAITING
        properties: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": HINTS[precision],
            "NUM_STREAMS": streams,
            "INFERENCE_NUM_THREADS": threads,
        }

        def compiled(sides: tuple[int, int, int, int]) -> Any:
            return _compiled(openvino, network, sides, staging_dtype(dtype), properties)

        try:
            self._compiled = compiled(shape)
        except Exception as error:
            raise ModelError(f"OpenVINO cannot take this network: {_first_line(error)}") from error
        self._compile_any = partial(compiled, (-1, shape[1], -1, -1))
        self._compiled_any: Any = None
        self._any_refused = False
        self._tensor = openvino.Tensor
        self._has_probabilities = network.output == "ids+probabilities"
        self._slots = []
        for _ in range(self.depth):
            staging = np.zeros(shape, staging_dtype(dtype))
            pixels = openvino.Tensor(staging, shared_memory=True)
            self._slots.append(_Slot(staging, pixels, self._compiled.create_infer_request()))
        self._turn = 0

    def submit(self, tiles: Sequence[NDArray[Any]], account: Account) -> tuple[Any, int]:
        """Put a batch on its way; returns at once."""
        slot = self._slots[self._turn]
        self._turn = (self._turn + 1) % self.depth
        with account.span("host-to-device"):
            part = stack_tiles(tiles, slot.staging)
        request = slot.request if part.shape[2:] == slot.staging.shape[2:] else self._any(slot)
        if request is None:
            # In the corner of a whole tile: what lies beside it is beyond what its core sees.
            for place, tile in enumerate(tiles):
                slot.staging[place, :, : tile.shape[1], : tile.shape[2]] = tile
            request = slot.request
        if request is slot.request:
            request.start_async([slot.pixels])
        else:
            request.start_async([self._tensor(part, shared_memory=True)])
        return request, len(tiles)

    def _any(self, slot: _Slot) -> Any:
        """Return the slot's request for tiles of any shape, None if there is no such network."""
        if slot.any_shape is None and not self._any_refused:
            try:
                self._compiled_any = self._compiled_any or self._compile_any()
                slot.any_shape = self._compiled_any.create_infer_request()
            except Exception as error:
                if means_out_of_memory(error):
                    raise
                self._any_refused = True
        return slot.any_shape

    def is_done(self, ticket: tuple[Any, int], *, within_s: float) -> bool:
        """Wait so long for a batch at the most; tell whether it is computed."""
        return bool(ticket[0].wait_for(round(within_s * 1000)))

    def collect(self, ticket: tuple[Any, int], account: Account) -> BatchResult:
        """Wait until a batch is computed."""
        request, count = ticket
        with account.span("compute"):
            request.wait()
            # Views of the request's memory: used up before its next turn.
            values, sums, *more = (
                request.get_output_tensor(number).data[:count]
                for number in range(2 + self._has_probabilities)
            )
            finite = bool(np.isfinite(sums).all())
        return BatchResult(torch.from_numpy(values), finite, *map(torch.from_numpy, more))

    def close(self) -> None:
        """Free the compiled networks."""
        self._slots.clear()
        self._compiled = self._compiled_any = None


def import_openvino() -> Any:
    """Import OpenVINO without its usage reports, which fork this process and call a server.

    Its converter falls back to a stub of its own where the reporting package is missing.

    Raises ModelError where it is missing itself: a job that was planned with it may go on here.
    """
    if "openvino.tools.ovc" not in sys.modules:
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        return importlib.import_module("openvino")
    except (ImportError, OSError) as error:  # or a library that it needs, or that is another's
        raise ModelError(f"OpenVINO cannot be used on this machine: {error}") from error


def _compiled(
    openvino: Any,
    network: TileNetwork,
    shape: tuple[int, int, int, int],
    dtype: np.dtype[Any],
    properties: dict[str, Any],
) -> Any:
    """Return the network compiled for tiles of ``shape`` (-1: any), from the cache if it is there.

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
    """Return the OpenVINO form of a float32 network for tiles of ``shape`` (-1: any).

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
