"""The engine: reads once, cuts, stitches; what it does when memory or precision runs out."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tilepipe.errors import ModelError
from tilepipe.infer import Account, Engine
from tilepipe.infer.backends import make_backend, means_out_of_memory
from tilepipe.infer.coverage import is_checked
from tilepipe.infer.plans import plan_for
from tilepipe.models import Locality, Model, Normalisation, load_model
from tilepipe.spec import JobSpec, default_classes
from tilepipe.tiling import Box, plan_tiles


class Sum(nn.Module):
    """Sum over a (2r + 1)² neighbourhood, zero padded: shows which pixels were read."""

    def __init__(self, channels: int, reach: int) -> None:
        super().__init__()
        side = 2 * reach + 1
        self.conv = nn.Conv2d(channels, 2, side, padding=reach)
        nn.init.ones_(self.conv.weight)
        with torch.no_grad():
            self.conv.weight[0] = 0
            self.conv.bias.copy_(torch.tensor([0.0, -0.5]))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def model_of(module: nn.Module, *, reach: int = 3, channels: int = 1, outputs: int = 2) -> Model:
    return Model(
        name="toy",
        module=module.eval().requires_grad_(False),
        arguments={},
        in_channels=channels,
        n_outputs=outputs,
        classes=default_classes(max(2, outputs)),
        normalisation=Normalisation(),
        mpp=None,
        locality=Locality("local", "", (reach,) * 4, reach, 4, 0, 8, 4),
        sha256="0" * 64,
        source="test",
    )


def plan_of(model: Model, extent, *, unit_px=32, input_px=24, mode="exact", halo_px=None):
    locality = model.locality
    return plan_tiles(
        extent,
        unit_px=unit_px,
        context_px=locality.context_px,
        alignment_px=locality.alignment_px,
        margin_px=locality.margin_px,
        least_input_px=locality.least_input_px,
        input_step_px=locality.input_step_px,
        input_px=input_px,
        halo_px=halo_px,
        mode=mode,
    )


def zeros(box: Box) -> np.ndarray:
    return np.zeros((1, *box.shape), np.uint8)


def reader(image):
    return lambda box: image[(slice(None), *box.slices)]


def run(engine: Engine, image, plan):
    out = np.full(plan.extent, 255, np.uint8)
    for unit in plan.grid:
        out[unit.box.slices] = engine.segment(reader(image), unit.box).ids
    return out


@pytest.mark.parametrize("extent", [(32, 32), (1, 1), (70, 41), (5, 100)])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_lone_pixel_is_seen_exactly_as_far_as_the_network_reaches(extent, batch):
    model = model_of(Sum(1, 3))
    plan = plan_of(model, extent)
    for y, x in {(0, 0), (extent[0] // 2, extent[1] // 2), (extent[0] - 1, extent[1] - 1)}:
        image = np.zeros((1, *extent), np.uint8)
        image[0, y, x] = 255
        padded = np.pad(image[0], 8, mode="reflect") if min(extent) > 8 else None
        out = run(Engine(model, plan=plan, batch=batch), image, plan)
        rows = slice(max(0, y - 3), y + 4)
        columns = slice(max(0, x - 3), x + 4)
        assert out[rows, columns].all()
        if padded is not None:
            lit = np.argwhere(padded)
            expected = np.zeros(extent, bool)
            for py, px in lit - 8:
                expected[max(0, py - 3) : max(0, py + 4), max(0, px - 3) : max(0, px + 4)] = True
            np.testing.assert_array_equal(out.astype(bool), expected)


def test_reads_each_unit_once_and_inside_the_level():
    model = model_of(Sum(1, 3))
    plan = plan_of(model, (70, 41))
    boxes = []

    def read(box: Box) -> np.ndarray:
        boxes.append(box)
        assert Box(0, 0, 70, 41).contains(box)
        return np.zeros((1, *box.shape), np.uint8)

    engine = Engine(model, plan=plan)
    for unit in plan.grid:
        engine.segment(read, unit.box)
        assert plan.footprint(unit.box).contains(boxes[-1])
    assert len(boxes) == len(plan.grid)


def test_lanes_share_one_engine():
    model = model_of(Sum(1, 3))
    rng = np.random.default_rng(0)
    image = (rng.random((1, 128, 128)) < 0.02).astype(np.uint8) * 255
    plan = plan_of(model, (128, 128))
    expected = run(Engine(model, plan=plan), image, plan)
    account = Account()
    engine = Engine(model, plan=plan, account=account)
    out = np.zeros_like(expected)

    def lane(unit) -> None:
        result = engine.segment(reader(image), unit.box)
        out[unit.box.slices] = result.ids

    with ThreadPoolExecutor(4) as lanes:
        list(lanes.map(lane, plan.grid))
    engine.close()
    np.testing.assert_array_equal(out, expected)
    assert {"read", "compute"} <= set(account.seconds)


def test_facts_are_plain_and_say_the_seconds():
    model = model_of(Sum(1, 3))
    plan = plan_of(model, (32, 32))
    result = Engine(model, plan=plan).segment(zeros, Box(0, 0, 32, 32))
    assert result.facts["precision"] == "fp32"
    assert result.facts["tiles"] == 4
    assert "compute" in result.facts["seconds"]
    assert "oom" not in result.facts


@pytest.mark.parametrize("dtype", [np.uint16, np.float32, ">u2", np.int16])
def test_other_dtypes(dtype):
    model = model_of(Sum(1, 3))
    plan = plan_of(model, (40, 40))
    image = np.zeros((1, 40, 40), dtype)
    image[0, 20, 20] = 65535 if np.dtype(dtype).kind == "u" else 1
    out = run(Engine(model, plan=plan), image, plan)
    assert out.sum() == 49


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, np.finfo(np.float32).min, 1.1e30])
def test_pixels_without_data_do_not_spoil_their_neighbours(value):
    """GDAL's own "no data" of float32 is its lowest number, which overflows in any network."""
    model = model_of(Sum(1, 3))
    plan = plan_of(model, (16, 16), unit_px=16)
    image = np.ones((1, 16, 16), np.float32)
    image[0, 8, 8] = value
    result = Engine(model, plan=plan).segment(reader(image), Box(0, 0, 16, 16))
    assert result.ids.all()
    assert result.facts["not_finite_px"] == 1


def test_px_that_are_not_finite_are_counted_once():
    """Not again as the halo of a neighbour, mirrored, or in each channel."""
    model = model_of(Sum(3, 3), channels=3)
    plan = plan_of(model, (40, 24), unit_px=16)
    image = np.ones((3, 40, 24), np.float32)
    image[:, 1, 1] = np.nan
    image[0, 14:18, 15] = np.inf
    engine = Engine(model, plan=plan)
    told = [engine.segment(reader(image), unit.box).facts for unit in plan.grid]
    assert sum(facts.get("not_finite_px", 0) for facts in told) == 5


def test_wrong_channels_are_named():
    model = model_of(Sum(3, 1), channels=3)
    plan = plan_of(model, (16, 16))
    with pytest.raises(ModelError, match="takes 3 channels and the image has 1"):
        Engine(model, plan=plan).segment(zeros, Box(0, 0, 16, 16))


def test_cgm_without_a_gate_is_refused():
    model = model_of(Sum(1, 3))
    with pytest.raises(ModelError, match="--cgm slide needs a classification gate"):
        Engine(model, plan=plan_of(model, (16, 16)), cgm="slide")


def test_many_classes_and_sigmoid():
    class Steps(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([-((x * 255 - level) ** 2) for level in range(30)], dim=1)

    image = np.arange(32, dtype=np.uint8)[None, None].repeat(32, axis=1) % 30
    for outputs in (3, 30):
        model = model_of(Steps(), outputs=outputs)
        plan = plan_of(model, (32, 32))

        class Some(nn.Module):
            def forward(self, x: Tensor, outputs: int = outputs) -> Tensor:
                return Steps()(x)[:, :outputs]

        model = replace(model, module=Some())
        out = run(Engine(model, plan=plan), image, plan)
        np.testing.assert_array_equal(out, np.minimum(image[0], outputs - 1))

    class Above(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - 0.5

    model = model_of(Above(), outputs=1)
    plan = plan_of(model, (32, 32))
    image = (np.arange(1024, dtype=np.uint16).reshape(1, 32, 32) % 256).astype(np.uint8)
    np.testing.assert_array_equal(run(Engine(model, plan=plan), image, plan), image[0] > 127)


class Limited:
    """A back-end that has room for so many pixels in a batch, and no more."""

    def __init__(self, inner, batch: int, most_px: int) -> None:
        self.inner, self.batch, self.most_px = inner, batch, most_px
        self.name, self.precision, self.depth = inner.name, inner.precision, inner.depth
        self.result_device = inner.result_device

    def submit(self, tiles, account):
        side = tiles[0].shape[-1]
        if self.batch * side**2 > self.most_px:
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate")
        return self.inner.submit(tiles, account)

    def is_done(self, ticket, *, within_s):
        return self.inner.is_done(ticket, within_s=within_s)

    def collect(self, ticket, account):
        return self.inner.collect(ticket, account)

    def close(self) -> None:
        self.inner.close()


def limited(most_px: int):
    def make(name, model, plan, **options):
        return Limited(make_backend(name, model, plan, **options), options["batch"], most_px)

    return make


def test_out_of_memory_halves_the_batch_then_the_tile():
    model = model_of(Sum(1, 3))
    rng = np.random.default_rng(0)
    image = (rng.random((1, 64, 64)) < 0.02).astype(np.uint8) * 255
    plan = plan_of(model, (64, 64), unit_px=64, input_px=72)
    expected = run(Engine(model, plan=plan), image, plan)
    engine = Engine(model, plan=plan, batch=4, make=limited(44 * 44))
    result = engine.segment(reader(image), Box(0, 0, 64, 64))
    np.testing.assert_array_equal(result.ids, expected)
    assert result.facts["oom"] == 3
    assert result.facts["oom_events"] == ["batch 4 -> 2", "batch 2 -> 1", "tile 72 -> 40 px"]
    assert engine.plan.input_px == 40
    assert engine.batch == 1
    again = engine.segment(reader(image), Box(0, 0, 64, 64))
    assert "oom" not in again.facts


def test_out_of_memory_for_the_smallest_tile_is_an_error_with_a_way_out():
    model = model_of(Sum(1, 3))
    plan = plan_of(model, (64, 64))
    engine = Engine(model, plan=plan, make=limited(10))
    with pytest.raises(ModelError, match=r"does not fit the memory of cpu.*smaller --tile"):
        engine.segment(zeros, Box(0, 0, 32, 32))


def test_out_of_memory_changes_no_tile_that_is_gated_by_itself():
    """A smaller tile has another gate: the mask would be another, and verify would refuse it."""
    model = load_model("unet3plus-cgm", weights="random:1", in_channels=1, base=2)
    tile_px = model.next_legal(32 + 2 * model.locality.halo_px)
    spec = JobSpec(tile=tile_px, cgm="tile")
    plan, _ = plan_for(model, (64, 64), spec, unit_px=64)
    most_px = tile_px**2 - 1
    engine = Engine(model, plan=plan, batch=2, cgm="tile", make=limited(most_px))
    with pytest.raises(ModelError, match=r"does not fit the memory of cpu.*smaller --tile"):
        engine.segment(zeros, Box(0, 0, 64, 64))
    assert engine.plan == plan


def test_lanes_that_meet_out_of_memory_together_shrink_once():
    model = model_of(Sum(1, 3))
    plan = plan_of(model, (128, 128), unit_px=32, input_px=40)
    engine = Engine(model, plan=plan, batch=4, make=limited(2 * 40 * 40))
    barrier = threading.Barrier(4)

    def lane(unit):
        barrier.wait(timeout=20)
        return engine.segment(zeros, unit.box)

    with ThreadPoolExecutor(4) as lanes:
        results = list(lanes.map(lane, list(plan.grid)[:4]))
    assert engine.batch == 2
    done = [fact for result in results for fact in result.facts.get("oom_events", [])]
    assert done.count("batch 4 -> 2") == 1


def test_what_ran_the_larger_batch_gives_its_memory_back():
    """A device with room for one back-end of four tiles, and the unit is redone by a second."""
    model = model_of(Overflowing())
    plan = plan_of(model, (64, 64), unit_px=64, input_px=32)
    open_batches = []

    class Held:
        def __init__(self, inner, batch) -> None:
            self.inner, self.batch = inner, batch
            open_batches.append(batch)

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def close(self) -> None:
            open_batches.remove(self.batch)
            self.inner.close()

    def make(name, model, plan, **options):
        if sum(open_batches) + options["batch"] > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return Held(make_backend(name, model, plan, **options), options["batch"])

    engine = Engine(model, plan=plan, precision="bf16", batch=4, make=make)
    result = engine.segment(zeros, Box(0, 0, 64, 64))
    assert result.facts["oom_events"] == ["batch 4 -> 2"]
    assert open_batches == [2]
    engine.close()
    assert open_batches == []


def test_other_errors_pass_through():
    model = model_of(Sum(1, 3))

    def read(box: Box) -> np.ndarray:
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        Engine(model, plan=plan_of(model, (16, 16))).segment(read, Box(0, 0, 16, 16))


class Overflowing(nn.Module):
    """Finite in float32, not in float16."""

    def forward(self, x: Tensor) -> Tensor:
        big = x * 1e30 if x.dtype == torch.float32 else x * float("inf")
        return torch.cat([torch.full_like(big, 1e29), big], dim=1)


def test_overflow_is_redone_in_float32():
    model = model_of(Overflowing())
    plan = plan_of(model, (32, 32))
    image = np.zeros((1, 32, 32), np.uint8)
    image[0, :, 16:] = 255
    engine = Engine(model, plan=plan, precision="bf16")
    result = engine.segment(reader(image), Box(0, 0, 32, 32))
    np.testing.assert_array_equal(result.ids, image[0] > 0)
    assert result.facts["redone_fp32"] is True
    assert result.facts["precision"] == "fp32"


def test_words_that_mean_out_of_memory():
    assert means_out_of_memory(MemoryError())
    assert means_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert means_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    for told in (
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "GET was unable to find an engine to execute this computation",
        "upsample_bilinear2d_nhwc only supports output tensors with less than INT_MAX elements, "
        "but got [1, 1024, 2272, 2272]",
        "input tensor must fit into 32-bit index math",
    ):
        assert means_out_of_memory(RuntimeError(told))
    assert not means_out_of_memory(RuntimeError("shape mismatch"))
    assert not means_out_of_memory(ValueError("out of memory"))


def test_skipped_tiles_are_background_and_some_are_run_to_know_the_loss():
    model = model_of(Sum(1, 3))
    plan = plan_of(model, (256, 256), unit_px=256, input_px=24)
    image = np.full((1, 256, 256), 255, np.uint8)
    asked = []

    def skip(box: Box) -> bool:
        asked.append(box)
        return box.x0 >= 128

    read_boxes = []

    def read(box: Box) -> np.ndarray:
        read_boxes.append(box)
        return image[(slice(None), *box.slices)]

    result = Engine(model, plan=plan).segment(read, Box(0, 0, 256, 256), skip=skip)
    assert all(box.shape == (22, 22) or box.y1 > 256 or box.x1 > 256 for box in asked)
    n = result.facts["tiles"] + result.facts["tiles_skipped"]
    assert n == plan.n_tiles(Box(0, 0, 256, 256)) == len(asked)
    assert result.ids[:, :128].all()
    assert not result.ids[:, 150:].any()
    # All that was skipped here should not have been: the sampled loss says so.
    assert result.facts["skipped_lost_px"] == result.facts["skipped_checked_px"] > 0
    assert max(box.x1 for box in read_boxes[:1]) < 160


def test_a_unit_that_is_skipped_whole_is_not_even_read():
    model = model_of(Sum(1, 3))
    plan = plan_of(model, (64, 64), unit_px=64, input_px=72)
    assert not is_checked(plan, next(plan.tiles(Box(0, 0, 64, 64))))

    def read(box: Box) -> np.ndarray:
        raise AssertionError("read")

    engine = Engine(model, plan=plan)
    result = engine.segment(read, Box(0, 0, 64, 64), skip=lambda box: box.y0 > -100)
    assert result.facts["tiles_skipped"] == 1 - result.facts["tiles"] == 1
    assert not result.ids.any()


@pytest.mark.parametrize("trims", [True, False])
def test_empty_parts_of_a_tile_are_left_out_where_tiles_may_be_trimmed(trims):
    model = model_of(Sum(1, 3))
    plan = plan_of(model, (256, 256), unit_px=256, input_px=264)
    image = np.zeros((1, 256, 256), np.uint8)
    image[0, 5::9, 3::11] = 255
    everything = Engine(model, plan=plan).segment(reader(image), Box(0, 0, 256, 256))
    boxes = []

    def read(box: Box) -> np.ndarray:
        boxes.append(box)
        return image[(slice(None), *box.slices)]

    def skip(box: Box) -> bool:
        return box.x0 >= 60 or box.y1 < 140

    result = Engine(model, plan=plan, trims=trims).segment(read, Box(0, 0, 256, 256), skip=skip)
    wanted = Box(128, 0, 256, 64) if trims else Box(0, 0, 256, 256)
    np.testing.assert_array_equal(result.ids[wanted.slices], everything.ids[wanted.slices])
    assert everything.ids[wanted.slices].any()
    if not trims:
        assert "computed" not in result.facts
        return
    assert result.ids.sum() == result.ids[wanted.slices].sum()
    assert result.facts["computed"] == [[128, 0, 256, 64]]
    assert result.facts["skipped_px"] == 256 * 256 - 128 * 64
    assert (result.facts["tiles"], result.facts["tiles_skipped"]) == (1, 0)
    assert max(box.x1 for box in boxes) < 80
    assert min(box.y0 for box in boxes) > 120


def test_what_a_trimmed_tile_loses_is_sampled(monkeypatch):
    monkeypatch.setattr("tilepipe.infer.coverage.is_checked", lambda plan, tile: True)
    model = model_of(Sum(1, 3))
    plan = plan_of(model, (256, 256), unit_px=256, input_px=264)
    image = np.full((1, 256, 256), 255, np.uint8)
    engine = Engine(model, plan=plan, trims=True)
    result = engine.segment(reader(image), Box(0, 0, 256, 256), skip=lambda box: box.x0 >= 60)
    assert result.facts["skipped_px"] == result.facts["skipped_checked_px"] == 256 * 192
    assert result.facts["skipped_lost_px"] == 256 * 192
    assert not result.ids[:, 64:].any()


def test_a_gate_looks_at_whole_tiles():
    model = load_model("unet3plus-cgm", weights="random:1", base=2)
    plan, _ = plan_for(model, (150, 120), JobSpec(tile=288, cgm="tile"), unit_px=128)
    engine = Engine(model, plan=plan, cgm="tile", trims=True)
    tiles = list(plan.tiles(Box(128, 0, 150, 120)))
    assert engine._trimmed(plan, tiles) == tiles
