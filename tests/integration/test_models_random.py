"""``random:SEED`` weights on real pixels: masks with something in them."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile
import torch

from tilepipe.models import ARCHITECTURES, load_model


@pytest.fixture(scope="module")
def crop(data):
    """(3, 320, 320) uint8 of a real slide with tissue in it."""
    image = tifffile.imread(data / "wsi/CMU-1-Small-Region.svs")
    return np.ascontiguousarray(image[800:1120, 800:1120].transpose(2, 0, 1))


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_random_weights_give_several_classes_on_a_real_slide(crop, name, seed):
    model = load_model(name, weights=f"random:{seed}", base=8, classes=3)
    side = 316 if name == "unet" else 320
    x = torch.from_numpy(crop[None, :, :side, :side].copy())
    ids = model.class_ids(model.module(model.normalise(x))).numpy()
    shares = np.bincount(ids.ravel(), minlength=3) / ids.size
    assert (shares > 0.01).sum() >= 2, shares


def test_the_same_crop_twice_is_the_same_mask(crop):
    masks = []
    for _ in range(2):
        model = load_model("unet-same", weights="random:3", base=4)
        x = torch.from_numpy(crop[None, :, :128, :128].copy())
        masks.append(model.class_ids(model.module(model.normalise(x))).numpy())
    assert np.array_equal(*masks)
