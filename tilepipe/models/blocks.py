"""Blocks that the architectures share; all take and return (B, C, Y, X) float tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from tilepipe.errors import ModelError

Norm = Literal["batch", "none"]
MAX_WIDTH = 8192


class ConvBlock(nn.Module):
    """Convolution, optional BatchNorm, optional ReLU.

    (B, in, Y, X) -> (B, out, Y', X'): Y' = Y if ``padded``, else Y - (kernel - 1) * dilation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel: int = 3,
        dilation: int = 1,
        stride: int = 1,
        padded: bool = True,
        norm: Norm = "batch",
        relu: bool = True,
    ) -> None:
        super().__init__()
        if norm not in ("batch", "none"):
            raise ModelError(f"norm {norm!r}; the choices are 'batch' and 'none'")
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel,
            stride=stride,
            padding=dilation * (kernel - 1) // 2 if padded else 0,
            dilation=dilation,
        )
        self.norm: nn.Module = nn.BatchNorm2d(out_channels) if norm == "batch" else nn.Identity()
        self.act: nn.Module = nn.ReLU(inplace=True) if relu else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Apply convolution, norm and activation in this order."""
        out: Tensor = self.act(self.norm(self.conv(x)))
        return out

    def fold(self) -> None:
        """Put an eval BatchNorm into the convolution's weights."""
        if isinstance(self.norm, nn.BatchNorm2d):
            self.conv = fuse_conv_bn_eval(self.conv, self.norm)
            self.norm = nn.Identity()


class ConvChain(nn.Sequential):
    """``count`` 3x3 ConvBlocks in a row: (B, in, Y, X) -> (B, out, Y', X').

    ``relu_between=False`` leaves a ReLU after the last one only, as some published weights have it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        count: int = 2,
        dilation: int = 1,
        padded: bool = True,
        norm: Norm = "batch",
        relu_between: bool = True,
    ) -> None:
        super().__init__(
            *(
                ConvBlock(
                    in_channels if index == 0 else out_channels,
                    out_channels,
                    dilation=dilation,
                    padded=padded,
                    norm=norm,
                    relu=relu_between or index == count - 1,
                )
                for index in range(count)
            )
        )


def fold_norms(module: nn.Module) -> None:
    """Fold every eval BatchNorm of ``module`` into its convolution, in place."""
    for part in module.modules():
        if isinstance(part, ConvBlock):
            part.fold()
    left = [name for name, part in module.named_modules() if isinstance(part, nn.BatchNorm2d)]
    if left:
        raise ModelError(f"BatchNorm outside a ConvBlock cannot be folded: {', '.join(left)}")


def max_pool(x: Tensor, factor: int = 2) -> Tensor:
    """Max-pool in steps of its side: (B, C, Y, X) -> (B, C, Y // factor, X // factor).

    On a processor torch looks for the places of the largest values, too; where nothing asks for
    them, the larger of two rows, then of two columns, is the same in less than half of the time.
    """
    while factor % 2 == 0 and _has_plain_pairs(x):
        batch, channels, height, width = x.shape
        rows = x.permute(0, 2, 3, 1).reshape(batch, height // 2, 2, width * channels)
        larger = torch.maximum(rows[:, :, 0], rows[:, :, 1])
        pairs = larger.view(batch, height // 2, width // 2, 2, channels)
        x = torch.maximum(pairs[..., 0, :], pairs[..., 1, :]).permute(0, 3, 1, 2)
        factor //= 2
    return x if factor == 1 else functional.max_pool2d(x, factor)


def _has_plain_pairs(x: Tensor) -> bool:
    """Tell whether rows and columns of a map can be paired as they lie, and nobody is watching."""
    return (
        x.device.type == "cpu"
        and torch.is_inference_mode_enabled()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        and x.shape[2] % 2 == 0
        and x.shape[3] % 2 == 0
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def upsample(x: Tensor, factor: int, *, align_corners: bool = False) -> Tensor:
    """Enlarge bilinearly: (B, C, Y, X) -> (B, C, Y * factor, X * factor)."""
    if factor == 1:
        return x
    return functional.interpolate(
        x, scale_factor=factor, mode="bilinear", align_corners=align_corners
    )


def resize(x: Tensor, size: Sequence[int], *, align_corners: bool) -> Tensor:
    """Resize bilinearly: (B, C, Y, X) -> (B, C, *size)."""
    return functional.interpolate(x, size=tuple(size), mode="bilinear", align_corners=align_corners)


def crop(x: Tensor, px: int) -> Tensor:
    """Cut ``px`` from each side: (B, C, Y, X) -> (B, C, Y - 2 px, X - 2 px)."""
    return x[..., px : x.shape[-2] - px, px : x.shape[-1] - px] if px else x


def join(*maps: Tensor) -> Tensor:
    """Concatenate along the channels: (B, C1, Y, X), (B, C2, Y, X) -> (B, C1 + C2, Y, X)."""
    return torch.cat(maps, dim=1)


def level_widths(base: int, levels: int, widths: Sequence[int] | None = None) -> list[int]:
    """Channels of each of ``levels`` levels: ``widths`` if given, else base doubling each level."""
    if not 1 <= base <= 1024:
        raise ModelError(f"base {base}; the first level takes 1 to 1024 channels")
    chosen = [base * 2**level for level in range(levels)] if widths is None else list(widths)
    if len(chosen) != levels:
        raise ModelError(f"widths {chosen} name {len(chosen)} levels; the network has {levels}")
    if not all(isinstance(width, int) and 1 <= width <= 2 * MAX_WIDTH for width in chosen):
        raise ModelError(f"widths {chosen}; each level takes 1 to {2 * MAX_WIDTH} channels")
    return chosen


def check_depth(depth: int) -> int:
    """Return ``depth`` (poolings); ModelError unless 1 to 7."""
    if not isinstance(depth, int) or not 1 <= depth <= 7:
        raise ModelError(f"depth {depth!r}; a network pools 1 to 7 times")
    return depth


def he_init(module: nn.Module) -> None:
    """Draw convolution weights from He's normal distribution, biases zero (global generator).

    Its deviation is sqrt(2 / N) with N the incoming nodes of one neuron (2015 U-Net paper, §3).
    A network on the meta device, known for its shapes alone, is left as it is: torch would load its
    compiler (a second) to draw nothing.
    """
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.ConvTranspose2d) and not part.weight.is_meta:
            nn.init.normal_(part.weight, std=math.sqrt(2.0 / fan_in(part)))
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def fan_in(conv: nn.Conv2d | nn.ConvTranspose2d) -> int:
    """Return the numbers that one output of a convolution is summed from."""
    area = conv.kernel_size[0] * conv.kernel_size[1]
    if isinstance(conv, nn.ConvTranspose2d):
        # Each output px of a strided transposed convolution sees area / stride² weights.
        return max(1, conv.in_channels * area // (conv.stride[0] * conv.stride[1]))
    return conv.in_channels // conv.groups * area
