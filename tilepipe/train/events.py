"""What a training reports while it runs, and what comes of it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tilepipe.train.validate import KindScore


@dataclass(frozen=True, slots=True)
class Started:
    """What is about to be trained."""

    training: int
    """Images."""
    validation: int
    device: str
    precision: str
    parameters: int
    resumed_step: int


@dataclass(frozen=True, slots=True)
class Stepped:
    """One step is done."""

    step: int
    progress: float
    """0-1 of the budget."""
    loss: float
    lr: float
    samples_per_s: float


@dataclass(frozen=True, slots=True)
class Validated:
    """The averaged weights were tried on the validation images."""

    step: int
    metric: float
    best: bool
    scores: tuple[KindScore, ...]


Event = Started | Stepped | Validated


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What came of it."""

    weights: Path
    sha256: str
    steps: int
    elapsed_s: float
    metric: float
    """Of the weights kept; -inf without validation images."""
    best_step: int
    scores: tuple[KindScore, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain values; a metric that does not exist is null."""
        return {
            **asdict(self),
            "weights": str(self.weights),
            "metric": self.metric if math.isfinite(self.metric) else None,
        }
