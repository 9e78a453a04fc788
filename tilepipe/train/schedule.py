"""Optimizers, and the learning rate over the budget."""

from __future__ import annotations

import math

import torch
from torch import nn

from tilepipe.train.spec import TrainSpec

WARM_UP = 0.1
"""Share of the budget in which one-cycle rises to the peak."""
_START, _END = 0.04, 0.0005
"""Of the peak: where one-cycle begins, and where both schedules end."""


def make_optimizer(spec: TrainSpec, module: nn.Module) -> torch.optim.Optimizer:
    """AdamW, or SGD with the paper's high momentum; no decay of biases and norms."""
    decayed = [p for p in module.parameters() if p.ndim > 1]
    plain = [p for p in module.parameters() if p.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": spec.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    if spec.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=peak(spec), momentum=spec.momentum)
    return torch.optim.AdamW(groups, lr=peak(spec))


def peak(spec: TrainSpec) -> float:
    """Return the highest learning rate."""
    if spec.lr is not None:
        return spec.lr
    return 0.01 if spec.optimizer == "sgd" else 0.002


def rate(spec: TrainSpec, progress: float) -> float:
    """Return the learning rate at ``progress`` (0-1) of the budget."""
    top = peak(spec)
    if spec.schedule == "constant":
        return top
    if spec.schedule == "one-cycle":
        if progress < WARM_UP:
            return top * _wave(_START, 1.0, progress / WARM_UP)
        progress = (progress - WARM_UP) / (1 - WARM_UP)
    return top * _wave(1.0, _END, progress)


def _wave(start: float, end: float, share: float) -> float:
    """Half a cosine from ``start`` to ``end``."""
    return end + (start - end) * (1 + math.cos(math.pi * min(1.0, share))) / 2
