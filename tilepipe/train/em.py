"""The ISBI-2012 metrics of membrane segmentation: foreground-restricted Rand and warping error.

A mask is true inside cells and false on membranes. Cells are 4-connected, membranes 8-connected.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from tilepipe.train.overlap import shared_px

Mask = NDArray[np.bool_]


def rand_error(predicted: Mask, truth: Mask) -> float:
    """1 - F-score of the pixel pairs of true cells that are in one cell (Arganda-Carreras 2015).

    Only pixels inside true cells count. Those predicted as membrane are each alone. 0 is perfect;
    NaN where there is no true cell, so no case.
    Two boolean (y, x) masks.
    """
    truth_cells, predicted_cells = ndimage.label(truth)[0], ndimage.label(predicted)[0]
    return rand_error_of(shared_px(truth_cells[truth], predicted_cells[truth]))


def rand_error_of(shared: Mapping[tuple[int, int], int]) -> float:
    """``rand_error`` from shared px of (true cell, predicted cell or 0 for membrane)."""
    by_truth: dict[int, int] = {}
    by_predicted: dict[int, int] = {}
    together, alone = 0, 0
    for (t, p), count in shared.items():
        if t == 0:
            continue
        by_truth[t] = by_truth.get(t, 0) + count
        if p == 0:
            alone += count
        else:
            by_predicted[p] = by_predicted.get(p, 0) + count
            together += count * count
    if not by_truth:
        return float("nan")
    together += alone
    precision = together / (sum(n * n for n in by_predicted.values()) + alone)
    recall = together / sum(n * n for n in by_truth.values())
    return 1 - 2 * precision * recall / (precision + recall)


def _simple_table() -> NDArray[np.bool_]:
    """For each pattern of 8 neighbours: can the centre be flipped without changing topology?

    The Yokoi number of 4-connected foreground is 1. Neighbours are counted around the centre from
    the right; bit k is neighbour k.
    """
    table = np.zeros(256, dtype=bool)
    for pattern in range(256):
        bits = [(pattern >> k) & 1 for k in range(8)]
        number = sum(bits[k] - bits[k] * bits[k + 1] * bits[(k + 2) % 8] for k in (0, 2, 4, 6))
        table[pattern] = number == 1
    return table


_SIMPLE = _simple_table()
_AROUND = ((0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1))


def simple_points(mask: Mask) -> Mask:
    """Tell of each pixel whether flipping it leaves the topology; outside is membrane."""
    padded = np.pad(mask, 1).astype(np.uint8)
    height, width = mask.shape
    pattern = np.zeros(mask.shape, np.uint8)
    for bit, (dy, dx) in enumerate(_AROUND):
        pattern |= padded[1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width] << bit
    found: Mask = _SIMPLE[pattern]
    return found


def warp(truth: Mask, predicted: Mask) -> Mask:
    """Bend ``truth`` towards ``predicted`` by flipping simple points until none is left.

    Four interleaved fields of pixels take turns: pixels of one field are not neighbours, so each
    flip sees the topology that the others leave. A point is looked at again when one beside it was
    flipped, so what is bent far costs what it flips, not the image once for each pixel of the way.
    """
    row = truth.shape[1] + 2
    around = np.array([dy * row + dx for dy, dx in _AROUND])
    warped, wanted = (np.pad(mask, 1).ravel() for mask in (truth, predicted))
    waits = np.pad((truth != predicted) & simple_points(truth), 1).ravel()

    def by_field(points: NDArray[np.intp]) -> list[NDArray[np.intp]]:
        field = points // row % 2 * 2 + points % row % 2
        return [points[field == k] for k in (3, 2, 1, 0)]  # of the frame, so from the first pixel

    turns = by_field(np.flatnonzero(waits))
    while any(points.size for points in turns):
        for turn in range(4):
            points, turns[turn] = turns[turn], turns[turn][:0]
            waits[points] = False
            pattern = np.zeros(points.size, np.uint8)
            for bit, step in enumerate(around):
                pattern |= warped[points + step].view(np.uint8) << bit
            flipped = points[_SIMPLE[pattern]]
            warped[flipped] = wanted[flipped]
            beside = np.unique(flipped[:, None] + around)
            beside = beside[(warped[beside] != wanted[beside]) & ~waits[beside]]
            waits[beside] = True
            turns = [np.concatenate(both) for both in zip(turns, by_field(beside), strict=True)]
    bent: Mask = warped.reshape(-1, row)[1:-1, 1:-1]
    return bent


def warping_error(predicted: Mask, truth: Mask) -> float:
    """Share of pixels that still differ after the best bending (Jain et al. 2010): topology only.

    Splits, mergers, holes and lost cells count; a shifted border does not.
    """
    return float((warp(truth, predicted) != predicted).mean())


def best_threshold(values: NDArray[Any], truth: Mask, candidates: NDArray[Any]) -> float:
    """Return the threshold of (y, x) cell probabilities with the least Rand error."""
    errors = [rand_error(values > threshold, truth) for threshold in candidates]
    return float(candidates[int(np.argmin(errors))])
