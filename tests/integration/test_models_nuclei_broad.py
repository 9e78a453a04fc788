"""Real weights: bioimage.io's unet2d_nuclei_broad through our key map; a fixed-shape U-Net."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from torch import nn

from tilepipe.models import load_model
from tilepipe.models.convert import KeyMap, convert
from tilepipe.models.pickles import read_pickle
from tilepipe.models.probe import probe

WORKFLOW = Path(__file__).resolve().parents[2] / "workflows" / "unet2d_nuclei_broad"


def converted(data, tmp_path, name):
    source = data / "weights/bioimageio/unet2d_nuclei_broad/weights_from_onnx.safetensors"
    target = tmp_path / "nuclei.safetensors"
    rules = KeyMap.from_toml(WORKFLOW / name)
    with pytest.warns(UserWarning, match=r"halo of 32 px .* depends on 58 px"):
        convert(source, target, model="unet-bilinear", key_map=rules)
    return load_model(target)


def test_the_published_test_tensors(data, tmp_path):
    model = converted(data, tmp_path, "map.toml")
    folder = data / "weights/bioimageio/unet2d_nuclei_broad"
    x = np.load(folder / "test_input.npy").astype(np.float32)
    # As the yaml asks: zero mean, unit variance of the image.
    x = (x - x.mean()) / (x.std() + 1e-6)
    p = torch.sigmoid(model.module(torch.from_numpy(x))).numpy()
    assert np.abs(p - np.load(folder / "test_output.npy")).max() < 1e-5
    assert model.locality.reach_px == 58
    assert (model.locality.context_px, model.locality.alignment_px) == (53, 8)
    assert [entry.name for entry in model.classes] == ["background", "nucleus"]


def test_nuclei_of_a_dapi_slide(data, tmp_path):
    model = converted(data, tmp_path, "map_dapi_rgb.toml")
    image = tifffile.imread(data / "wsi/test3-DAPI-2-(387).ndpi")[1000:1512, 1200:1712]
    x = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None]
    ids = model.class_ids(model.module(model.normalise(x)))[0].numpy()
    blue = image[..., 2].astype(float)
    assert 0.03 < ids.mean() < 0.3
    # Nuclei are the bright places: no threshold was given, the network found them.
    assert blue[ids == 1].mean() > 10 * blue[ids == 0].mean()


class NormedUNet(nn.Module):
    """The architecture of ``unet2d_fixed_shape``: InstanceNorm before each convolution."""

    def __init__(self):
        super().__init__()
        widths = [1, 16, 32, 64]
        self.encoder = nn.ModuleDict(
            {"blocks": nn.ModuleList(self.block(a, b) for a, b in pairwise(widths))}
        )
        self.base = self.block(64, 128)
        ups = [128, 64, 32, 16]
        self.decoder = nn.ModuleDict(
            {
                "blocks": nn.ModuleList(self.block(a, b) for a, b in pairwise(ups)),
                "samplers": nn.ModuleList(
                    nn.ModuleDict({"conv": nn.Conv2d(a, b, 1)}) for a, b in pairwise(ups)
                ),
            }
        )
        self.out_conv = nn.Conv2d(16, 1, 1)

    @staticmethod
    def block(before, after):
        layers = [
            nn.InstanceNorm2d(before),
            nn.Conv2d(before, after, 3, padding=1),
            nn.ReLU(),
            nn.InstanceNorm2d(after),
            nn.Conv2d(after, after, 3, padding=1),
            nn.ReLU(),
        ]
        return nn.ModuleDict({"block": nn.Sequential(*layers)})

    def forward(self, x):
        skips = []
        for part in self.encoder["blocks"]:
            x = part["block"](x)
            skips.append(x)
            x = nn.functional.max_pool2d(x, 2)
        x = self.base["block"](x)
        for part, up in zip(self.decoder["blocks"], self.decoder["samplers"], strict=True):
            x = nn.functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            x = part["block"](torch.cat((up["conv"](x), skips.pop()), dim=1))
        return self.out_conv(x)


def test_a_real_network_with_instance_norm_is_global_and_named(data):
    folder = data / "weights/bioimageio/unet2d_fixed_shape"
    net = NormedUNet().eval()
    net.load_state_dict(read_pickle(folder / "weights.pt"))
    x = np.load(folder / "test_input.npy").astype(np.float32)
    x = (x - x.mean()) / (x.std() + 1e-6)
    with torch.no_grad():
        out = net(torch.from_numpy(x)).numpy()
    assert np.abs(out - np.load(folder / "test_output.npy")).max() < 1e-3
    found = probe(net, in_channels=1)
    assert found.kind == "global"
    assert not found.exact
    assert "instance norm" in found.reason
