"""How good a network is on whole annotated images, per kind: what training chooses weights by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tilepipe.tiling import Box
from tilepipe.train.cells import NO_CELLS, CellCounts, count_cells
from tilepipe.train.dataset import Teaching
from tilepipe.train.ids import read_labels
from tilepipe.train.images import Pair, open_pair
from tilepipe.train.metrics import Confusion, class_score, confusion, dice, merge_foreground
from tilepipe.train.pixels import read_pixels, to_share
from tilepipe.train.predict import Forward, Sizes, predict, predict_turned, to_classes
from tilepipe.train.targets import separate


@dataclass(frozen=True, slots=True)
class KindScore:
    """Scores of the images of one kind."""

    kind: str
    images: int
    dice: float
    """Foreground Dice (every class but 0), mean over the images."""
    pooled_dice: float
    """The same over all pixels together; as of one image, 1 where there is none and none found."""
    mean_class_dice: float
    """Mean Dice over the classes that occur, background left out, pixels together."""
    pixel_accuracy: float
    f1: float | None
    """Instance F1 at IoU 0.5 over all cells together; None if labels are no instances."""
    mean_ap: float | None
    """Mean over IoU 0.5 ... 0.95 of TP / (TP + FP + FN), all cells together."""
    cells: int


@dataclass(slots=True)
class _Sum:
    images: int
    dice: float
    counts: Confusion
    cells: CellCounts


def score_images(
    forward: Forward,
    pairs: Sequence[Pair],
    *,
    sizes: Sizes,
    halo_px: int,
    teaching: Teaching,
    channels: int,
    device: torch.device,
    precision: str = "fp32",
    turned: bool = False,
) -> tuple[KindScore, ...]:
    """Run every image through the network and compare; one score per kind, in name order.

    ``turned`` averages over the 8 flips and quarter turns.
    """
    sums: dict[str, _Sum] = {}
    n_classes = max(2, teaching.n_classes)
    for pair in pairs:
        share, labels = load(pair, channels=channels)
        run = predict_turned if turned else predict
        values = run(forward, share, sizes, halo_px=halo_px, device=device, precision=precision)
        classes = to_classes(values)
        targets = teaching.targets(labels, source=str(pair.labels))
        part = sums.setdefault(
            pair.kind, _Sum(0, 0.0, np.zeros((n_classes, n_classes), np.int64), NO_CELLS)
        )
        part.images += 1
        part.dice += dice(classes != 0, targets != 0)
        part.counts = part.counts + confusion(classes, targets, n_classes)
        if teaching.target != "classes":
            part.cells = part.cells + count_cells(to_cells(classes, teaching), labels)
    return tuple(_score(kind, sums[kind], teaching) for kind in sorted(sums))


def load(pair: Pair, *, channels: int) -> tuple[NDArray[np.float32], NDArray[Any]]:
    """Read a whole pair: (c, y, x) float32 shares and (y, x) labels, of one extent."""
    image, labels = open_pair(pair)
    box = Box.of_shape(image.extent)
    return to_share(read_pixels(image, box), channels=channels), read_labels(labels, box)


def to_cells(classes: NDArray[Any], teaching: Teaching) -> NDArray[np.int32]:
    """(y, x) class ids -> (y, x) int32 cells, by the border class if there is one."""
    if teaching.target == "foreground+border":
        return separate(classes, border=2)
    # Only what has rings loses its smallest, as with `run --instances`.
    return separate(classes, border=None, min_area_px=1)


def _score(kind: str, part: _Sum, teaching: Teaching) -> KindScore:
    pooled = class_score(merge_foreground(part.counts), 1).dice
    per_class = [class_score(part.counts, value).dice for value in range(1, len(part.counts))]
    present = [value for value in per_class if not np.isnan(value)]
    instances = teaching.target != "classes"
    return KindScore(
        kind=kind,
        images=part.images,
        dice=part.dice / part.images,
        pooled_dice=1.0 if np.isnan(pooled) else pooled,
        mean_class_dice=float(np.mean(present)) if present else 1.0,
        pixel_accuracy=float(np.trace(part.counts) / part.counts.sum()),
        f1=part.cells.f1() if instances else None,
        mean_ap=part.cells.mean_ap if instances else None,
        cells=part.cells.truth,
    )


def overall(scores: Sequence[KindScore]) -> float:
    """Return the number that training maximises: the mean over kinds of a kind's score.

    Instances: the mean of foreground Dice and F1 at IoU 0.5. Class ids: the mean class Dice.
    """
    if not scores:
        return float("nan")
    parts = [s.mean_class_dice if s.f1 is None else (s.dice + s.f1) / 2 for s in scores]
    return float(np.mean(parts))
