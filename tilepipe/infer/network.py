"""``TileNetwork``: from raw pixels of tiles to class ids of their cores, all on the device."""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from tilepipe.infer.caches import key_of
from tilepipe.infer.fusion import fuse, fuse_on_gpu
from tilepipe.models import Model
from tilepipe.tiling import TilePlan

Output = Literal["ids", "ids+probabilities", "probabilities", "logits"]
"""``ids+probabilities``: class ids, and the quantised probabilities of the foreground classes."""

TORCH_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
"""By the name of the precision; float64 is for the checks of exactness."""

_FEW_CLASSES = 16


def divisor_of(dtype: np.dtype[Any]) -> float:
    """Return what pixels of ``dtype`` are divided by, so that 1.0 is full scale."""
    return {"u1": 255.0, "u2": 65535.0}.get(f"{dtype.kind}{dtype.itemsize}", 1.0)


def ids_of(logits: Tensor, *, activation: str, n_classes: int) -> Tensor:
    """Class ids of logits: (B, K, Y, X) -> (B, Y, X) uint8; the lowest id wins a tie.

    With a sigmoid and one class more than outputs, id 0 is where no output is above 0 (p > 0.5).
    """
    outputs = logits.shape[1]
    background = activation == "sigmoid" and n_classes == outputs + 1
    if background and outputs == 1:
        return (logits[:, 0] > 0).to(torch.uint8)
    if outputs == 2 and not background:
        return (logits[:, 1] > logits[:, 0]).to(torch.uint8)
    if outputs > _FEW_CLASSES:
        best, ids = logits.max(dim=1)
        ids = ids.to(torch.uint8)
        return torch.where(best > 0, ids + 1, torch.zeros_like(ids)) if background else ids
    # A chain of comparisons: one pass per class over small maps beats a strided arg-max, and
    # every back-end breaks ties alike.
    best = torch.zeros_like(logits[:, 0]) if background else logits[:, 0]
    ids = torch.zeros_like(best, dtype=torch.uint8)
    for output in range(0 if background else 1, outputs):
        higher = logits[:, output] > best
        best = torch.maximum(best, logits[:, output])
        ids = torch.where(higher, torch.full_like(ids, output + int(background)), ids)
    return ids


def probabilities_of(logits: Tensor, *, activation: str) -> Tensor:
    """Probabilities of logits of any precision: (B, K, Y, X) -> the same shape, float32."""
    logits = logits.to(torch.float32)
    return torch.sigmoid(logits) if activation == "sigmoid" else torch.softmax(logits, dim=1)


def quantise(probabilities: Tensor) -> Tensor:
    """Probabilities 0 to 1 of any shape -> uint8, ``round(255 * p)``."""
    return torch.round(probabilities * 255.0).to(torch.uint8)


class TileNetwork(nn.Module):
    """The whole way of a tile on the device: scale, normalise, network, crop, arg-max.

    Pixels (B, C, Y, X) of any dtype come in; class ids (B, core, core) uint8 (or float32
    probabilities (B, K, y, x) for blending, or logits) go out, with the sum of each tile's
    logits (B,) float32: not finite where a number overflowed on the way. With
    ``ids+probabilities`` the foreground's (B, classes - 1, core, core) uint8 come third.
    """

    def __init__(
        self,
        model: Model,
        plan: TilePlan,
        *,
        dtype: np.dtype[Any],
        precision: str,
        output: Output,
        gated: bool = False,
    ) -> None:
        super().__init__()
        self.compute_dtype = TORCH_DTYPES[precision]
        # A copy: one process may hold the same model in two precisions.
        self.network = copy.deepcopy(model.module).to(self.compute_dtype).eval()
        self.network.requires_grad_(False)
        self.activation = model.activation
        self.n_classes = len(model.classes)
        self.output = output
        self.gated = gated
        self.blended = plan.mode == "blended"
        self.crop_px = 0 if self.blended else plan.crop_px
        self.core_px = plan.output_px if self.blended else plan.core_px
        step_px = max(1, model.locality.input_step_px)
        self.trace_px = min(plan.input_px, model.locality.least_input_px + 4 * step_px)
        """Side of a tile that is enough to record the network's operations."""
        self.divisor = divisor_of(dtype)
        self.identity = key_of(
            model.name, model.sha256, dict(model.arguments), model.in_channels, model.activation,
            self.n_classes, asdict(model.normalisation), precision, output, gated,
            self.crop_px, self.core_px, self.divisor,
        )  # fmt: skip
        """Equal for networks that compute the same."""
        self.mean_std = model.normalisation.kind == "mean-std"
        self.register_buffer("mean", _per_channel(model.normalisation.mean))
        self.register_buffer("std", _per_channel(model.normalisation.std))
        self.mean: Tensor
        self.std: Tensor
        self._by_rows = False

    def channels_last(self) -> TileNetwork:
        """Lay the weights out as the pixels are; returns itself."""
        for parameter in self.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        return self

    def for_processor(self) -> TileNetwork:
        """Have torch run it on a processor as fast as it can; returns itself."""
        fuse(self.network, self.compute_dtype)
        self._by_rows = True
        return self.channels_last()

    def for_gpu(self, device: str) -> TileNetwork:
        """Move it to a GPU and have torch run it there as fast as it can; returns itself."""
        if self.compute_dtype == torch.float32:
            # TF32 keeps 10 bits: that would not be float32.
            torch.backends.cudnn.allow_tf32 = False
            torch.backends.cuda.matmul.allow_tf32 = False
        # Some of cuDNN's transposed convolutions add in the order in which threads come.
        torch.backends.cudnn.deterministic = True
        fuse_on_gpu(self.network, self.compute_dtype, device)
        return self.to(device).channels_last()

    def normalise(self, pixels: Tensor) -> Tensor:
        """Return (B, C, Y, X) in the compute dtype and channels-last, as the network expects it."""
        # In float32: a bfloat16 has 8 bits, too few for the difference of a pixel and a mean.
        # The same operations in the same order as ``Normalisation``: the same last bit.
        if self._by_rows:
            return self._normalised_rows(pixels)
        x = pixels.to(torch.float32) / self.divisor
        if self.mean_std:
            x = (x - self.mean) / self.std
        # Not by contiguous(): one channel lies both ways and would be left as it is, and cuDNN
        # would take that for channels-first and answer so.
        return x.to(self.compute_dtype, memory_format=torch.channels_last)

    def _normalised_rows(self, pixels: Tensor) -> Tensor:
        """Do the same in place, a row at once: torch is slow where three channels lie innermost."""
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        x = pixels.to(torch.float32, copy=True)
        batch, channels, height, width = x.shape
        rows = x.permute(0, 2, 3, 1).view(batch, height, width * channels)
        rows.div_(self.divisor)
        if self.mean_std:
            rows.sub_(self._across(self.mean, x)).div_(self._across(self.std, x))
        return x.to(self.compute_dtype)

    @staticmethod
    def _across(values: Tensor, x: Tensor) -> Tensor:
        """Repeat values per channel, (1, C or 1, 1, 1), over a row of ``x``: (X * C,)."""
        channels, width = x.shape[1], x.shape[3]
        return values.view(-1).expand(channels).repeat(width)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Return (ids or probabilities, sums of logits), and quantised probabilities if asked."""
        x = self.normalise(pixels)
        logits = self.network(x)
        start, stop = self.crop_px, self.crop_px + self.core_px
        logits = logits[:, :, start:stop, start:stop]
        sums = logits.sum(dim=(1, 2, 3), dtype=torch.float32)
        if self.output in ("ids", "ids+probabilities"):
            ids = ids_of(logits, activation=self.activation, n_classes=self.n_classes)
            is_open = self._is_open(x) if self.gated else None
            if is_open is not None:
                ids = ids * is_open[:, 0]
            if self.output == "ids":
                return ids, sums
            probabilities = probabilities_of(logits, activation=self.activation)
            # Without the output of a softmax's class 0: the background is no channel.
            quantised = quantise(probabilities[:, probabilities.shape[1] - (self.n_classes - 1) :])
            return ids, sums, quantised if is_open is None else quantised * is_open
        if self.output == "logits":
            return logits.to(torch.float32), sums
        probabilities = probabilities_of(logits, activation=self.activation)
        if self.gated and not self.blended:
            # The engine does not gate blended tiles, so neither does what is compared with it.
            probabilities = probabilities * self._is_open(x)
        return probabilities, sums

    def _is_open(self, x: Tensor) -> Tensor:
        """Return (B, 1, 1, 1) uint8: 1 where a tile's gate is open."""
        gate: Any = self.network.gate_logits
        return (gate(x, crop_px=self.crop_px) > 0).to(torch.uint8).view(-1, 1, 1, 1)


def _per_channel(values: tuple[float, ...]) -> Tensor:
    """Return values, or 0 where there are none, as (1, C, 1, 1) float32."""
    return torch.tensor(values or (0.0,), dtype=torch.float32).view(1, -1, 1, 1)
