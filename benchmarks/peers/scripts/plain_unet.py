"""The valid U-Net as anyone would write it, so that no environment needs tilepipe."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional


def pair(before: int, after: int) -> nn.Sequential:
    """Two valid 3x3 convolutions with ReLU."""
    return nn.Sequential(
        nn.Conv2d(before, after, 3),
        nn.ReLU(inplace=True),
        nn.Conv2d(after, after, 3),
        nn.ReLU(inplace=True),
    )


class PlainUNet(nn.Module):
    """(B, C, Y, X) float -> logits (B, K, Y - 184, X - 184) with four poolings."""

    def __init__(self, in_channels: int, outputs: int, widths: list[int]) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(
            pair(before, after)
            for before, after in zip([in_channels, *widths[:-2]], widths[:-1], strict=True)
        )
        self.bottom = pair(widths[-2], widths[-1])
        levels = range(len(widths) - 1)
        self.ups = nn.ModuleList(
            nn.ConvTranspose2d(widths[k + 1], widths[k], 2, stride=2) for k in levels
        )
        self.decoders = nn.ModuleList(pair(2 * widths[k], widths[k]) for k in levels)
        self.head = nn.Conv2d(widths[0], outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        skips = []
        for encoder in self.encoders:
            x = encoder(x)
            skips.append(x)
            x = functional.max_pool2d(x, 2)
        x = self.bottom(x)
        for level in reversed(range(len(skips))):
            x = self.ups[level](x)
            skip = skips[level]
            cut = (skip.shape[2] - x.shape[2]) // 2
            skip = skip[:, :, cut : cut + x.shape[2], cut : cut + x.shape[3]]
            x = self.decoders[level](torch.cat((skip, x), dim=1))
        logits: Tensor = self.head(x)
        return logits


def load(path: Path) -> tuple[PlainUNet, list[float], list[float]]:
    """Read what ``prepare.py`` exported: the network, mean and std of pixels / 255 (or none)."""
    found = torch.load(path, weights_only=True)
    net = PlainUNet(found["in_channels"], found["outputs"], found["widths"])
    net.load_state_dict(found["state"])
    return net.eval().requires_grad_(requires_grad=False), found["mean"], found["std"]
