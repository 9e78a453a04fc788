"""Per-class metrics from a confusion matrix, which adds up over boxes of any image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Confusion = NDArray[np.int64]
"""(n, n) pixel counts: row = truth, column = prediction."""


def confusion(
    predicted: NDArray[Any], truth: NDArray[Any], n_classes: int, *, ignore: int | None = None
) -> Confusion:
    """Count (truth, predicted) class pairs of two (y, x) arrays of ids below ``n_classes``."""
    keep = np.ones(truth.shape, dtype=bool) if ignore is None else truth != ignore
    codes = truth[keep].astype(np.int64) * n_classes + predicted[keep].astype(np.int64)
    counts: Confusion = np.bincount(codes.ravel(), minlength=n_classes**2).astype(np.int64)
    return counts.reshape(n_classes, n_classes)


@dataclass(frozen=True, slots=True)
class ClassScore:
    """How one class was found; a share without a case (0 of 0) is NaN."""

    dice: float
    iou: float
    precision: float
    recall: float
    truth_px: int
    predicted_px: int


def _share(part: int, total: int) -> float:
    return part / total if total else float("nan")


def class_score(counts: Confusion, value: int) -> ClassScore:
    """Score class ``value`` of a confusion matrix."""
    both = int(counts[value, value])
    truth, predicted = int(counts[value].sum()), int(counts[:, value].sum())
    return ClassScore(
        dice=_share(2 * both, truth + predicted),
        iou=_share(both, truth + predicted - both),
        precision=_share(both, predicted),
        recall=_share(both, truth),
        truth_px=truth,
        predicted_px=predicted,
    )


def merge_foreground(counts: Confusion) -> Confusion:
    """Merge all classes but 0 into one: (n, n) -> (2, 2)."""
    merged = np.zeros((2, 2), np.int64)
    merged[0, 0] = counts[0, 0]
    merged[0, 1] = counts[0, 1:].sum()
    merged[1, 0] = counts[1:, 0].sum()
    merged[1, 1] = counts[1:, 1:].sum()
    return merged


def pixel_error(counts: Confusion) -> float:
    """Share of pixels with the wrong class; NaN without pixels."""
    total = int(counts.sum())
    return 1 - int(np.trace(counts)) / total if total else float("nan")


def foreground_dice(counts: Confusion) -> float:
    """Dice of all classes but 0 as one; 1 where there is none of them and none was found."""
    found = class_score(merge_foreground(counts), 1).dice
    return 1.0 if math.isnan(found) else found
