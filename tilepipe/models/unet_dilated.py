"""U-Net of valid, dilated convolutions whose skips and output are resized to fit."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from tilepipe.models.blocks import ConvChain, Norm, check_depth, he_init, join, level_widths, resize
from tilepipe.models.net import Net, TrainingOutput


class UNetDilated(Net):
    """Encoder: two valid 3x3 convs of dilation 2, dropout, ceil-mode max-pool per level.

    Decoder: 2x2 transposed conv, the skip resized to its size (bilinear, align_corners=True), two
    valid convs; a 1x1 head, resized to the input's size. Any side from 233 px on (depth 4).

    Resizing stretches the maps by a factor that depends on the tile's size, so what an output
    pixel depends on changes with its place: never exact in tiles.
    """

    def __init__(
        self,
        in_channels: int,
        classes: int,
        base: int = 64,
        *,
        depth: int = 4,
        widths: Sequence[int] | None = None,
        norm: Norm = "none",
        dropout: float = 0.2,
    ) -> None:
        super().__init__(in_channels, classes)
        width = level_widths(base, check_depth(depth) + 1, widths)
        self.encoders = nn.ModuleList(
            ConvChain(before, after, dilation=2, padded=False, norm=norm)
            for before, after in zip([in_channels, *width[:-2]], width[:-1], strict=True)
        )
        self.dropout = nn.Dropout(dropout)
        self.bottom = ConvChain(width[-2], width[-1], padded=False, norm=norm)
        self.ups = nn.ModuleList(
            nn.ConvTranspose2d(width[level + 1], width[level], 2, stride=2)
            for level in range(depth)
        )
        self.decoders = nn.ModuleList(
            ConvChain(2 * width[level], width[level], padded=False, norm=norm)
            for level in range(depth)
        )
        self.head = nn.Conv2d(width[0], classes, 1)
        self.least_px = _least_side(depth)
        self.step_px = 1
        he_init(self)

    def infer(self, x: Tensor) -> Tensor:
        """(B, C, Y, X) -> logits (B, K, Y, X)."""
        size = x.shape[-2:]
        skips: list[Tensor] = []
        for encoder in self.encoders:
            x = self.dropout(encoder(x))
            skips.append(x)
            x = functional.max_pool2d(x, 2, ceil_mode=True)
        x = self.bottom(x)
        for level in reversed(range(len(skips))):
            x = self.ups[level](x)
            x = self.decoders[level](
                join(resize(skips[level], x.shape[-2:], align_corners=True), x)
            )
        return resize(self.head(x), size, align_corners=True)

    def forward(self, x: Tensor) -> TrainingOutput:
        """Return the one output."""
        self.check_size(x)
        return {"logits": [self.infer(x)]}


def _least_side(depth: int) -> int:
    """Return the smallest side that leaves a pixel at the end.

    >>> _least_side(4)
    233
    """
    bottom = 1
    while True:
        side = bottom
        for _ in range(depth):
            side = 2 * side - 4
            if side < 1:
                break
        else:
            break
        bottom += 1
    side = bottom + 4
    for _ in range(depth):
        side = 2 * side - 1 + 8
    return side
