"""U-Net (Ronneberger, Fischer, Brox 2015, arXiv:1505.04597, fig. 1): valid convolutions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from tilepipe.models.blocks import (
    ConvChain,
    Norm,
    check_depth,
    crop,
    he_init,
    join,
    level_widths,
    max_pool,
)
from tilepipe.models.net import Net, TrainingOutput


class UNet(Net):
    """The 2015 network: 572² in, 388² out; 31,030,658 parameters for 1 channel and 2 classes.

    Each level has two valid 3x3 convolutions with ReLU; 2x2 max-pool down, 2x2 transposed
    convolution up, the skip cropped to the decoder's size, a 1x1 head.
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
        dropout: float = 0.5,
    ) -> None:
        super().__init__(in_channels, classes)
        width = level_widths(base, check_depth(depth) + 1, widths)
        self.encoders = nn.ModuleList(
            ConvChain(before, after, padded=False, norm=norm)
            for before, after in zip([in_channels, *width[:-2]], width[:-1], strict=True)
        )
        self.bottom = ConvChain(width[-2], width[-1], padded=False, norm=norm)
        # As in the paper: dropout at the end of the contracting path.
        self.dropout = nn.Dropout(dropout)
        self.ups = nn.ModuleList(
            nn.ConvTranspose2d(width[level + 1], width[level], 2, stride=2)
            for level in range(depth)
        )
        self.decoders = nn.ModuleList(
            ConvChain(2 * width[level], width[level], padded=False, norm=norm)
            for level in range(depth)
        )
        self.head = nn.Conv2d(width[0], classes, 1)
        self.step_px = 2**depth
        self.least_px, self.margin_px, self.crops = _valid_geometry(depth)
        he_init(self)

    def infer(self, x: Tensor) -> Tensor:
        """(B, C, Y, X) -> logits (B, K, Y - 184, X - 184) at depth 4."""
        skips: list[Tensor] = []
        for encoder in self.encoders:
            x = encoder(x)
            skips.append(x)
            x = max_pool(x)
        x = self.dropout(self.bottom(x))
        for level in reversed(range(len(skips))):
            x = join(crop(skips[level], self.crops[level]), self.ups[level](x))
            x = self.decoders[level](x)
        logits: Tensor = self.head(x)
        return logits

    def forward(self, x: Tensor) -> TrainingOutput:
        """Return the one output."""
        self.check_size(x)
        return {"logits": [self.infer(x)]}


def _valid_geometry(depth: int) -> tuple[int, int, list[int]]:
    """Return least input side, margin and the crop of each level's skip, px of that level.

    >>> _valid_geometry(4)
    (188, 92, [88, 40, 16, 4])
    """
    least = 2**depth
    while True:
        skips, side = [], least
        for _ in range(depth):
            side -= 4
            if side < 2 or side % 2:
                break
            skips.append(side)
            side //= 2
        side -= 4
        if len(skips) == depth and side >= 1:
            crops = [0] * depth
            for level in reversed(range(depth)):
                crops[level] = (skips[level] - 2 * side) // 2
                side = 2 * side - 4
                if side < 1:
                    break
            else:
                return least, (least - side) // 2, crops
        least += 1
