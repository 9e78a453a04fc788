"""Tiled equals whole for probabilities: one count of 255 apart at most, from float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tilepipe.infer import Engine
from tilepipe.infer.network import TileNetwork
from tilepipe.infer.openvino import openvino_fits
from tilepipe.infer.plans import plan_for
from tilepipe.models import load_model
from tilepipe.spec import JobSpec
from tilepipe.tiling import Box, read_mirrored, round_up

EXTENT = (187, 150)


def drawn():
    rng = np.random.default_rng(1)
    rows, columns = np.mgrid[0 : EXTENT[0], 0 : EXTENT[1]]
    waves = 128 + 70 * np.sin(rows / 9) * np.cos(columns / 13)
    return np.clip(waves + rng.normal(0, 25, (3, *EXTENT)), 0, 255).astype(np.uint8)


def reader(image):
    return lambda box: image[(slice(None), *box.slices)]


def whole_counts(model, image, plan):
    """(classes - 1, y, x) float64, 0 to 255: the level mirrored once, run as one tensor."""
    halo = plan.halo_px
    sides = [
        model.locality.next_legal(round_up(side, plan.alignment_px) + 2 * halo) for side in EXTENT
    ]
    box = Box(-halo, -halo, sides[0] - halo, sides[1] - halo)
    padded = read_mirrored(reader(image), box, EXTENT)
    network = TileNetwork(model, plan, dtype=image.dtype, precision="fp64", output="logits")
    with torch.inference_mode():
        logits = network.network(network.normalise(torch.from_numpy(padded)[None]))[0].numpy()
    start = plan.crop_px
    logits = logits[:, start : start + EXTENT[0], start : start + EXTENT[1]]
    assert logits.dtype == np.float64
    if model.n_outputs == 1:
        return 255 / (1 + np.exp(-logits))
    shares = np.exp(logits - logits.max(axis=0))
    return 255 * (shares / shares.sum(axis=0))[1:]


CASES = [
    ("unet", 1, "torch"),
    ("unet", 3, "torch"),
    ("unet", 3, "openvino"),
    ("unet-same", 2, "torch"),
    pytest.param("unet3plus", 3, "torch", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "classes", "backend"), CASES)
def test_tiled_probabilities_are_the_whole_images(name, classes, backend):
    if backend == "openvino" and openvino_fits("cpu", "fp32"):
        pytest.skip("no OpenVINO here")
    model = load_model(name, weights="random:1", base=2, classes=classes)
    image = drawn()
    tile = model.next_legal(64 + 2 * model.locality.halo_px)
    plan, _ = plan_for(model, EXTENT, JobSpec(tile=tile), unit_px=128)
    assert plan.mode == "exact"
    found = np.full((max(1, classes - 1), *EXTENT), 77, np.uint8)
    engine = Engine(model, plan=plan, backend=backend, batch=2, probabilities=True, trims=True)
    for unit in plan.grid:
        result = engine.segment(reader(image), unit.box)
        found[(slice(None), *unit.box.slices)] = result.probabilities
    engine.close()
    expected = whole_counts(model, image, plan)
    assert expected.std() > 1
    assert np.abs(found - expected).max() <= 1
