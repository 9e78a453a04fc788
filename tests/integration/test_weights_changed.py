"""One file of weights, and another under the same name: none is taken for the other."""

from __future__ import annotations

import numpy as np
import pytest

from tilepipe.errors import MismatchError, VerifyError
from tilepipe.infer import verify
from tilepipe.models import Normalisation, build, save_checkpoint
from tilepipe.models.seeded import fill_seeded
from tilepipe.pipeline.run import Request, run_one
from tilepipe.spec import JobSpec, default_classes
from tilepipe.store import open_store
from tilepipe.tiling import Box

SHIFTED = Normalisation("mean-std", (0.5,), (0.1,))


def save(path, *, seed=0, normalisation=None, classes=None):
    net = build("unet", in_channels=3, classes=2, base=4)
    fill_seeded(net, seed)
    save_checkpoint(
        path, net, name="unet", arguments={"base": 4}, classes=classes or default_classes(2),
        normalisation=normalisation or Normalisation(),
    )  # fmt: skip
    return path


@pytest.fixture
def mask_of(small_slide, tmp_path):
    """Run in this process, as a notebook does."""

    def made(weights, output="out.zarr"):
        store = str(tmp_path / output)
        run_one(Request(str(small_slide), store, JobSpec(model="unet", weights=str(weights))))
        label = open_store(store).label("unet").level(0)
        return label.read(Box.of_shape(label.shape))

    return made


@pytest.mark.parametrize("change", [{"seed": 1}, {"normalisation": SHIFTED}])
def test_changed_weights_make_another_mask(mask_of, tmp_path, change):
    weights = save(tmp_path / "weights.safetensors")
    before = mask_of(weights)
    save(weights, **change)
    with pytest.raises(MismatchError, match="is of another job"):
        mask_of(weights)
    after = mask_of(weights, "again.zarr")
    expected = mask_of(save(tmp_path / "other.safetensors", **change), "other.zarr")
    assert np.array_equal(after, expected)
    assert (after != before).mean() > 0.01


def test_verify_knows_another_normalisation_of_the_same_weights(mask_of, tmp_path):
    weights = save(tmp_path / "weights.safetensors")
    mask_of(weights)
    verify(str(tmp_path / "out.zarr"), samples=1)
    save(weights, normalisation=SHIFTED)
    with pytest.raises(VerifyError, match="another normalisation"):
        verify(str(tmp_path / "out.zarr"), samples=1)
