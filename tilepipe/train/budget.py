"""``Budget``: how much of its steps and its time a training has used, and when it validates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from tilepipe.train.spec import TrainSpec

N_VALIDATIONS = 12
"""Validations in a budget, if their distance is not given."""
VALIDATION_SHARE = 0.2
"""Of a budget of time, for validations on the way."""


@dataclass(frozen=True, slots=True)
class Budget:
    """The bounds of a training; whichever is reached first ends it."""

    steps: int | None
    """None if only time bounds it."""
    minutes: float | None
    """None if only steps do."""

    @classmethod
    def of(cls, spec: TrainSpec, *, n_images: int) -> Self:
        """Return what the settings give to ``n_images`` images."""
        bounds = [] if spec.steps is None else [spec.steps]
        if spec.epochs is not None:
            bounds.append(max(1, round(spec.epochs * n_images / spec.batch)))
        return cls(min(bounds) if bounds else None, spec.minutes)

    def used(self, steps: int, elapsed_s: float) -> float:
        """Return the share (0-1) that is used: of steps or of time, whichever is further."""
        shares = [0.0]
        if self.steps is not None:
            shares.append(steps / self.steps)
        if self.minutes is not None:
            shares.append(elapsed_s / (60 * self.minutes))
        return min(1.0, max(shares))

    def next_validation(self, progress: float, took_s: float = 0.0) -> float:
        """Return the share at which to validate after ``progress``; the last took ``took_s``."""
        after = (int(progress * N_VALIDATIONS) + 1) / N_VALIDATIONS
        if self.minutes is None:
            return after
        # Of a short time a slow machine would spend nearly all on it.
        return max(after, progress + took_s / VALIDATION_SHARE / (60 * self.minutes))
