"""U-Net with bilinear upsampling behind a 1x1 reduction."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from tilepipe.errors import ModelError
from tilepipe.models.blocks import (
    ConvBlock,
    ConvChain,
    Norm,
    check_depth,
    he_init,
    join,
    level_widths,
    max_pool,
    upsample,
)
from tilepipe.models.net import Net, TrainingOutput


class UNetBilinear(Net):
    """Padded conv-BN-ReLU down; 1x1 conv-BN-ReLU halves the channels, then bilinear x2; 1x1 head.

    (B, C, Y, X) -> (B, K, Y, X). ``align_corners=True`` is the published form; what it reads
    depends on the place in the tile, so it can never be tiled exactly. ``any_size`` takes any
    side from 2^depth on and pads the upsampled map to the skip's size, as published.

    ``encoder_convs``, ``relu_between`` and ``reduce_relu`` cover published relatives: a plain 1x1
    before the upsampling equals one behind it, since both are linear.
    """

    def __init__(
        self,
        in_channels: int,
        classes: int,
        base: int = 64,
        *,
        depth: int = 4,
        widths: Sequence[int] | None = None,
        norm: Norm = "batch",
        align_corners: bool = False,
        any_size: bool = False,
        encoder_convs: int = 1,
        relu_between: bool = True,
        reduce_relu: bool = True,
    ) -> None:
        super().__init__(in_channels, classes)
        if encoder_convs not in (1, 2, 3):
            raise ModelError(f"encoder_convs {encoder_convs}; a level has 1 to 3 convolutions")
        width = level_widths(base, check_depth(depth) + 1, widths)
        self.align_corners = align_corners
        self.encoders = nn.ModuleList(
            ConvChain(before, after, count=encoder_convs, norm=norm, relu_between=relu_between)
            for before, after in zip([in_channels, *width[:-2]], width[:-1], strict=True)
        )
        self.bottom = ConvChain(
            width[-2], width[-1], count=encoder_convs, norm=norm, relu_between=relu_between
        )
        self.reduces = nn.ModuleList(
            ConvBlock(width[level + 1], width[level], kernel=1, norm=norm, relu=reduce_relu)
            for level in range(depth)
        )
        self.decoders = nn.ModuleList(
            ConvChain(2 * width[level], width[level], norm=norm, relu_between=relu_between)
            for level in range(depth)
        )
        self.head = nn.Conv2d(width[0], classes, 1)
        self.least_px = 2**depth
        self.step_px = 1 if any_size else 2**depth
        he_init(self)

    def infer(self, x: Tensor) -> Tensor:
        """(B, C, Y, X) -> logits (B, K, Y, X)."""
        skips: list[Tensor] = []
        for encoder in self.encoders:
            x = encoder(x)
            skips.append(x)
            x = max_pool(x)
        x = self.bottom(x)
        for level in reversed(range(len(skips))):
            skip = skips[level]
            x = upsample(self.reduces[level](x), 2, align_corners=self.align_corners)
            dy, dx = skip.shape[-2] - x.shape[-2], skip.shape[-1] - x.shape[-1]
            if dy or dx:
                x = functional.pad(x, (dx // 2, dx - dx // 2, dy // 2, dy - dy // 2))
            x = self.decoders[level](join(skip, x))
        logits: Tensor = self.head(x)
        return logits

    def forward(self, x: Tensor) -> TrainingOutput:
        """Return the one output."""
        self.check_size(x)
        return {"logits": [self.infer(x)]}
