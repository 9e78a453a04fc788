"""Instance metrics: which annotated cells were found, at IoU thresholds 0.5 ... 0.95.

A predicted and a true cell match at threshold t if their IoU is at least t (above 0.5, so at 0.5
exactly only strictly more counts). Above 0.5 a cell can have one partner only, so no assignment
problem arises. F1 = 2 TP / (2 TP + FP + FN); AP = TP / (TP + FP + FN), as in the Data Science Bowl.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilepipe.train.overlap import shared_px

THRESHOLDS = tuple(round(0.5 + 0.05 * step, 2) for step in range(10))


@dataclass(frozen=True, slots=True)
class CellCounts:
    """True positives per threshold, and how many cells there are; adds up over images."""

    matched: tuple[int, ...]
    predicted: int
    truth: int

    def __add__(self, other: CellCounts) -> CellCounts:
        return CellCounts(
            tuple(a + b for a, b in zip(self.matched, other.matched, strict=True)),
            self.predicted + other.predicted,
            self.truth + other.truth,
        )

    def f1(self, index: int = 0) -> float:
        """F1 at ``THRESHOLDS[index]``; 1 where there is nothing to find and nothing found."""
        total = self.predicted + self.truth
        return 2 * self.matched[index] / total if total else 1.0

    def ap(self, index: int = 0) -> float:
        """TP / (TP + FP + FN) at ``THRESHOLDS[index]``."""
        either = self.predicted + self.truth - self.matched[index]
        return self.matched[index] / either if either else 1.0

    @property
    def mean_ap(self) -> float:
        """Mean of AP over all thresholds: the Data Science Bowl's score of one image."""
        return float(np.mean([self.ap(index) for index in range(len(THRESHOLDS))]))


NO_CELLS = CellCounts((0,) * len(THRESHOLDS), 0, 0)


def count_cells(predicted: NDArray[Any], truth: NDArray[Any]) -> CellCounts:
    """Match the cells of two (y, x) integer id images; 0 = background."""
    areas_truth: dict[int, int] = {}
    areas_predicted: dict[int, int] = {}
    shared: dict[tuple[int, int], int] = {}
    for (t, p), count in shared_px(truth, predicted).items():
        if t:
            areas_truth[t] = areas_truth.get(t, 0) + count
        if p:
            areas_predicted[p] = areas_predicted.get(p, 0) + count
        if t and p:
            shared[t, p] = count
    return match(areas_predicted, areas_truth, shared)


def match(
    areas_predicted: Mapping[int, int],
    areas_truth: Mapping[int, int],
    shared: Mapping[tuple[int, int], int],
) -> CellCounts:
    """Count matches from areas (px) and shared px of (truth, predicted) ids."""
    ious = np.array(
        [count / (areas_truth[t] + areas_predicted[p] - count) for (t, p), count in shared.items()]
    )
    matched = tuple(
        int((ious > threshold).sum() if threshold == 0.5 else (ious >= threshold).sum())
        for threshold in THRESHOLDS
    )
    return CellCounts(matched, len(areas_predicted), len(areas_truth))
