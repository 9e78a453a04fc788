"""``fuse``: convolutions of a network that runs in torch on a processor, each with its ReLU."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

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


def fuse(module: nn.Module, dtype: torch.dtype) -> None:
    """Replace every ConvBlock that is a convolution and a ReLU, in place, where torch can."""
    if not can_fuse(dtype):
        return
    for parent in list(module.modules()):
        for name, part in list(parent.named_children()):
            if isinstance(part, ConvBlock) and _is_plain(part):
                setattr(parent, name, FusedConv(part.conv))


def _is_plain(block: ConvBlock) -> bool:
    is_bare = isinstance(block.norm, nn.Identity) and isinstance(block.act, nn.ReLU)
    return is_bare and block.conv.padding_mode == "zeros"


@cache
def can_fuse(dtype: torch.dtype) -> bool:
    """Tell whether this torch has the operator here, and it gives what the two layers give.

    oneDNN has no float64, and bfloat16 on few processors.
    """
    conv = nn.Conv2d(4, 4, 3, padding=1).to(dtype).requires_grad_(requires_grad=False)
    nn.init.constant_(conv.weight, 0.125)
    try:
        with torch.inference_mode():
            x = torch.linspace(-1, 1, 4 * 64 * 64).reshape(1, 4, 64, 64).to(dtype)
            x = x.contiguous(memory_format=torch.channels_last)
            expected = torch.relu(conv(x))
            return bool(torch.allclose(FusedConv(conv)(x), expected, rtol=0.01, atol=0.01))
    except (RuntimeError, AttributeError, TypeError):
        return False
