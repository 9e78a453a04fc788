"""Padded U-Net with BatchNorm: output size = input size; transposed convolutions up."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from tilepipe.errors import ModelError
from tilepipe.models.blocks import (
    ConvChain,
    Norm,
    check_depth,
    he_init,
    join,
    level_widths,
    max_pool,
)
from tilepipe.models.net import Net, TrainingOutput


class UNetSame(Net):
    """Two padded 3x3 conv-BN-ReLU per level, max-pool, 2x2 transposed conv (+ LeakyReLU) up.

    (B, C, Y, X) -> (B, K, Y, X); Y and X are multiples of 2^depth. The head is 3x3.
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
        dropout: float = 0.0,
        leaky: bool = True,
        head_kernel: int = 3,
    ) -> None:
        super().__init__(in_channels, classes)
        if head_kernel not in (1, 3):
            raise ModelError(f"head_kernel {head_kernel}; the head is 1 or 3 px wide")
        width = level_widths(base, check_depth(depth) + 1, widths)
        self.encoders = nn.ModuleList(
            ConvChain(before, after, norm=norm)
            for before, after in zip([in_channels, *width[:-2]], width[:-1], strict=True)
        )
        self.bottom = ConvChain(width[-2], width[-1], norm=norm)
        self.dropout = nn.Dropout(dropout)
        self.ups = nn.ModuleList(
            nn.ConvTranspose2d(width[level + 1], width[level], 2, stride=2)
            for level in range(depth)
        )
        self.up_act: nn.Module = nn.LeakyReLU(0.01, inplace=True) if leaky else nn.Identity()
        self.decoders = nn.ModuleList(
            ConvChain(2 * width[level], width[level], norm=norm) for level in range(depth)
        )
        self.head = nn.Conv2d(width[0], classes, head_kernel, padding=head_kernel // 2)
        self.step_px = self.least_px = 2**depth
        he_init(self)

    def infer(self, x: Tensor) -> Tensor:
        """(B, C, Y, X) -> logits (B, K, Y, X)."""
        skips: list[Tensor] = []
        for encoder in self.encoders:
            x = encoder(x)
            skips.append(x)
            x = max_pool(x)
        x = self.dropout(self.bottom(x))
        for level in reversed(range(len(skips))):
            x = self.decoders[level](join(skips[level], self.up_act(self.ups[level](x))))
        logits: Tensor = self.head(x)
        return logits

    def forward(self, x: Tensor) -> TrainingOutput:
        """Return the one output."""
        self.check_size(x)
        return {"logits": [self.infer(x)]}
