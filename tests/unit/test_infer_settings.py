"""Settings: mode, halo, precision and back-end follow from the network, the machine, the guard."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tilepipe.errors import ModelError, PlanError
from tilepipe.infer import Settings, backends, choose_settings, guard
from tilepipe.infer import settings as room
from tilepipe.infer.backends import resolve_device
from tilepipe.infer.plans import even_core, plan_for
from tilepipe.models import Locality, Model, Normalisation, load_model
from tilepipe.spec import JobSpec, default_classes
from tilepipe.tiling import Box

BIG = (9000, 9000)


class Level(nn.Module):
    """Class 1 where the pixel is above ``at``; reduced precision turns a share of them."""

    def __init__(self, at: float = 0.5) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.tensor(at), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(x), x - self.at.to(x.dtype)], dim=1)


def toy(module: nn.Module | None = None, **locality) -> Model:
    values = {
        "kind": "local",
        "reason": "",
        "context": (3,) * 4,
        "reach_px": 3,
        "alignment_px": 4,
        "margin_px": 0,
        "least_input_px": 16,
        "input_step_px": 4,
        **locality,
    }
    return Model(
        name="toy",
        module=(module or Level()).eval(),
        arguments={},
        in_channels=1,
        n_outputs=2,
        classes=default_classes(2),
        normalisation=Normalisation(),
        mpp=None,
        locality=Locality(**values),
        sha256="0" * 64,
        source="test",
    )


def noise(box) -> np.ndarray:
    rows, columns = np.ogrid[box.slices]
    return (((rows * 7919 + columns * 104729) >> 3) % 251).astype(np.uint8)[None]


def choose(model: Model | None = None, extent=(500, 700), read=None, **spec) -> Settings:
    return choose_settings(
        model or toy(), extent=extent, spec=JobSpec(tune=False, **spec), channels=1, read=read
    )


def test_the_papers_network_writes_384_of_388():
    model = load_model("unet", weights="random:0", base=2)
    plan = choose_settings(model, extent=BIG, spec=JobSpec(tile=572, tune=False)).plan
    assert (plan.input_px, plan.core_px, plan.output_px) == (572, 384, 388)
    assert plan.mode == "exact"


def test_a_small_level_is_exact_fp32_on_torch():
    chosen = choose(read=noise)
    assert (chosen.precision, chosen.backend, chosen.plan.mode) == ("fp32", "torch", "exact")
    assert chosen.guard is None


def test_json_round_trip():
    chosen = choose(extent=BIG, read=noise)
    assert Settings.from_json(json.loads(json.dumps(chosen.to_json()))) == chosen
    with pytest.raises(PlanError, match="recorded settings cannot be read"):
        Settings.from_json({"plan": chosen.plan.to_json(), "wings": 2})
    with pytest.raises(PlanError):
        Settings.from_json({})


def test_a_halo_that_is_too_small_is_corrected_and_says_both_numbers():
    chosen = choose(toy(context=(58,) * 4, reach_px=58), halo=32)
    assert chosen.plan.halo_px == 60
    note = next(note for note in chosen.notes if "warning" in note)
    assert "--halo 32 px" in note
    assert "58 px" in note
    assert "60 px" in note


def test_a_wider_halo_is_kept():
    assert choose(halo=40).plan.halo_px == 40
    assert choose(halo=40).notes == ()


@pytest.mark.parametrize("kind", ["never", "global"])
def test_what_cannot_be_exact_is_blended_and_says_why(kind):
    model = toy(kind=kind, reason="instance norm in net.norm")
    chosen = choose(model, read=noise)
    assert chosen.plan.mode == "blended"
    assert "instance norm in net.norm" in chosen.notes[0]
    assert chosen.blend_error is not None
    assert chosen.blend_error["flips"] == 0
    with pytest.raises(PlanError, match="can never be tiled exactly: instance norm"):
        choose(model, exact=True)


def test_a_blend_whose_error_is_not_measured_says_so():
    """A coarser level of a slide that is copied does not exist yet."""
    blind, seeing = (choose(toy(kind="never"), read=read) for read in (None, noise))
    assert blind.blend_error is None
    assert "how far blended tiles are off is not measured" in blind.notes[-1]
    assert "not measured" not in " ".join(seeing.notes)


def test_wide_context_is_blended_unless_exact_is_forced():
    wide = toy(context=(600,) * 4, reach_px=600)
    assert choose(wide).plan.mode == "blended"
    forced = choose(wide, extent=(1000, 1000), exact=True)
    assert forced.plan.mode == "exact"
    assert forced.plan.halo_px == 600
    assert any("costs" in note or "cost" in note for note in forced.notes)


def test_blended_halo_can_be_chosen_and_margin_counts():
    model = toy(kind="never", reason="skips are stretched", margin_px=20)
    assert choose(model).plan.halo_px == 148
    assert choose(model, halo=220).plan.halo_px == 220


def test_channels_that_do_not_fit():
    with pytest.raises(ModelError, match="takes 1 channels and the image has 3"):
        choose_settings(toy(), extent=BIG, spec=JobSpec(), channels=3)


def test_a_tile_the_network_cannot_take():
    with pytest.raises(PlanError, match="next legal one is --tile 36"):
        choose(tile=33)


def test_guard_lets_reduced_precision_through_or_not(monkeypatch):
    monkeypatch.setattr(room, "supported_precisions", lambda device: ("fp32", "bf16"))
    monkeypatch.setattr(room, "openvino_fits", lambda *a, **k: "not here")
    # 0.999 is above all pixels; 0.501957 is just below the pixel 128 / 255 and the same number in
    # bf16.
    passed = choose(toy(Level(0.999)), extent=BIG, read=noise)
    assert passed.precision == "bf16"
    assert passed.guard is not None
    assert passed.guard["flips"] == 0
    fell = choose(toy(Level(0.501957)), extent=BIG, read=noise, tolerance=0.0)
    assert fell.precision == "fp32"
    assert fell.guard is not None
    assert fell.guard["flips"] > 0
    assert any("fp32: bf16 flips" in note for note in fell.notes)


def test_without_pixels_there_is_nothing_to_compare(monkeypatch):
    monkeypatch.setattr(room, "supported_precisions", lambda device: ("fp32", "bf16"))
    chosen = choose(extent=BIG)
    assert chosen.precision == "fp32"
    assert any("no pixels to compare" in note for note in chosen.notes)


def no_memory(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB")


def test_a_full_device_compares_nothing_and_the_job_goes_on(monkeypatch):
    """Another program's GPU: what a job then does with what is left is the engine's matter."""
    monkeypatch.setattr(room, "supported_precisions", lambda device: ("fp32", "bf16"))
    monkeypatch.setattr(backends.TorchCpuBackend, "submit", no_memory)
    chosen = choose(extent=BIG, read=noise, backend="torch")
    assert (chosen.precision, chosen.guard) == ("fp32", None)
    assert "fp32: cpu has no memory to compare bf16 with it" in chosen.notes
    blended = choose(toy(kind="never", reason="skips are stretched"), read=noise)
    assert blended.blend_error is None
    assert any("not measured: cpu has no memory for a larger tile" in n for n in blended.notes)


def test_asked_precision_is_taken(monkeypatch):
    monkeypatch.setattr(room, "supported_precisions", lambda device: ("fp32",))
    chosen = choose(precision="bf16")
    assert chosen.precision == "bf16"
    assert any("no fast bf16" in note for note in chosen.notes)


def test_asked_backend_that_cannot_run(monkeypatch):
    monkeypatch.setattr(room, "openvino_fits", lambda *a, **k: "OpenVINO is not installed")
    with pytest.raises(ModelError, match="--backend openvino: OpenVINO is not installed"):
        choose(backend="openvino")


def test_a_device_that_is_not_there():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ModelError, match=r"--device cuda:3: this machine has 0 CUDA devices"):
        resolve_device("cuda:3")
    assert resolve_device("auto") == "cpu"


@pytest.mark.parametrize(
    ("built", "count", "told"),
    [
        (None, 0, "0 CUDA devices that torch can use (torch 2.99 is built without CUDA); use"),
        ("13.9", 0, "(torch 2.99 needs a driver for CUDA 13.9; nvidia-smi tells whether there is"),
        ("13.9", 2, "2 CUDA devices that torch can use; use --device cpu"),
    ],
)
def test_what_torch_lacks_for_a_gpu_is_told(monkeypatch, built, count, told):
    monkeypatch.setattr(torch, "__version__", "2.99")
    monkeypatch.setattr(torch.version, "cuda", built)
    monkeypatch.setattr(backends, "gpu_count", lambda: count)
    with pytest.raises(ModelError, match=re.escape(told)):
        resolve_device("cuda:3")


def test_even_cores_cut_a_unit_without_rest():
    assert even_core(4096, (9000, 9000), 1024, 16) == 1024
    assert even_core(2048, (9000, 9000), 1344, 16) == 1024
    assert even_core(4096, (9000, 9000), 1344, 16) == 1376
    assert even_core(4096, (100, 130), 1024, 16) == 144


def test_samples_are_on_the_alignment_and_where_there_is_texture():
    plan = choose(extent=BIG).plan

    def read(box) -> np.ndarray:
        image = np.full((1, *box.shape), 240, np.uint8)
        if box.y0 > 6000 and box.x0 < 3000:
            image[:] = noise(box)
        return image

    boxes = list(guard.sample_boxes(replace(plan, core_px=512), read))
    assert len(boxes) == guard.SAMPLES
    assert all((box.y0 + plan.halo_px) % 4 == 0 for box in boxes)
    assert boxes[0].y0 > 5000
    assert boxes[0].x0 < 3000


@pytest.mark.parametrize("tissue", ["a little", "a lot"])
def test_samples_lie_in_tissue_however_little_there_is(tissue):
    """On glass no precision flips a class: what it does to the tissue would never be seen."""
    plan = choose(extent=BIG).plan
    side = {"a little": 700, "a lot": 6000}[tissue]
    spot = Box(1200, 1200, 1200 + side, 1200 + side)
    glass = np.array([244, 238, 230], np.uint8)[:, None, None]
    seen = []

    def read(box) -> np.ndarray:
        seen.append(box)
        rng = np.random.default_rng(box.y0 * 10007 + box.x0)
        image = glass + rng.integers(-2, 3, (3, *box.shape), dtype=np.int16).astype(np.uint8)
        inside = box.intersect(spot)
        if inside.area:
            image[(slice(None), *inside.shift(-box.y0, -box.x0).slices)] = noise(inside)
        return image

    boxes = list(guard.sample_boxes(replace(plan, core_px=512), read))
    assert boxes[0].intersect(spot).area > 0.1 * boxes[0].area
    looks = guard.CANDIDATES**2 + (guard.MANY_CANDIDATES**2 if tissue == "a little" else 0)
    assert len(seen) == looks


@pytest.mark.parametrize(
    ("unit_px", "tile_px", "extent", "way"),
    [
        (512, 228, BIG, "; a larger --tile costs less"),
        (64, None, BIG, "; a larger --unit costs less"),
        (64, 400, BIG, "; a larger --unit costs less"),  # a larger tile would cost more still
        (512, None, (60, 50), " input pixels"),
    ],
)
def test_a_halo_that_costs_much_is_told_with_what_helps(unit_px, tile_px, extent, way):
    model = toy(context=(100,) * 4, reach_px=100)
    _, notes = plan_for(model, extent, JobSpec(tile=tile_px), unit_px=unit_px)
    assert len(notes) == 1
    assert notes[0].endswith(way)


def test_blended_tiles_that_are_nearly_all_halo_are_told_too():
    model = toy(kind="never")
    _, usual = plan_for(model, BIG, JobSpec(), unit_px=64)
    assert not any("input pixels" in note for note in usual)
    plan, notes = plan_for(model, BIG, JobSpec(tile=288), unit_px=64)
    assert (plan.mode, plan.core_px) == ("blended", 32)
    assert "each output pixel cost 81.0 input pixels; a larger --tile costs less" in notes[-1]


@pytest.mark.parametrize("kind", ["local", "never"])
def test_what_is_measured_sees_pixels_without_data_as_a_run_does(monkeypatch, kind):
    """They are 0 to the network: one NaN would be one of every figure, and no JSON."""
    monkeypatch.setattr(room, "supported_precisions", lambda _: ("fp32", "bf16"))
    pixels = np.random.default_rng(0).random((1, 4300, 4200), np.float32)
    pixels[:, 2000:2300, 2000:2300] = np.nan
    pixels[:, 400, 400] = np.inf

    def measured(pixels):
        chosen = choose_settings(
            toy(kind=kind),
            extent=pixels.shape[1:],
            spec=JobSpec(tune=False, backend="torch", tolerance=1.0, device="cpu"),
            dtype=np.float32,
            unit_px=512,
            read=lambda box: pixels[(slice(None), *box.slices)],
        )
        return json.dumps([chosen.guard, chosen.blend_error], allow_nan=False)

    assert measured(pixels) == measured(np.nan_to_num(pixels, nan=0, posinf=0))
