"""Batches made ahead: the next ones, while the device learns from this one."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

import torch
from torch import Tensor

from tilepipe.threads import cores, several_at_once

Sample = tuple[Tensor, Tensor, Tensor | None]

MOST_THREADS = 8
"""A bound, not a measurement: no GPU was at hand to find how many keep one busy."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step learns from."""

    images: Tensor
    """(B, C, S, S) float32: shares of full scale, or floats as they are."""
    targets: Tensor
    """(B, O, O) int64 class ids."""
    weights: Tensor | None
    """(B, O, O) float32."""


class Draws(Protocol):
    """Where samples come from: any of them, from any thread."""

    def sample(self, step: int, place: int, device: torch.device) -> Sample:
        """Make the sample at one place of the batch of one step."""
        ...


def threads_for(device: torch.device) -> int:
    """Return how many threads make samples for a device; 0: none beside the one that learns.

    A processor that learns has no cores left over.
    """
    return 0 if device.type == "cpu" else max(1, min(MOST_THREADS, cores() - 1))


def batches(
    draws: Draws, *, first: int, size: int, device: torch.device, threads: int
) -> Generator[Batch]:
    """Yield the batches of step ``first``, and of all that follow it, as they are taken.

    With ``threads``, the samples of one batch more are made by then. They are the same however many
    threads make them. Raises what making a sample raises, when its batch is taken.
    """
    if threads == 0:
        for step in count(first):
            yield collate([draws.sample(step, place, device) for place in range(size)])
    maker = _Maker(draws, device)
    places = ((step, place) for step in count(first) for place in range(size))
    made = several_at_once(
        maker, places, at_once=threads, ahead=max(size, threads), name="tilepipe-sample"
    )
    with closing(made):
        while True:
            yield collate([maker.handed_over(next(made)) for _ in range(size)])


def collate(drawn: list[Sample]) -> Batch:
    """Stack samples."""
    weights = [weight for _, _, weight in drawn if weight is not None]
    return Batch(
        images=torch.stack([image for image, _, _ in drawn]),
        targets=torch.stack([target for _, target, _ in drawn]),
        weights=torch.stack(weights) if weights else None,
    )


class _Maker:
    """Makes samples, in each thread by one core and in a stream of the thread's own.

    Making one asks the device for numbers (is it grey? is it dark?): in the stream of the network
    each question would wait for the step under way.
    """

    def __init__(self, draws: Draws, device: torch.device) -> None:
        self._draws, self._device = draws, device
        self._cuda: Any = torch.cuda if device.type == "cuda" else None
        self._own = threading.local()

    def __call__(self, item: tuple[int, int]) -> Sample:
        if not hasattr(self._own, "stream"):
            torch.set_num_threads(1)
            self._own.stream = self._cuda.Stream(self._device) if self._cuda else None
        if self._own.stream is None:
            return self._draws.sample(*item, self._device)
        with self._cuda.stream(self._own.stream):
            made = self._draws.sample(*item, self._device)
        self._own.stream.synchronize()
        return made

    def handed_over(self, made: Sample) -> Sample:
        """Return a sample that is finished, for use in the stream of who asks.

        Its memory belongs to the stream that it was made in, which may take it again as soon as
        Python lets go of it, with the copy into the batch still to come.
        """
        if self._cuda:
            here = self._cuda.current_stream(self._device)
            for part in made:
                if part is not None:
                    part.record_stream(here)
        return made
