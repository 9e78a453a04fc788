"""``Net``: what every architecture has in common: legal sizes, training and inference form."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Required, TypedDict

import torch
from torch import Tensor, nn

from tilepipe.errors import ModelError, ShapeError
from tilepipe.models.blocks import fold_norms
from tilepipe.tiling import round_up


class TrainingOutput(TypedDict, total=False):
    """What a training form returns, in train and in eval mode."""

    logits: Required[list[Tensor]]
    """(B, K, Y - 2m, X - 2m) float each; the first is the main one, the others are the deep
    supervision's, already at the main one's size."""
    cls: Tensor
    """(B,) float logit of "there is something in this image" (UNet 3+ with CGM only)."""


class Net(nn.Module, ABC):
    """Training form of an architecture: (B, C, Y, X) float -> ``TrainingOutput``.

    ``inference()`` gives the form that segments: one map of logits, normalisation folded.
    """

    margin_px: int = 0
    """Px per side that the network consumes."""
    least_px: int = 16
    """Smallest legal input side."""
    step_px: int = 16
    """Legal sides are ``least_px + k * step_px``."""
    policy: str = "one output"
    """What ``inference()`` does with the side outputs."""

    def __init__(self, in_channels: int, classes: int) -> None:
        super().__init__()
        if not 1 <= in_channels <= 1024:
            raise ModelError(f"{in_channels} input channels; a network takes 1 to 1024")
        if not 1 <= classes <= 255:
            raise ModelError(f"{classes} classes; a mask holds 1 (sigmoid) to 255")
        self.in_channels = in_channels
        self.classes = classes

    @abstractmethod
    def forward(self, x: Tensor) -> TrainingOutput:
        """Return every output that a loss may use."""

    @abstractmethod
    def infer(self, x: Tensor) -> Tensor:
        """Return the one map of logits (B, K, Y - 2m, X - 2m) by the recorded policy."""

    def main_heads(self) -> list[nn.Conv2d]:
        """Return the convolutions whose (mean) output is the inference form's logits."""
        head = self.head
        if not isinstance(head, nn.Conv2d):
            raise ModelError(f"{type(self).__name__} has no convolution called head")
        return [head]

    def next_legal(self, px: int) -> int:
        """Return the smallest legal input side that is at least ``px``."""
        return self.least_px + round_up(max(0, px - self.least_px), self.step_px)

    def check_size(self, x: Tensor) -> None:
        """Raise ShapeError unless ``x`` is (B, C, Y, X) with C and legal Y, X."""
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            return  # sizes are tensors there; the caller traces a legal size
        if x.dim() != 4:
            raise ShapeError(f"{type(self).__name__} takes (B, C, Y, X); got {x.dim()} axes")
        if x.shape[1] != self.in_channels:
            raise ShapeError(
                f"{type(self).__name__} takes {self.in_channels} channels; got {x.shape[1]}"
            )
        for axis, side in (("y", x.shape[2]), ("x", x.shape[3])):
            if side < self.least_px or (side - self.least_px) % self.step_px:
                raise ShapeError(
                    f"{type(self).__name__} cannot take {side} px along {axis}; the next legal "
                    f"side is {self.next_legal(side)} px "
                    f"({self.least_px} + k x {self.step_px})"
                )

    def inference(self) -> InferenceNet:
        """Return a copy that segments: eval, norms folded, no gradients, one map of logits."""
        return InferenceNet(self)


class InferenceNet(nn.Module):
    """Inference form: (B, C, Y, X) float normalised -> logits (B, K, Y - 2m, X - 2m)."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        net = copy.deepcopy(net).eval()
        fold_norms(net)
        self.net = net.requires_grad_(requires_grad=False)
        self.policy = net.policy
        self.margin_px = net.margin_px
        self.least_px = net.least_px
        self.step_px = net.step_px
        self.in_channels = net.in_channels
        self.eval()

    def next_legal(self, px: int) -> int:
        """Return the smallest legal input side that is at least ``px``."""
        return self.net.next_legal(px)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits; ShapeError names the next legal side."""
        self.net.check_size(x)
        return self.net.infer(x)
