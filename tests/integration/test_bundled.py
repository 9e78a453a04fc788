"""The bundled nuclei weights: what the file says, how good it is on images held back."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tilepipe import models
from tilepipe.models import load_model, read_header
from tilepipe.train.dataset import Teaching
from tilepipe.train.images import find_pairs, read_kinds, read_names
from tilepipe.train.validate import score_images

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = Path(models.__file__).parent / "weights" / "unet.safetensors"
TEACHING = Teaching(target="foreground+border", n_classes=3)


def held_back(data):
    folder = data / "dsb2018"
    held = set(read_names(ROOT / "workflows" / "nuclei" / "test.txt"))
    pairs = find_pairs(folder / "images", folder / "labels", kinds=read_kinds(folder / "index.csv"))
    return [pair for pair in pairs if pair.name in held]


def score(pairs):
    model = load_model("unet")
    found = score_images(
        lambda shares: model.module(model.normalise(shares)),
        pairs,
        sizes=model.module,
        halo_px=model.locality.halo_px,
        teaching=TEACHING,
        channels=3,
        device=torch.device("cpu"),
    )
    return {entry.kind: entry for entry in found}


def test_file_is_small_and_names_no_machine():
    assert WEIGHTS.stat().st_size <= 8 << 20
    assert {tensor.dtype for tensor in load_file(WEIGHTS).values()} == {torch.float16}
    header = read_header(WEIGHTS)
    assert header["architecture"] == "unet"
    assert header["in_channels"] == 3
    assert header["mpp"] is None
    assert [c["name"] for c in header["classes"]] == ["background", "nucleus", "border"]
    assert header["locality"]["context"] == [92, 92, 92, 92]
    text = json.dumps(header)
    assert "/work" not in text
    assert "/home" not in text
    assert "/tmp" not in text


def test_load_model_without_weights_takes_it():
    model = load_model("unet")
    assert model.source == "bundled"
    assert model.activation == "softmax"


def test_split_is_what_the_recipe_says(data):
    pairs = held_back(data)
    counts = {kind: sum(p.kind == kind for p in pairs) for kind in {p.kind for p in pairs}}
    assert counts == {"fluorescence": 71, "stained": 14, "brightfield-gray": 2}


def test_finds_nuclei_on_a_few_held_back_images(data):
    pairs = held_back(data)
    few = [p for p in pairs if p.kind == "fluorescence"][:4]
    few += [p for p in pairs if p.kind == "stained"][:3]
    found = score(few)
    assert found["fluorescence"].dice >= 0.85
    assert found["fluorescence"].f1 >= 0.7
    assert found["stained"].dice >= 0.7
    assert found["stained"].f1 >= 0.5


@pytest.mark.slow
def test_reaches_the_recipes_figures_on_all_87(data):
    found = score(held_back(data))
    assert found["fluorescence"].dice >= 0.90
    assert found["fluorescence"].f1 >= 0.80
    assert found["stained"].dice >= 0.75
    assert found["stained"].f1 >= 0.60
