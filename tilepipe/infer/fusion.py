"""Convolutions with their ReLU in fewer passes: ``fuse`` on a processor, ``fuse_on_gpu``."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tilepipe.models.blocks import ConvBlock


class FusedConv(nn.Module):
    """A convolution and its ReLU in one pass of oneDNN: a map less to write and read again.

    (B, in, Y, X) -> (B, out, Y', X') as the convolution's. It is torch's own operator, the one that
    its compiler puts in the place of the two.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self._operator: Any = torch.ops.mkldnn._convolution_pointwise
        self._geometry = (conv.padding, conv.stride, conv.dilation, conv.groups)

    def forward(self, x: Tensor) -> Tensor:
        """Apply convolution and ReLU."""
        out: Tensor = self._operator(
            x, self.conv.weight, self.conv.bias, *self._geometry, "relu", [], ""
        )
        return out


class ConvBiasRelu(nn.Module):
    """A convolution, then bias and ReLU in one pass over its map, on a GPU.

    (B, in, Y, X) -> (B, out, Y', X') as the convolution's, to the same bits as the plain layers.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        """Apply convolution, bias and ReLU."""
        from tilepipe.infer.bias_relu import add_bias_relu

        conv = self.conv
        out = functional.conv2d(
            x, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups
        )
        assert self.conv.bias is not None
        # What computes a map that is too large for cuDNN lays it out in its own way.
        return add_bias_relu(out.contiguous(memory_format=torch.channels_last), self.conv.bias)


def fuse(module: nn.Module, dtype: torch.dtype) -> None:
    """Replace every ConvBlock that is a convolution and a ReLU, in place, where torch can."""
    if can_fuse(dtype):
        _replace(module, FusedConv)


def fuse_on_gpu(module: nn.Module, dtype: torch.dtype, device: str) -> None:
    """Replace every ConvBlock that is a convolution and a ReLU, in place, where Triton can."""
    if can_fuse_on_gpu(dtype, device):
        _replace(module, ConvBiasRelu)


def _replace(module: nn.Module, kind: Callable[[nn.Conv2d], nn.Module]) -> None:
    for parent in list(module.modules()):
        for name, part in list(parent.named_children()):
            if isinstance(part, ConvBlock) and _is_plain(part):
                setattr(parent, name, kind(part.conv))


def _is_plain(block: ConvBlock) -> bool:
    is_bare = isinstance(block.norm, nn.Identity) and isinstance(block.act, nn.ReLU)
    return is_bare and block.conv.padding_mode == "zeros" and block.conv.bias is not None


@cache
def can_fuse(dtype: torch.dtype) -> bool:
    """Tell whether this torch has the operator here, and it gives what the two layers give.

    oneDNN has no float64, and bfloat16 on few processors. Its ReLU makes 0 of what is no number: in
    float16, of which the largest is 65504, an overflow would go unseen and not be redone.
    """
    conv = nn.Conv2d(4, 4, 3, padding=1).to(dtype).requires_grad_(requires_grad=False)
    nn.init.constant_(conv.weight, 0.125)
    try:
        with torch.inference_mode():
            x = torch.linspace(-1, 1, 4 * 64 * 64).reshape(1, 4, 64, 64).to(dtype)
            if dtype == torch.float16:
                x[0, 0, 0, 0] = torch.nan
            x = x.contiguous(memory_format=torch.channels_last)
            found, expected = FusedConv(conv)(x), torch.relu(conv(x))
            return bool(torch.allclose(found, expected, rtol=0.01, atol=0.01, equal_nan=True))
    except (RuntimeError, AttributeError, TypeError):
        return False


@cache
def can_fuse_on_gpu(dtype: torch.dtype, device: str) -> bool:
    """Tell whether Triton works on this device and gives the bits that torch's two layers give.

    A GPU build of torch brings Triton along; it needs a C compiler and what Python's headers say.
    """
    draw = torch.Generator().manual_seed(0)
    values, bias = (torch.randn(shape, generator=draw) for shape in ((2, 24, 37, 41), (24,)))
    values[0, :2, 0, 0] = torch.tensor([torch.nan, torch.inf])
    try:
        from tilepipe.infer.bias_relu import add_bias_relu

        with torch.inference_mode():
            x = values.to(device, dtype).contiguous(memory_format=torch.channels_last)
            b = bias.to(device, dtype)
            expected = torch.relu(x + b.view(1, -1, 1, 1))
            found = add_bias_relu(x, b)
            same = torch.isnan(found) == torch.isnan(expected)
            same &= found.nan_to_num() == expected.nan_to_num()
            return bool(same.all())
    except Exception:  # whatever a missing compiler, a driver or an old GPU makes of it
        logging.getLogger(__name__).debug("bias and ReLU stay two passes", exc_info=True)
        return False
