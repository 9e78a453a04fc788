"""Normalisation: the dtype decides the scale, never the pixels of a tile."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tilepipe.errors import ModelError
from tilepipe.models import Normalisation


@pytest.mark.parametrize(
    ("dtype", "value", "wanted"),
    [(np.uint8, 255, 1.0), (np.uint8, 51, 0.2), (np.uint16, 65535, 1.0), (np.float32, 7.5, 7.5)],
)
def test_unit(dtype, value, wanted):
    x = torch.from_numpy(np.full((1, 1, 2, 2), value, dtype))
    out = Normalisation()(x)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, torch.full((1, 1, 2, 2), wanted))


def test_mean_std_per_channel_and_for_all():
    x = torch.tensor([[[[51]], [[102]]]], dtype=torch.uint8)
    each = Normalisation("mean-std", (0.1, 0.2), (0.5, 0.1))(x)
    torch.testing.assert_close(each.flatten(), torch.tensor([0.2, 2.0]))
    both = Normalisation("mean-std", (0.2,), (0.2,))(x[0])
    torch.testing.assert_close(both.flatten(), torch.tensor([0.0, 1.0]))


def test_float64_stays():
    assert Normalisation()(torch.zeros(1, 1, 1, 1, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize(
    ("kind", "mean", "std"),
    [
        ("unit", (0.5,), (0.5,)),
        ("mean-std", (), ()),
        ("mean-std", (0.5,), (0.5, 0.5)),
        ("mean-std", (0.5,), (0.0,)),
        ("mean-std", (0.5,), (float("nan"),)),
        ("mean-std", (float("inf"),), (1.0,)),
    ],
)
def test_what_makes_no_sense_is_refused(kind, mean, std):
    with pytest.raises(ModelError, match="normalisation"):
        Normalisation(kind, mean, std)


def test_means_must_fit_the_channels():
    Normalisation("mean-std", (0.5,), (0.5,)).check_channels(3)
    with pytest.raises(ModelError, match="2 means for 3 channels; give 1 or 3"):
        Normalisation("mean-std", (0.5, 0.5), (0.5, 0.5)).check_channels(3)
