"""Probabilities beside class ids: quantised as said, the ids untouched, 0 where nothing ran."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import nn

from tests.cuda import FakeCuda, fake_cuda
from tilepipe.infer import Account, Engine, estimate_memory
from tilepipe.infer.backends import cpu_has_bf16, make_backend
from tilepipe.infer.network import TileNetwork, quantise
from tilepipe.infer.openvino import openvino_fits
from tilepipe.infer.plans import plan_for
from tilepipe.infer.recompute import compare_place
from tilepipe.infer.settings import Settings
from tilepipe.models import load_model
from tilepipe.spec import JobSpec, default_classes
from tilepipe.tiling import Box

EXTENT = (150, 130)
WHOLE = Box(0, 0, *EXTENT)


def read(box):
    rng = np.random.default_rng(3)
    return rng.integers(0, 256, (3, *EXTENT)).astype(np.uint8)[(slice(None), *box.slices)]


def small(name="unet", **options):
    return load_model(name, weights="random:1", base=2, **options)


def plan_of(model, tile=252, **spec):
    return plan_for(model, EXTENT, JobSpec(tile=tile, **spec), unit_px=256)[0]


def segment(model, plan, **options):
    engine = Engine(model, plan=plan, **options)
    try:
        return engine.segment(read, WHOLE)
    finally:
        engine.close()


@given(arrays.arrays(np.float32, (4, 5), elements=st.floats(0, 1, width=32)))
def test_a_byte_is_the_nearest_255th(probabilities):
    found = quantise(torch.from_numpy(probabilities)).numpy()
    assert found.dtype == np.uint8
    assert np.abs(found / 255 - probabilities.astype(np.float64)).max() <= 0.5 / 255 + 1e-7


@given(st.integers(0, 255))
def test_a_byte_comes_back_as_itself(value):
    assert int(quantise(torch.tensor(value / 255.0))) == value


@pytest.mark.parametrize("outputs", [1, 2, 5])
def test_channels_are_the_foreground_classes_in_order(outputs):
    """Logits that are the same everywhere: each channel can be said by hand."""

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, outputs, 3, padding=1)
            nn.init.zeros_(self.conv.weight)
            with torch.no_grad():
                self.conv.bias.copy_(torch.arange(outputs) - 0.75)

        def forward(self, x):
            return self.conv(x)

    classes = default_classes(max(2, outputs))
    model = replace(small(), module=Constant().eval(), n_outputs=outputs, classes=classes)
    logits = np.arange(outputs) - 0.75
    if outputs == 1:
        expected = 1 / (1 + np.exp(-logits))
    else:
        expected = (np.exp(logits) / np.exp(logits).sum())[1:]
    result = segment(model, replace(plan_of(model), margin_px=0), probabilities=True)
    assert result.probabilities.shape == (max(1, outputs - 1), *EXTENT)
    for channel, p in zip(result.probabilities, expected, strict=True):
        assert set(np.unique(channel)) == {round(255 * p)}


def ways():
    yield "cpu", {}
    yield "cpu bf16", {"precision": "bf16"}
    yield "cuda", {"backend": "cuda", "make": fake_cuda(FakeCuda()), "batch": 2}
    if not openvino_fits("cpu", "fp32"):
        yield "openvino", {"backend": "openvino", "batch": 2}
    if not openvino_fits("cpu", "bf16") and cpu_has_bf16():
        yield "openvino bf16", {"backend": "openvino", "precision": "bf16"}


@pytest.mark.parametrize("classes", [1, 2, 4])
@pytest.mark.parametrize(("way", "options"), [pytest.param(*w, id=w[0]) for w in ways()])
def test_ids_are_the_same_bytes_and_probabilities_agree_with_them(way, options, classes):
    model = small(classes=classes)
    plan = plan_of(model)
    plain = segment(model, plan, **options)
    both = segment(model, plan, probabilities=True, **options)
    assert plain.probabilities is None
    np.testing.assert_array_equal(both.ids, plain.ids)
    assert len(np.unique(plain.ids)) > 1
    # What is far from a tie has the class of its largest probability.
    planes = both.probabilities.astype(np.int64)
    every = np.concatenate([255 - planes.sum(axis=0, keepdims=True), planes])
    ranked = np.sort(every, axis=0)
    clear = ranked[-1] - ranked[-2] > 4 + classes
    assert clear.any()
    np.testing.assert_array_equal(every.argmax(axis=0)[clear], both.ids[clear])
    reference = segment(model, plan, probabilities=True).probabilities
    difference = np.abs(planes - reference)
    # Noise and random weights: bf16 flips single pixels, not the map.
    assert difference.mean() < (2 if "bf16" in way else 0.01)
    assert difference.max() <= (255 if "bf16" in way else 1)


@pytest.mark.parametrize(
    "backend", ["torch", *([] if openvino_fits("cpu", "fp32") else ["openvino"])]
)
def test_without_the_option_nothing_more_is_computed(backend):
    model = small()
    plan = plan_of(model)
    network = TileNetwork(model, plan, dtype=np.dtype(np.uint8), precision="fp32", output="ids")
    assert len(network(torch.zeros((1, 3, plan.input_px, plan.input_px)))) == 2
    made = make_backend(
        backend, model, plan, batch=1, dtype=np.dtype(np.uint8), device="cpu", precision="fp32"
    )
    asked = []

    def make(*args, **options):
        asked.append(options["output"])
        return make_backend(*args, **options)

    segment(model, plan, make=make)
    segment(model, plan, make=make, probabilities=True)
    assert asked == ["ids", "ids+probabilities"]
    tile = np.zeros((3, plan.input_px, plan.input_px), np.uint8)
    assert made.collect(made.submit([tile], Account()), Account()).probabilities is None
    made.close()


def test_blended_probabilities_are_those_that_give_the_ids():
    model = small("unet-dilated", classes=3)
    plan = plan_of(model, tile=None)
    assert plan.mode == "blended"
    plain = segment(model, plan)
    both = segment(model, plan, probabilities=True)
    np.testing.assert_array_equal(both.ids, plain.ids)
    assert both.probabilities.shape == (2, *EXTENT)
    planes = both.probabilities.astype(np.int64)
    every = np.concatenate([255 - planes.sum(axis=0, keepdims=True), planes])
    clear = np.sort(every, axis=0)[-1] - np.sort(every, axis=0)[-2] > 4
    assert clear.any()
    np.testing.assert_array_equal(every.argmax(axis=0)[clear], both.ids[clear])


@pytest.mark.parametrize("name", ["unet", "unet-dilated"])
def test_skipped_tiles_have_no_probability(name):
    model = small(name, classes=3)
    plan = plan_of(model, tile=252 if name == "unet" else None)
    engine = Engine(model, plan=plan, probabilities=True)
    nothing = engine.segment(read, WHOLE, skip=lambda box: True)
    assert nothing.facts["tiles_skipped"] > 0
    assert nothing.probabilities.shape == (2, *EXTENT)
    assert not nothing.probabilities.any()
    engine.close()


def gated(bias):
    """A network with a gate that is always open or always closed."""
    model = small("unet3plus-cgm", classes=2)

    class Gated(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

        def gate_logits(self, x, *, crop_px=0):
            return torch.full((x.shape[0],), bias)

    return replace(model, module=Gated(model.module))


@pytest.mark.parametrize("bias", [-1e4, 1e4])
def test_a_closed_gate_closes_the_probabilities(bias):
    model = gated(bias)
    result = segment(model, plan_of(model, tile=None), probabilities=True, cgm="tile")
    assert result.probabilities.any() == (bias > 0)
    assert result.ids.any() <= (bias > 0)


@pytest.mark.parametrize("bias", [-1e4, 1e4])
def test_the_gated_reference_of_verify_is_gated(bias):
    model = gated(bias)
    plan = plan_of(model, tile=None)
    settings = Settings(plan, "cpu", "fp32", "torch", 1, 1, cgm="tile")
    result = segment(model, plan, probabilities=True, cgm="tile")
    found = compare_place(
        model, settings, WHOLE, result.ids, read, probabilities=result.probabilities
    )
    assert (found.flips, found.ties) == (0, 0)
    assert found.probability_off <= 1
    other = compare_place(
        model, settings, WHOLE, result.ids, read, probabilities=result.probabilities ^ 128
    )
    assert other.probability_off >= 127


def test_the_bill_counts_the_maps():
    model = small(classes=4)
    settings = Settings(plan_of(model), "cpu", "fp32", "torch", 1, 1)
    plain = estimate_memory(model, settings)
    assert estimate_memory(model, settings, probabilities=True) > plain
