"""``Race``: ways to run a network timed against each other, the fastest kept ready."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from tilepipe.infer.backends import make_backend, means_out_of_memory, seconds_a_batch
from tilepipe.models import Model
from tilepipe.tiling import Box, TilePlan

if TYPE_CHECKING:
    from tilepipe.infer.settings import Settings


@dataclass(frozen=True, slots=True)
class Trial:
    """One measured way to run the network."""

    input_px: int
    core_px: int
    batch: int
    mpix_per_s: float
    """Output px that a unit keeps, per second."""


def speed_of(trial: Trial) -> float:
    """Return what trials are compared by."""
    return trial.mpix_per_s


class Contender:
    """One way to run the network, ready to be timed."""

    def __init__(
        self,
        settings: Settings,
        model: Model,
        plan: TilePlan,
        batch: int,
        *,
        dtype: np.dtype[Any],
        budget_s: float,
        clock: Callable[[], float],
    ) -> None:
        side = plan.input_px
        rng = np.random.default_rng(0)
        tile = rng.integers(0, 255, (model.in_channels, side, side)).astype(dtype)
        self._plan, self._tiles, self._clock = plan, [tile] * batch, clock
        self._kept_px = kept_px(plan, batch, device=settings.device)
        self._backend = make_backend(
            settings.backend,
            model,
            plan,
            batch=batch,
            dtype=dtype,
            device=settings.device,
            precision=settings.precision,
            threads=settings.threads,
            output="probabilities" if plan.mode == "blended" else "ids",
        )
        try:
            first_s = seconds_a_batch(self._backend, self._tiles, count=1, clock=clock)
            # Of a heavy network a lap of a batch a stream must do: the budget is for all.
            self._count = 4 if 8 * first_s < budget_s / 4 else 2
            if 8 * first_s < budget_s:  # every stream's first batch takes longer
                seconds_a_batch(self._backend, self._tiles, count=2, clock=clock)
        except BaseException:
            self.close()
            raise

    def lap(self) -> Trial:
        """Time a few batches."""
        took_s = seconds_a_batch(self._backend, self._tiles, count=self._count, clock=self._clock)
        plan, batch = self._plan, len(self._tiles)
        return Trial(plan.input_px, plan.core_px, batch, self._kept_px / took_s / 1e6)

    def close(self) -> None:
        """Free the back-end."""
        self._backend.close()


class Race:
    """Times ways to run the network and keeps as many as ``at_once`` ready for another lap."""

    def __init__(self, enter: Callable[[TilePlan, int], Contender]) -> None:
        self.trials: dict[tuple[int, int], Trial] = {}
        """By input px and batch; the best figure of each."""
        self.at_once = 1
        self._enter = enter
        self._ready: dict[tuple[int, int], Contender] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._keep(0)

    def lap(self, plan: TilePlan, batch: int) -> None:
        """Time one; it is left out where memory runs out."""
        place = plan.input_px, batch
        try:
            if place not in self._ready:
                self._keep(self.at_once - 1)
                self._ready[place] = self._enter(plan, batch)
            found = self._ready[place].lap()
        except Exception as error:
            if not means_out_of_memory(error):
                raise
            self.trials.pop(place, None)
            self._keep(0)
            return
        self.trials[place] = max(self.trials.get(place, found), found, key=speed_of)

    def _keep(self, count: int) -> None:
        """Close all but the fastest ``count``."""
        slowest_first = sorted(
            self._ready, key=lambda p: speed_of(self.trials[p]) if p in self.trials else 0.0
        )
        for place in slowest_first[: len(slowest_first) - count]:
            self._ready.pop(place).close()


def kept_px(plan: TilePlan, batch: int, *, device: str) -> float:
    """Output px per batch that a whole unit keeps.

    A GPU computes the last batch of a unit as if it were full: in one of four tiles whose unit has
    one alone, three are for nothing.
    """
    if device == "cpu":
        return batch * useful_px(plan)
    side = min(plan.unit_px, max(plan.extent))
    tiles = plan.n_tiles(Box(0, 0, side, side))
    return tiles * useful_px(plan) / -(-tiles // batch)


def useful_px(plan: TilePlan) -> float:
    """Output px per tile that a whole unit keeps: its last tiles may stick out."""
    side = min(plan.unit_px, max(plan.extent))
    if plan.mode == "blended":
        return float(plan.core_px**2)
    return side**2 / (-(-side // plan.core_px)) ** 2
