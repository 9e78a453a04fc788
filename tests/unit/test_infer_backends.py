"""Back-ends: OpenVINO says why not; the CUDA one keeps its order of copies, with a stand-in."""

from __future__ import annotations

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from tests.cuda import FakeCuda, FakeGraph, fake_cuda
from tilepipe.errors import ModelError
from tilepipe.infer import Account, Engine, Settings, caches, shapes
from tilepipe.infer import openvino as ov_room
from tilepipe.infer.backends import (
    WAITING,
    BatchResult,
    make_backend,
    stack_tiles,
    staging_dtype,
    supported_precisions,
)
from tilepipe.infer.memory import FORWARD_BYTES, peak_activation_bytes, streams_of
from tilepipe.infer.network import TileNetwork
from tilepipe.infer.openvino import openvino_fits
from tilepipe.infer.plans import plan_for
from tilepipe.infer.settings import choose_settings
from tilepipe.models import load_model
from tilepipe.spec import JobSpec
from tilepipe.tiling import Box
from tilepipe.train.predict import choose_precision


def model_and_plan(tile=None, base=2, **options):
    model = load_model("unet", weights="random:0", base=base, **options)
    plan, _ = plan_for(model, (200, 150), JobSpec(tile=tile or 316), unit_px=256)
    return model, plan


@pytest.mark.parametrize("batch", [1, 2])
def test_cuda_backend_gives_the_cpus_labels(batch):
    model, plan = model_and_plan()
    image = np.random.default_rng(0).integers(0, 256, (3, 200, 150)).astype(np.uint8)

    def read(box):
        return image[(slice(None), *box.slices)]

    box = Box(0, 0, 200, 150)
    expected = Engine(model, plan=plan).segment(read, box).ids
    cuda = FakeCuda()
    engine = Engine(model, plan=plan, device="cpu", backend="cuda", batch=batch,
                    make=fake_cuda(cuda))  # fmt: skip
    np.testing.assert_array_equal(engine.segment(read, box).ids, expected)
    engine.close()
    assert cuda.log[-1] == "emptied"


def test_cuda_backend_copies_in_computes_and_copies_out_in_order():
    model, plan = model_and_plan()
    cuda = FakeCuda()
    backend = fake_cuda(cuda)(
        "torch", model, plan, batch=1, dtype=np.dtype(np.uint8), precision="fp32"
    )
    assert backend.is_recorded
    del cuda.log[:]
    account = Account()
    tile = np.zeros((3, 316, 316), np.uint8)
    first, second = backend.submit([tile], account), backend.submit([tile + 200], account)
    # Nothing has been waited for while two batches are under way.
    assert not any(entry.startswith("wait for") for entry in cuda.log)
    one = backend.collect(first, account)
    two = backend.collect(second, account)
    assert one.finite
    assert two.finite
    assert cuda.log[:10] == [
        "on stream 1",
        "stream 1 event 1",
        "on stream 2",
        "stream 2 waits for stream 1 event 1",
        "stream 2 time 1",
        "replayed",
        "stream 2 time 2",
        "on stream 0",
        "stream 0 waits for time 2",
        "stream 0 event 1",
    ]
    assert not torch.equal(one.values, two.values) or one.values.float().std() == 0
    assert {"host-to-device", "compute"} <= set(account.seconds)
    assert account.device_s == pytest.approx(0.002)  # a millisecond each


def test_cuda_backend_does_without_a_record_that_fails_or_computes_something_else(monkeypatch):
    model, plan = model_and_plan()
    make = {"batch": 1, "dtype": np.dtype(np.uint8), "precision": "fp32"}
    tile = np.random.default_rng(0).integers(0, 256, (3, 316, 316)).astype(np.uint8)

    def ids(cuda, *, recorded):
        backend = fake_cuda(cuda)("torch", model, plan, **make)
        assert backend.is_recorded is recorded
        return backend.collect(backend.submit([tile], Account()), Account()).values.clone()

    wanted = ids(FakeCuda(), recorded=True)
    assert 0 < wanted.float().mean() < 1

    @contextmanager
    def refuses(self, graph, **_):
        yield
        raise RuntimeError("operation not permitted when stream is capturing")

    with monkeypatch.context() as patch:
        patch.setattr(FakeCuda, "graph", refuses)
        cuda = FakeCuda()
        assert torch.equal(ids(cuda, recorded=False), wanted)
        assert "emptied" in cuda.log
        assert "replayed" not in cuda.log
    monkeypatch.setattr(FakeGraph, "replay", lambda self: None)  # shows what it was recorded with
    assert torch.equal(ids(FakeCuda(), recorded=False), wanted)


class OneStream(FakeCuda):
    """Knows the current stream; a recording that fails leaves its own, as torch's does."""

    current = at_recording = None

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph, *, stream, **_):
        self.at_recording, self.current = self.current, stream
        yield
        raise RuntimeError("operation failed due to a previous error during capture")


def test_a_recording_is_made_on_the_streams_device_and_leaves_no_stream_behind():
    model, plan = model_and_plan()
    cuda = OneStream()
    make = {"batch": 1, "dtype": np.dtype(np.uint8), "precision": "fp32"}
    backend = fake_cuda(cuda)("torch", model, plan, **make)
    assert not backend.is_recorded
    assert cuda.at_recording is backend._forward
    assert cuda.current is None


def test_a_record_and_a_plain_forward_hold_no_memory_at_once(monkeypatch):
    model, plan = model_and_plan()
    cuda = FakeCuda()
    forward = TileNetwork.forward

    def logged(self, pixels):
        cuda.log.append("plain")
        return forward(self, pixels)

    monkeypatch.setattr(TileNetwork, "forward", logged)
    make = {"batch": 1, "dtype": np.dtype(np.uint8), "precision": "fp32"}
    backend = fake_cuda(cuda)("torch", model, plan, **make)
    assert backend.is_recorded
    began = next(n for n, entry in enumerate(cuda.log) if entry.startswith("recording"))
    assert cuda.log[began + 1 :] == ["plain", "replayed", "all is done", "emptied"]


def test_no_thread_waits_for_a_device_on_which_another_records_or_takes_its_memory():
    model, plan = model_and_plan()

    class Strict(FakeCuda):
        recording = False

        @contextmanager
        def graph(self, graph, *, stream, **given):
            with super().graph(graph, stream=stream, **given):
                self.recording = True
                time.sleep(0.3)
                yield
            self.recording = False

        def synchronize(self, device):
            if self.recording:
                raise RuntimeError("operation not permitted when stream is capturing")

        def empty_cache(self):
            if self.recording:
                raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    cuda = Strict()
    make = {"batch": 1, "dtype": np.dtype(np.uint8), "precision": "fp32"}
    with ThreadPoolExecutor(3) as threads:
        made = [threads.submit(fake_cuda(cuda), "torch", model, plan, **make) for _ in range(3)]
        first = made[0].result()
        until_s = time.monotonic() + 60
        while not cuda.recording and time.monotonic() < until_s:  # the next
            time.sleep(0.001)
        first.close()
        assert all(one.result().is_recorded for one in made[1:])


def test_cuda_sums_in_one_order_always(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    model, plan = model_and_plan()
    make = {"batch": 1, "dtype": np.dtype(np.uint8), "precision": "fp32"}
    fake_cuda(FakeCuda())("torch", model, plan, **make)
    assert torch.backends.cudnn.deterministic


def test_cuda_backend_blends_on_the_device():
    model = load_model("unet-dilated", weights="random:0", base=2)
    plan, _ = plan_for(model, (300, 240), JobSpec(tile=260, halo=40), unit_px=512)
    image = np.random.default_rng(0).integers(0, 256, (3, 300, 240)).astype(np.uint8)

    def read(box):
        return image[(slice(None), *box.slices)]

    box = Box(0, 0, 300, 240)
    expected = Engine(model, plan=plan).segment(read, box).ids
    engine = Engine(model, plan=plan, backend="cuda", make=fake_cuda(FakeCuda()))
    np.testing.assert_array_equal(engine.segment(read, box).ids, expected)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", ["torch", "openvino"])
def test_a_processor_computes_two_batches_at_once_and_mixes_none(name, threads):
    if name == "openvino" and openvino_fits("cpu", "fp32"):
        pytest.skip(openvino_fits("cpu", "fp32"))
    model, plan = model_and_plan(base=4)
    shape = (model.in_channels, plan.input_px, plan.input_px)
    rng = np.random.default_rng(0)
    tiles = [rng.integers(0, 255, shape, np.uint8) for _ in range(7)]
    account, found = Account(), {}
    for count in (1, threads):
        backend = make_backend(
            name, model, plan, batch=1, dtype=np.dtype(np.uint8), device="cpu",
            precision="fp32", threads=count,
        )  # fmt: skip
        assert backend.depth == min(count, 2) + WAITING
        under_way, values = [], []
        for tile in tiles:
            under_way.append(backend.submit([tile], account))
            if len(under_way) >= backend.depth:
                values.append(backend.collect(under_way.pop(0), account).values.numpy().copy())
        values += [backend.collect(ticket, account).values.numpy().copy() for ticket in under_way]
        backend.close()
        found[count] = np.stack(values)
    np.testing.assert_array_equal(found[threads], found[1])
    assert len({one.tobytes() for one in found[1]}) == len(tiles)


@pytest.mark.parametrize("name", ["torch", "openvino"])
def test_a_processor_tells_whether_a_batch_is_done(name):
    if name == "openvino" and openvino_fits("cpu", "fp32"):
        pytest.skip(openvino_fits("cpu", "fp32"))
    model, plan = model_and_plan(tile=1084, base=16)
    backend = make_backend(
        name, model, plan, batch=1, dtype=np.dtype(np.uint8), device="cpu", precision="fp32",
        threads=2,
    )  # fmt: skip
    tile = np.ones((model.in_channels, plan.input_px, plan.input_px), np.uint8)
    account = Account()
    tickets = [backend.submit([tile], account) for _ in range(backend.depth)]
    # A forward takes a tenth of a second and more, and the last has to wait for two others.
    assert not backend.is_done(tickets[-1], within_s=0.005)
    assert all(backend.is_done(ticket, within_s=120) for ticket in tickets)
    values = [backend.collect(ticket, account).values for ticket in tickets]
    assert torch.equal(values[0], values[-1])
    backend.close()


def test_cuda_backend_looks_at_a_batch_until_it_is_done():
    model, plan = model_and_plan()
    cuda = FakeCuda()
    backend = fake_cuda(cuda)(
        "torch", model, plan, batch=1, dtype=np.dtype(np.uint8), precision="fp32"
    )
    tile = np.zeros((model.in_channels, plan.input_px, plan.input_px), np.uint8)
    slot, _ = ticket = backend.submit([tile], Account())
    slot.done.looks = 3
    assert not backend.is_done(ticket, within_s=0)
    assert backend.is_done(ticket, within_s=20)
    assert [line for line in cuda.log if line.startswith("look")] == [
        f"look at {slot.done.name}"
    ] * 4
    backend.close()


def test_openvino_computes_one_batch_at_once_where_two_take_much_memory():
    model, plan = model_and_plan(base=4)

    def streams(name, px, threads=2):
        return streams_of(name, model, precision="fp32", px=px, threads=threads)

    side = int((FORWARD_BYTES / 2 / peak_activation_bytes(model)) ** 0.5)
    assert (streams("openvino", side**2), streams("openvino", (side + 1) ** 2)) == (2, 1)
    assert (streams("torch", (4 * side) ** 2), streams("torch", 1, threads=1)) == (2, 1)
    assert streams("openvino", plan.input_px**2, threads=1) == 1


def test_unknown_backend():
    model, plan = model_and_plan()
    with pytest.raises(ModelError, match="back-end 'wings' is unknown"):
        make_backend("wings", model, plan, batch=1, dtype=np.dtype(np.uint8), device="cpu",
                     precision="fp32")  # fmt: skip


@pytest.fixture
def asked_anew():
    """What was found out about OpenVINO is kept; a test that changes it leaves nothing."""
    ov_room._not_loaded.cache_clear()
    yield ov_room._not_loaded.cache_clear
    ov_room._not_loaded.cache_clear()


def test_why_openvino_does_not_fit(monkeypatch, asked_anew):
    monkeypatch.setattr(ov_room.importlib.util, "find_spec", lambda name: None)
    assert "is not installed" in openvino_fits("cpu", "fp32")
    asked_anew()
    monkeypatch.setattr(ov_room.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(ov_room, "import_openvino", lambda: None)
    monkeypatch.setattr(ov_room, "cpu_has_bf16", lambda: False)
    assert openvino_fits("cpu", "fp32") == ""
    assert "no bf16" in openvino_fits("cpu", "bf16")
    assert "no fp16" in openvino_fits("cpu", "fp16")
    assert "not on cuda:0" in openvino_fits("cuda:0", "fp32")
    assert "torch only" in openvino_fits("cpu", "fp32", gated=True)


def test_an_openvino_that_cannot_be_loaded_is_told_and_done_without(monkeypatch, asked_anew):
    load = ov_room.importlib.import_module

    def broken(name, *more):
        if name == "openvino":
            raise ImportError("libtbb.so.12: cannot open shared object file\nmore")
        return load(name, *more)

    monkeypatch.setattr(ov_room.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(ov_room.importlib, "import_module", broken)
    model, _ = model_and_plan()
    large = {"extent": (1 << 13, 1 << 13), "channels": model.in_channels}
    spec = JobSpec(tune=False, precision="fp32")
    settings = choose_settings(model, spec=spec, **large)
    assert settings.backend == "torch"
    reason = "OpenVINO is installed and cannot be loaded: libtbb.so.12: cannot open shared object"
    assert [note for note in settings.notes if reason in note] == [f"torch: {reason} file"]
    with pytest.raises(ModelError, match=f"--backend openvino: {reason} file; use"):
        choose_settings(model, spec=spec.replace(backend="openvino"), **large)


needs_openvino = pytest.mark.skipif(bool(openvino_fits("cpu", "fp32")), reason="no OpenVINO here")


@needs_openvino
def test_openvino_runs_part_of_a_batch_and_other_dtypes(tmp_path, monkeypatch):
    monkeypatch.setenv("TILEPIPE_CACHE", str(tmp_path))
    model, plan = model_and_plan(tile=188 + 16)
    rng = np.random.default_rng(0)
    for dtype in (np.uint16,):
        tiles = [rng.integers(0, np.iinfo(dtype).max, (3, 204, 204)).astype(dtype) for _ in "ab"]
        made = {}
        for name in ("openvino", "torch"):
            backend = make_backend(name, model, plan, batch=3, dtype=np.dtype(dtype), device="cpu",
                                   precision="fp32", threads=1)  # fmt: skip
            account = Account()
            result = backend.collect(backend.submit(tiles, account), account)
            made[name] = result.values.numpy().copy()
            assert result.finite
            backend.close()
        assert made["openvino"].shape == made["torch"].shape
        assert (made["openvino"] != made["torch"]).mean() < 0.01


@needs_openvino
def test_a_compiled_network_is_kept_and_a_damaged_one_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("TILEPIPE_CACHE", str(tmp_path))
    converted = []
    real = ov_room._convert
    monkeypatch.setattr(ov_room, "_convert", lambda *a: converted.append(1) or real(*a))
    tile = np.random.default_rng(0).integers(0, 255, (3, 204, 204), dtype=np.uint8)

    def values(**options):
        model, plan = model_and_plan(tile=188 + 16, **options)
        backend = make_backend("openvino", model, plan, batch=1, dtype=np.dtype(np.uint8),
                               device="cpu", precision="fp32", threads=1)  # fmt: skip
        account = Account()
        ids = backend.collect(backend.submit([tile], account), account).values.numpy().copy()
        backend.close()
        return ids

    first = values()
    np.testing.assert_array_equal(values(), first)
    assert len(converted) == 1
    values(base=3)
    assert len(converted) == 2, "other weights are another network"
    for path in tmp_path.glob("*.blob"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    np.testing.assert_array_equal(values(), first)
    assert len(converted) == 3


def test_kept_networks_have_bounded_room(tmp_path, monkeypatch):
    monkeypatch.setenv("TILEPIPE_CACHE", str(tmp_path))
    monkeypatch.setattr(caches, "BLOBS_BYTES", 350)
    for number, name in enumerate("abc"):
        caches.write_blob(name, bytes(100))
        os.utime(tmp_path / f"{name}.blob", ns=(number, number))
    assert [caches.read_blob(name) is not None for name in "abc"] == [False, True, True]
    assert not list(tmp_path.glob("*.part"))
    caches.write_blob("large", bytes(400))
    assert caches.read_blob("large") is None


@needs_openvino
def test_openvino_that_cannot_take_a_network_gives_way_to_torch(tmp_path, monkeypatch):
    monkeypatch.setenv("TILEPIPE_CACHE", str(tmp_path))
    import openvino

    def refuse(*args, **kwargs):
        raise RuntimeError("No conversion rule for aten::wings\nand more")

    monkeypatch.setattr(openvino, "convert_model", refuse)
    model, plan = model_and_plan()
    image = np.zeros((3, 200, 150), np.uint8)
    engine = Engine(model, plan=plan, backend="openvino")
    result = engine.segment(lambda box: image[(slice(None), *box.slices)], Box(0, 0, 200, 150))
    assert result.facts["backend"] == "torch"
    assert "No conversion rule for aten::wings" in result.facts["backend_refused"]
    expected = Engine(model, plan=plan).segment(
        lambda box: image[(slice(None), *box.slices)], Box(0, 0, 200, 150)
    )
    np.testing.assert_array_equal(result.ids, expected.ids)


def test_a_job_planned_with_openvino_goes_on_where_it_is_missing(monkeypatch):
    """On another machine, or on a worker of a cluster that has it elsewhere only."""
    monkeypatch.setitem(sys.modules, "openvino", None)
    model, plan = model_and_plan()
    image = np.random.default_rng(0).integers(0, 255, (3, 200, 150), np.uint8)

    def read(box):
        return image[(slice(None), *box.slices)]

    box = Box(0, 0, 200, 150)
    result = Engine(model, plan=plan, backend="openvino").segment(read, box)
    assert result.facts["backend"] == "torch"
    assert "OpenVINO cannot be used on this machine" in result.facts["backend_refused"]
    np.testing.assert_array_equal(result.ids, Engine(model, plan=plan).segment(read, box).ids)


def test_bf16_overflow_sums_are_seen():
    model, plan = model_and_plan()

    class Nan(nn.Module):
        def forward(self, x):
            return torch.full_like(x[:, :2, 92:-92, 92:-92], torch.nan)

    network = TileNetwork(model, plan, dtype=np.dtype(np.uint8), precision="bf16", output="ids")
    network.network = Nan()
    _, sums = network(torch.zeros((1, 3, 316, 316), dtype=torch.uint8))
    assert not torch.isfinite(sums).any()


def test_staging_keeps_bytes_and_widens_the_rest():
    assert staging_dtype(np.dtype(np.uint8)) == np.uint8
    assert staging_dtype(np.dtype(np.uint16)) == np.float32
    out = np.zeros((2, 1, 8, 8), np.float32)
    part = stack_tiles([np.full((1, 4, 6), 40000, np.uint16)], out)
    assert part.shape == (1, 1, 4, 6)
    assert (part == 40000).all()
    assert part.flags.c_contiguous
    assert np.shares_memory(part, out)
    with pytest.raises(TypeError):
        stack_tiles([np.zeros((1, 4, 6), np.uint16)], np.zeros((1, 1, 8, 8), np.uint8))


def test_fp32_is_always_supported():
    assert "fp32" in supported_precisions("cpu")
    assert "fp16" not in supported_precisions("cpu")


@pytest.mark.parametrize(("has_bf16", "reduced"), [(True, ["fp16", "bf16"]), (False, ["fp16"])])
def test_a_gpu_that_only_emulates_bf16_is_not_given_it(has_bf16, reduced, monkeypatch):
    def supported(including_emulation=True):
        return including_emulation or has_bf16

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert list(supported_precisions("cuda:0")) == ["fp32", *reduced]
    assert choose_precision("auto", torch.device("cuda:0")) == reduced[-1]


@needs_openvino
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_openvino_takes_smaller_tiles_and_computes_the_same(precision, tmp_path, monkeypatch):
    if openvino_fits("cpu", precision):
        pytest.skip(openvino_fits("cpu", precision))
    monkeypatch.setenv("TILEPIPE_CACHE", str(tmp_path))
    model, plan = model_and_plan(tile=444)
    made = Settings(plan, "cpu", precision, "openvino", 2, 2)
    may = shapes.may_trim(made, model, dtype=np.dtype(np.uint8), looks=True)
    assert may == shapes.may_trim(made, model, dtype=np.dtype(np.uint8), looks=True)
    assert len(list(tmp_path.glob("shapes-*.json"))) == 1
    if precision == "fp32":
        assert may
    if not may:
        pytest.skip("the shape of a tile changes its last bits on this processor")
    backend = make_backend(
        "openvino", model, plan, batch=2, dtype=np.dtype(np.uint8), device="cpu",
        precision=precision, threads=2,
    )  # fmt: skip
    tile = np.random.default_rng(0).integers(0, 255, (3, 444, 444), dtype=np.uint8)
    account = Account()
    # All are under way at once, those of the same shape and others.
    cuts = [tile, tile[:, :316, :332], tile, tile[:, 16:, 32:364]]
    tickets = [
        backend.submit([cut] * count, account)
        for cut, count in zip(cuts, (1, 2, 2, 1), strict=False)
    ]
    whole, corner, again, right = (
        backend.collect(ticket, account).values.numpy().copy() for ticket in tickets
    )
    backend.close()
    assert whole.any()
    assert not whole.all()
    np.testing.assert_array_equal(again, np.concatenate([whole, whole]))
    for values in corner:
        np.testing.assert_array_equal(values, whole[0, :132, :148])
    np.testing.assert_array_equal(right[0, :240], whole[0, 16:, 32:180])


@needs_openvino
def test_without_a_network_of_any_shape_small_tiles_run_in_the_corner_of_whole_ones():
    model, plan = model_and_plan(tile=444)
    backend = make_backend(
        "openvino", model, plan, batch=2, dtype=np.dtype(np.uint8), device="cpu",
        precision="fp32", threads=1,
    )  # fmt: skip
    tile = np.random.default_rng(0).integers(0, 255, (3, 444, 444), dtype=np.uint8)
    account = Account()

    def ids(cut):
        return backend.collect(backend.submit([cut] * 2, account), account).values.numpy().copy()

    def refuse(error):
        raise error

    whole = ids(tile)
    assert whole[0, :132, :148].any()
    backend._compile_any = lambda: refuse(MemoryError())
    with pytest.raises(MemoryError):
        ids(tile[:, :316, :332])
    backend._compile_any = lambda: refuse(RuntimeError("no dynamic shapes"))
    ids(255 - tile)  # leaves other pixels behind
    for _ in range(backend.depth + 1):
        np.testing.assert_array_equal(ids(tile[:, :316, :332])[:, :132, :148], whole[:, :132, :148])
    np.testing.assert_array_equal(ids(tile), whole)
    backend.close()


def test_a_device_whose_bits_depend_on_the_shape_keeps_one(monkeypatch, tmp_path):
    monkeypatch.setenv("TILEPIPE_CACHE", str(tmp_path))
    model, plan = model_and_plan(tile=444)
    made = Settings(plan, "cpu", "fp32", "openvino", 1, 1)

    class Off:
        """Adds a bit in narrow tiles, as another kernel might."""

        def submit(self, tiles, account):
            return np.stack([t[:2, 92:-92, 92:-92] for t in tiles]).astype(np.float32)

        def collect(self, values, account):
            if values.shape[-1] < self.narrow_px:
                values[..., 3, 5] = np.nextafter(values[..., 3, 5], np.float32(1e9))
            return BatchResult(torch.from_numpy(values), True)

        def close(self) -> None:
            closed.append(self)

    closed = []
    off = Off()
    monkeypatch.setattr(shapes, "make_backend", lambda *args, **options: off)
    for narrow_px, same in ((0, True), (200, False)):
        off.narrow_px = narrow_px
        assert shapes.keeps_bits(made, model, dtype=np.dtype(np.uint8)) is same
    assert len(closed) == 2
    # What takes too long is not looked at, and what has no smaller tile has nothing to gain.
    off.narrow_px = 0
    for times, in_time in (((0, 13), False), ((0, 11, 13), False), ((0, 1, 5, 9), True)):
        ticks = iter(times)
        looked = shapes.keeps_bits(
            made, model, dtype=np.dtype(np.uint8), budget_s=25.0, clock=ticks.__next__
        )
        assert looked is in_time
        assert next(ticks, None) is None
    _, least = model_and_plan(tile=204)
    assert not shapes.keeps_bits(replace(made, plan=least), model, dtype=np.dtype(np.uint8))


@pytest.mark.parametrize(
    ("changes", "may"),
    [
        ({}, True),
        ({"device": "cuda:0"}, False),
        ({"cgm": "tile"}, False),
        ({"backend": "openvino"}, False),  # not looked at
        ({"precision": "bf16"}, False),  # with AMX torch's bits depend on the shape
    ],
)
def test_who_may_trim_without_a_look(changes, may):
    model, plan = model_and_plan()
    made = replace(Settings(plan, "cpu", "fp32", "torch", 1, 1), **changes)
    assert shapes.may_trim(made, model, dtype=np.dtype(np.uint8), looks=False) is may
    blended = replace(made, plan=replace(plan, mode="blended"))
    assert not shapes.may_trim(blended, model, dtype=np.dtype(np.uint8), looks=True)
