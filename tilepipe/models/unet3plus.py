"""UNet 3+ (Huang et al. 2020, arXiv:2004.08790): full-scale skips, deep supervision, CGM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional

from tilepipe.errors import ModelError
from tilepipe.models.blocks import (
    ConvBlock,
    ConvChain,
    Norm,
    crop,
    he_init,
    join,
    level_widths,
    max_pool,
    upsample,
)
from tilepipe.models.net import InferenceNet, Net, TrainingOutput

_LEVELS = 5
Down = Literal["max", "avg", "conv"]


class ResidualChain(nn.Module):
    """Two 3x3 ConvBlocks beside a 1x1 shortcut: (B, in, Y, X) -> (B, out, Y, X)."""

    def __init__(self, in_channels: int, out_channels: int, *, norm: Norm) -> None:
        super().__init__()
        self.first = ConvBlock(in_channels, out_channels, norm=norm)
        self.second = ConvBlock(out_channels, out_channels, norm=norm, relu=False)
        self.shortcut = ConvBlock(in_channels, out_channels, kernel=1, norm=norm, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        """Add the shortcut, then ReLU."""
        return functional.relu(self.second(self.first(x)) + self.shortcut(x))


class FullScaleNode(nn.Module):
    """One decoder stage: five maps, pooled or enlarged to its level, 3x3 each, joined, 3x3.

    Five maps of their own levels -> (B, 5 * branch, Y / 2^level, X / 2^level).
    """

    def __init__(
        self, level: int, widths: Sequence[int], branch: int, *, down: Down, norm: Norm
    ) -> None:
        super().__init__()
        self.level = level
        self.average = down == "avg"
        self.branches = nn.ModuleList(ConvBlock(width, branch, norm=norm) for width in widths)
        self.merge = ConvBlock(len(widths) * branch, len(widths) * branch, norm=norm)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Bring ``maps[k]`` of level k to this level and merge."""
        pool = functional.avg_pool2d if self.average else max_pool
        fitted = []
        for source, (branch, x) in enumerate(zip(self.branches, maps, strict=True)):
            if source < self.level:
                x = pool(x, 2 ** (self.level - source))
            fitted.append(branch(upsample(x, 2 ** max(0, source - self.level))))
        merged: Tensor = self.merge(join(*fitted))
        return merged


class UNet3Plus(Net):
    """Every decoder stage sees all five scales; 26.97 M parameters at base 64.

    (B, C, Y, X) -> (B, K, Y, X); Y and X are multiples of 16. Training returns the logits of the
    finest stage and, with ``deep_supervision``, of the four coarser ones enlarged to (Y, X).

    ``cgm``: the classification-guided module reads the deepest encoder map (dropout, 1x1
    convolution to "nothing" and "something", the global maximum of each) and says which of the two
    is larger; ``cls`` is by how much. The inference form has it as ``gate_logits`` and never
    applies it by itself: over tiles, the maxima are only known at the end.

    The authors' code has 3x3 heads (``head_kernel=3``, one px more context); a 1x1 is our default.
    """

    def __init__(
        self,
        in_channels: int,
        classes: int,
        base: int = 64,
        *,
        deep_supervision: bool = True,
        cgm: bool = False,
        norm: Norm = "batch",
        down: Down = "max",
        residual: bool = False,
        head_kernel: int = 1,
        widths: Sequence[int] | None = None,
    ) -> None:
        super().__init__(in_channels, classes)
        if down not in ("max", "avg", "conv"):
            raise ModelError(f"down {down!r}; the choices are 'max', 'avg' and 'conv'")
        if head_kernel not in (1, 3):
            raise ModelError(f"head_kernel {head_kernel}; the heads are 1 or 3 px wide")
        width = level_widths(base, _LEVELS, widths)
        branch, total = base, _LEVELS * base
        block = ResidualChain if residual else ConvChain
        self.encoders = nn.ModuleList(
            block(before, after, norm=norm)
            for before, after in zip([in_channels, *width[:-1]], width, strict=True)
        )
        self.downs = nn.ModuleList(_down(down, channels) for channels in width[:-1])
        self.nodes = nn.ModuleList(
            FullScaleNode(
                level,
                [*width[: level + 1], *([total] * (_LEVELS - 2 - level)), width[-1]],
                branch,
                down=down,
                norm=norm,
            )
            for level in range(_LEVELS - 1)
        )
        self.head = nn.Conv2d(total, classes, head_kernel, padding=head_kernel // 2)
        self.side_heads = nn.ModuleList(
            nn.Conv2d(channels, classes, head_kernel, padding=head_kernel // 2)
            for channels in ([total] * (_LEVELS - 2) + [width[-1]] if deep_supervision else [])
        )
        self.gate_dropout = nn.Dropout(0.5)
        self.gate_head = nn.Conv2d(width[-1], 2, 1) if cgm else None
        if deep_supervision:
            self.policy = "finest logits; the four deep-supervision outputs are dropped"
        if cgm:
            self.policy += "; the gate is a second pass"
        he_init(self)

    def _encode(self, x: Tensor) -> list[Tensor]:
        """Five maps, (B, width[k], Y / 2^k, X / 2^k)."""
        maps = []
        for level, encoder in enumerate(self.encoders):
            x = encoder(x if level == 0 else self.downs[level - 1](x))
            maps.append(x)
        return maps

    def _decode(self, maps: list[Tensor]) -> list[Tensor]:
        """Replace the four finer maps by their decoder stages', coarse to fine."""
        maps = list(maps)
        for level in reversed(range(_LEVELS - 1)):
            maps[level] = self.nodes[level](maps)
        return maps

    def _gate_map(self, deepest: Tensor) -> Tensor:
        """(B, 2, Y / 16, X / 16): logits of "nothing" and of "something"."""
        if self.gate_head is None:
            raise ModelError("this UNet 3+ was built without cgm; it has no gate")
        pair: Tensor = self.gate_head(self.gate_dropout(deepest))
        return pair

    def infer(self, x: Tensor) -> Tensor:
        """(B, C, Y, X) -> logits (B, K, Y, X), not gated."""
        logits: Tensor = self.head(self._decode(self._encode(x))[0])
        return logits

    def gate_map(self, x: Tensor) -> Tensor:
        """(B, C, Y, X) -> both logits at each deepest px (B, 2, Y / 16, X / 16), encoder only."""
        return self._gate_map(self._encode(x)[-1])

    def forward(self, x: Tensor) -> TrainingOutput:
        """Return the finest logits, the deep supervision's, and ``cls`` with CGM."""
        self.check_size(x)
        encoded = self._encode(x)
        maps = self._decode(encoded)
        logits = [self.head(maps[0])]
        for level, head in enumerate(self.side_heads, start=1):
            logits.append(upsample(head(maps[level]), 2**level))
        if self.gate_head is None:
            return {"logits": logits}
        return {"logits": logits, "cls": _something(self._gate_map(encoded[-1]))}

    def inference(self) -> InferenceNet:
        """Return the inference form; with CGM it has ``gate_map`` and ``gate_logits``."""
        form = InferenceNet(self) if self.gate_head is None else GatedInferenceNet(self)
        if isinstance(form.net, UNet3Plus):
            form.net.side_heads = nn.ModuleList()
        return form


class GatedInferenceNet(InferenceNet):
    """Inference form with the classification-guided module beside it.

    ``forward`` gives logits that are not gated. The mask of an image where the largest logit of
    "something" in ``gate_map`` is not above that of "nothing" is all background.
    """

    def gate_map(self, x: Tensor) -> Tensor:
        """(B, C, Y, X) -> both logits at each deepest px (B, 2, Y / 16, X / 16), encoder only."""
        self.net.check_size(x)
        if not isinstance(self.net, UNet3Plus):
            raise ModelError(f"{type(self.net).__name__} has no gate")
        return self.net.gate_map(x)

    def gate_logits(self, x: Tensor, *, crop_px: int = 0) -> Tensor:
        """(B, C, Y, X) -> (B,): by how much "something" is larger, ``crop_px`` (x 16) cut per side.

        Tiles cut their halo, so that padding is never part of a maximum.
        """
        return _something(crop(self.gate_map(x), crop_px // 2 ** (_LEVELS - 1)))

    def gate(self, x: Tensor) -> Tensor:
        """Return ``gate_logits`` of the whole of ``x``: (B,)."""
        return self.gate_logits(x)


def _something(gate: Tensor) -> Tensor:
    """(B, 2, Y, X) -> (B,): the largest logit of "something" minus the largest of "nothing"."""
    largest = gate.amax(dim=(2, 3))
    return largest[:, 1] - largest[:, 0]


def _down(kind: Down, channels: int) -> nn.Module:
    if kind == "max":
        return nn.MaxPool2d(2)
    if kind == "avg":
        return nn.AvgPool2d(2)
    return nn.Conv2d(channels, channels, 2, stride=2)
