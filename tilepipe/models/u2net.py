"""U²-Net (Qin, Zhang, Huang, Dehghan, Zaiane, Jagersand 2020, arXiv:2005.09007)."""

from __future__ import annotations

from torch import Tensor, nn

from tilepipe.errors import ModelError
from tilepipe.models.blocks import ConvBlock, Norm, he_init, join, level_widths, max_pool, upsample
from tilepipe.models.net import Net, TrainingOutput


class ResidualU(nn.Module):
    """RSU-L: a small U-Net inside a residual block: (B, in, Y, X) -> (B, out, Y, X).

    ``height`` L: L - 2 poolings, the bottom convolution has dilation 2. Y and X are multiples of
    2^(L - 2).
    """

    def __init__(self, height: int, in_channels: int, mid: int, out: int, *, norm: Norm) -> None:
        super().__init__()
        self.entry = ConvBlock(in_channels, out, norm=norm)
        self.downs = nn.ModuleList(
            ConvBlock(out if step == 0 else mid, mid, norm=norm) for step in range(height - 1)
        )
        self.bottom = ConvBlock(mid, mid, dilation=2, norm=norm)
        self.ups = nn.ModuleList(
            ConvBlock(2 * mid, out if step == 0 else mid, norm=norm) for step in range(height - 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Add the inner U's output to the entry convolution's."""
        entry: Tensor = self.entry(x)
        skips: list[Tensor] = []
        inner = entry
        for step, down in enumerate(self.downs):
            inner = down(inner if step == 0 else max_pool(inner))
            skips.append(inner)
        inner = self.bottom(inner)
        for step in reversed(range(len(skips))):
            if inner.shape[-1] != skips[step].shape[-1]:
                inner = upsample(inner, 2)
            inner = self.ups[step](join(inner, skips[step]))
        return inner + entry


class DilatedResidualU(nn.Module):
    """RSU-4F: as RSU-4 with dilations 1, 2, 4, 8 instead of poolings: any Y, X."""

    def __init__(self, in_channels: int, mid: int, out: int, *, norm: Norm) -> None:
        super().__init__()
        self.entry = ConvBlock(in_channels, out, norm=norm)
        self.downs = nn.ModuleList(
            ConvBlock(out if step == 0 else mid, mid, dilation=2**step, norm=norm)
            for step in range(3)
        )
        self.bottom = ConvBlock(mid, mid, dilation=8, norm=norm)
        self.ups = nn.ModuleList(
            ConvBlock(2 * mid, out if step == 0 else mid, dilation=2**step, norm=norm)
            for step in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Add the inner U's output to the entry convolution's."""
        entry: Tensor = self.entry(x)
        skips: list[Tensor] = []
        inner = entry
        for down in self.downs:
            inner = down(inner)
            skips.append(inner)
        inner = self.bottom(inner)
        for step in reversed(range(3)):
            inner = self.ups[step](join(inner, skips[step]))
        return inner + entry


# Height, middle and output channels of each stage, as in the paper's table; height 0 is RSU-4F.
# At base 64; another base scales them all.
_FULL_DOWN = ((7, 32, 64), (6, 32, 128), (5, 64, 256), (4, 128, 512), (0, 256, 512), (0, 256, 512))
_FULL_UP = ((7, 16, 64), (6, 32, 64), (5, 64, 128), (4, 128, 256), (0, 256, 512))
_SMALL_DOWN = tuple((height, 16, 64) for height in (7, 6, 5, 4, 0, 0))
_SMALL_UP = tuple((height, 16, 64) for height in (7, 6, 5, 4, 0))


class U2Net(Net):
    """A U of residual Us: six encoder and five decoder stages, six side outputs, fused by a 1x1.

    (B, C, Y, X) -> (B, K, Y, X); Y and X are multiples of 32. Training returns the fused logits
    and the six sides, enlarged to (Y, X); inference keeps the fused ones.
    """

    policy = "fused logits; the six side outputs are dropped"
    least_px = 32
    step_px = 32

    def __init__(
        self,
        in_channels: int,
        classes: int,
        base: int = 64,
        *,
        small: bool = False,
        norm: Norm = "batch",
    ) -> None:
        super().__init__(in_channels, classes)
        level_widths(base, 1)
        if not isinstance(small, bool):
            raise ModelError(f"small {small!r}; wanted true or false")
        down = _scaled(_SMALL_DOWN if small else _FULL_DOWN, base)
        up = _scaled(_SMALL_UP if small else _FULL_UP, base)
        self.encoders = nn.ModuleList()
        before = in_channels
        for height, mid, out in down:
            self.encoders.append(_stage(height, before, mid, out, norm=norm))
            before = out
        self.decoders = nn.ModuleList()
        for level, (height, mid, out) in enumerate(up):
            below = up[level + 1][2] if level + 1 < len(up) else down[-1][2]
            self.decoders.append(_stage(height, below + down[level][2], mid, out, norm=norm))
        widths = [*(out for _, _, out in up), down[-1][2]]
        self.sides = nn.ModuleList(nn.Conv2d(width, classes, 3, padding=1) for width in widths)
        self.head = nn.Conv2d(len(widths) * classes, classes, 1)
        he_init(self)

    def _sides(self, x: Tensor) -> list[Tensor]:
        """Six logits (B, K, Y, X), the finest stage first."""
        skips: list[Tensor] = []
        for level, encoder in enumerate(self.encoders):
            x = encoder(x if level == 0 else max_pool(x))
            skips.append(x)
        stages = [x]
        for level in reversed(range(len(self.decoders))):
            x = self.decoders[level](join(upsample(x, 2), skips[level]))
            stages.insert(0, x)
        return [
            upsample(side(stage), 2**level)
            for level, (side, stage) in enumerate(zip(self.sides, stages, strict=True))
        ]

    def infer(self, x: Tensor) -> Tensor:
        """(B, C, Y, X) -> fused logits (B, K, Y, X)."""
        logits: Tensor = self.head(join(*self._sides(x)))
        return logits

    def forward(self, x: Tensor) -> TrainingOutput:
        """Return the fused logits, then the six sides."""
        self.check_size(x)
        sides = self._sides(x)
        return {"logits": [self.head(join(*sides)), *sides]}


def _stage(height: int, before: int, mid: int, out: int, *, norm: Norm) -> nn.Module:
    if height == 0:
        return DilatedResidualU(before, mid, out, norm=norm)
    return ResidualU(height, before, mid, out, norm=norm)


def _scaled(
    stages: tuple[tuple[int, int, int], ...], base: int
) -> tuple[tuple[int, int, int], ...]:
    return tuple(
        (height, max(1, mid * base // 64), max(1, out * base // 64)) for height, mid, out in stages
    )
