"""``FakeCuda``: torch.cuda on a machine without a GPU, for what drives one."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tilepipe.infer.cuda import CudaBackend
from tilepipe.infer.network import TileNetwork


class FakeEvent:
    looks = 0
    """How often it is not there yet when it is looked at."""

    def __init__(self, log, name) -> None:
        self.log, self.name = log, name

    def synchronize(self) -> None:
        self.log.append(f"wait for {self.name}")

    def query(self) -> bool:
        self.log.append(f"look at {self.name}")
        self.looks -= 1
        return self.looks < 0


class FakeStream:
    made = 0

    def __init__(self, log) -> None:
        FakeStream.made += 1
        self.log, self.name, self.events = log, f"stream {FakeStream.made % 3}", 0

    def record_event(self):
        self.events += 1
        self.log.append(f"{self.name} event {self.events}")
        return FakeEvent(self.log, f"{self.name} event {self.events}")

    def wait_event(self, event) -> None:
        self.log.append(f"{self.name} waits for {event.name}")


class FakeTimer(FakeEvent):
    """An event with a clock: a millisecond passes between one and the next."""

    made = 0

    def __init__(self, log) -> None:
        FakeTimer.made += 1
        super().__init__(log, f"time {FakeTimer.made}")
        self.at_ms = FakeTimer.made

    def record(self, stream) -> None:
        self.log.append(f"{stream.name} {self.name}")

    def elapsed_time(self, later) -> float:
        return float(later.at_ms - self.at_ms)


class Recorder(TorchDispatchMode):
    def __init__(self, calls) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


class FakeGraph:
    """A CUDA graph: the calls that were recorded, made again on the same memory."""

    def __init__(self, log) -> None:
        self.log, self.calls = log, []

    def replay(self) -> None:
        self.log.append("replayed")
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            pairs = (
                [(result, again)]
                if isinstance(result, torch.Tensor)
                else zip(result, again, strict=True)
            )
            for kept, new in pairs:
                if isinstance(kept, torch.Tensor) and kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)


class FakeCuda:
    """torch.cuda on a machine without one: everything happens at once, in calling order."""

    def __init__(self) -> None:
        self.log: list[str] = []
        FakeStream.made = FakeTimer.made = 0

    def Stream(self, device):
        return FakeStream(self.log)

    @contextmanager
    def stream(self, stream):
        self.log.append(f"on {stream.name}")
        yield

    def Event(self, *, enable_timing):
        assert enable_timing
        return FakeTimer(self.log)

    def CUDAGraph(self):
        return FakeGraph(self.log)

    @contextmanager
    def graph(self, graph, *, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        self.log.append(f"recording on {stream.name}")
        with Recorder(graph.calls):
            yield

    def synchronize(self, device) -> None:
        self.log.append("all is done")

    def empty_cache(self) -> None:
        self.log.append("emptied")


def fake_cuda(cuda):
    def make(name, model, plan, *, batch, dtype, precision, output="ids", gated=False, **_):
        network = TileNetwork(
            model, plan, dtype=dtype, precision=precision, output=output, gated=gated
        )
        shape = (batch, model.in_channels, plan.input_px, plan.input_px)
        return CudaBackend(
            network, shape=shape, dtype=dtype, device="cpu", precision=precision, cuda=cuda
        )

    return make
