"""Validation: whole images, and slides by pieces."""

import tracemalloc

import numpy as np
import pytest
import torch
from scipy import ndimage

from tilepipe.train import images, predict, validate
from tilepipe.train.dataset import Teaching
from tilepipe.train.images import find_pairs
from tilepipe.train.validate import score_images


class Sizes:
    """Of a padded network that takes any multiple of 8."""

    margin_px, least_px, step_px = 0, 8, 8

    def next_legal(self, px):
        return max(8, -(-px // 8) * 8)


def score(pairs, target, refuse=lambda _: None):
    classes = 2 if target == "foreground" else 3

    def forward(x):
        """Logits by brightness: no context."""
        refuse(x)
        return torch.cat([0.5 - x, x - 0.5, 3 * x - 1.7], 1)[:, :classes]

    return score_images(
        forward, pairs, sizes=Sizes(), halo_px=8, channels=1, device=torch.device("cpu"),
        teaching=Teaching(target=target, n_classes=classes),
    )  # fmt: skip


@pytest.fixture
def pairs(tmp_path):
    def make(shape, dtype):
        rng = np.random.default_rng(0)
        field = ndimage.gaussian_filter(rng.random(shape, np.float32), 3, output=np.float32)
        field = (field - field.min()) / np.float32(np.ptp(field))
        for name in ("img", "lab"):
            (tmp_path / name).mkdir()
        noisy = field + rng.normal(0, 0.002, shape)
        np.save(tmp_path / "img" / "a.npy", (255 * noisy.clip(0, 1)).astype(np.uint8))
        cells = (field > 0.5).astype(dtype) + (field > 0.6)
        if dtype != np.uint8:
            cells = ndimage.label(cells)[0].astype(dtype)
        np.save(tmp_path / "lab" / "a.npy", cells)
        return find_pairs(tmp_path / "img", tmp_path / "lab")

    return make


@pytest.mark.parametrize(
    ("target", "dtype"),
    [("classes", np.uint8), ("foreground", np.int32), ("foreground+border", np.int32)],
)
def test_slides_score_as_images_do(pairs, monkeypatch, target, dtype):
    found = pairs((150, 210), dtype)
    whole = score(found, target)
    monkeypatch.setattr(images, "IN_MEMORY_PX", 1000)
    monkeypatch.setattr(validate, "PIECE_PX", 64)
    monkeypatch.setattr(predict, "WHOLE_PX", 100)
    monkeypatch.setattr(predict, "TILE_PX", 72)
    assert score(found, target) == whole
    assert 0.5 < whole[0].dice < 1
    assert target == "classes" or whole[0].f1 > 0


def test_what_is_too_large_for_the_device_in_one_piece_is_scored_by_tiles(pairs, monkeypatch):
    found = pairs((150, 210), np.uint8)
    monkeypatch.setattr(predict, "TILE_PX", 72)
    sides = []

    def refuse(x):
        sides.append(x.shape[-1])
        if x.shape[-1] > 100:
            raise RuntimeError(
                "upsample_bilinear2d_nhwc only supports output tensors with less than INT_MAX "
                "elements, but got [1, 1024, 2272, 2272]"
            )

    assert score(found, "classes", refuse) == score(found, "classes")
    assert sides == [232] + 9 * [88]

    def broken(x):
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        score(found, "classes", broken)


@pytest.mark.parametrize(("target", "dtype"), [("classes", np.uint8), ("foreground", np.int32)])
def test_of_a_slide_a_few_bytes_per_px_are_held(pairs, monkeypatch, target, dtype):
    """Labels, shares and probabilities of the whole would be 36 to 70 times that."""
    found = pairs((1600, 1600), dtype)
    monkeypatch.setattr(images, "IN_MEMORY_PX", 1000)
    monkeypatch.setattr(validate, "PIECE_PX", 128)
    monkeypatch.setattr(predict, "WHOLE_PX", 100)
    monkeypatch.setattr(predict, "TILE_PX", 128)
    tracemalloc.start()
    score(found, target)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 1600 * 1600
