"""The state of a training on disk, without pickle: ``--resume`` goes on from it.

One safetensors file: network, averaged network, optimizer; counters and gradient scaler as JSON in
its header. It is written beside the old one and renamed over it, so a kill leaves one of the two.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tilepipe.errors import TrainError
from tilepipe.models.checkpoint import write_tensors
from tilepipe.train.validate import KindScore


@dataclass(slots=True)
class Counters:
    """Where a training stands."""

    step: int = 0
    """Steps done."""
    elapsed_s: float = 0.0
    best: float = float("-inf")
    """Validation metric of the weights kept so far."""
    best_step: int = 0
    sha256: str = ""
    """Of the weights kept so far."""
    scores: tuple[KindScore, ...] = ()
    """Of the weights kept so far."""
    loss_sum: float = 0.0
    """Of the steps since the last row of the log."""
    loss_count: int = 0


class Averaged:
    """Exponential moving average of a network's weights; the first steps count more evenly."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(requires_grad=False)
        self.decay = decay

    def update(self, module: nn.Module, step: int) -> None:
        """Take in the weights after ``step`` steps; integer buffers are copied."""
        decay = min(self.decay, (1 + step) / (10 + step))
        with torch.no_grad():
            mine = self.module.state_dict()
            for name, value in module.state_dict().items():
                if value.dtype.is_floating_point and decay > 0:
                    mine[name].lerp_(value, 1 - decay)
                else:
                    mine[name].copy_(value)


def save_state(
    path: Path,
    *,
    module: nn.Module,
    averaged: Averaged,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    counters: Counters,
    fingerprint: str,
) -> None:
    """Write the state atomically; ``fingerprint`` names settings and data.

    Raises CheckpointError if it cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for prefix, part in (("network", module), ("averaged", averaged.module)):
        for name, value in part.state_dict().items():
            tensors[f"{prefix}.{name}"] = value.detach().cpu().contiguous().clone()
    for index, entries in optimizer.state_dict()["state"].items():
        for name, value in entries.items():
            if value is not None:
                tensors[f"optimizer.{index}.{name}"] = torch.as_tensor(value).cpu().contiguous()
    header = {
        "counters": json.dumps(asdict(counters)),
        "scaler": json.dumps(scaler.state_dict()),
        "fingerprint": fingerprint,
    }
    write_tensors(path, tensors, metadata=header)


def load_state(
    path: Path,
    *,
    module: nn.Module,
    averaged: Averaged,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    fingerprint: str,
) -> Counters:
    """Read what ``save_state`` wrote into the parts; TrainError if it is of another training."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        counters = _counters(json.loads(header["counters"]))
        scale: dict[str, Any] = json.loads(header["scaler"])
        found = header["fingerprint"]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise TrainError(f"{path}: not the state of a training: {error}") from error
    if found != fingerprint:
        raise TrainError(
            f"{path}: the state of a training with other settings or data; resume with the same "
            "ones, or start anew without --resume"
        )
    try:
        module.load_state_dict(_under(tensors, "network."))
        averaged.module.load_state_dict(_under(tensors, "averaged."))
    except RuntimeError as error:
        raise TrainError(f"{path}: the state of another network: {error}") from error
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in _under(tensors, "optimizer.").items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    values = optimizer.state_dict()
    values["state"] = state
    optimizer.load_state_dict(values)
    if scale:  # empty where the precision needs no scaler
        scaler.load_state_dict(scale)
    return counters


def _counters(values: dict[str, Any]) -> Counters:
    """Build counters from plain values; TypeError or KeyError if they are not such."""
    scores = tuple(KindScore(**score) for score in values.pop("scores"))
    return Counters(**values, scores=scores)


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
