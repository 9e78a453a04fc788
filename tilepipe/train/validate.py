"""How good a network is on whole annotated images, per kind: what training chooses weights by."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tilepipe.tiling import Box
from tilepipe.train.cells import NO_CELLS, CellCounts, count_cells, match
from tilepipe.train.dataset import Teaching
from tilepipe.train.ids import read_labels
from tilepipe.train.images import Pair, Raster, open_pair
from tilepipe.train.metrics import Confusion, class_score, confusion, foreground_dice
from tilepipe.train.overlap import OverlapCounter
from tilepipe.train.pixels import read_pixels, to_share
from tilepipe.train.predict import Forward, Sizes, iter_predicted, predict_turned, to_classes
from tilepipe.train.targets import separate

PIECE_PX = 2048
"""Side of what of a slide's labels is compared at once."""
_MOST_BYTES = 256 << 10
"""Of scores in the header of weights, which has a length of its own that none may pass."""


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
        image, labels = open_pair(pair)
        classes = classes_of(
            forward, image, sizes=sizes, halo_px=halo_px, channels=channels, device=device,
            precision=precision, turned=turned,
        )  # fmt: skip
        counts, cells = compare(classes, labels, teaching, n_classes=n_classes)
        part = sums.setdefault(
            pair.kind, _Sum(0, 0.0, np.zeros((n_classes, n_classes), np.int64), NO_CELLS)
        )
        part.images += 1
        part.dice += foreground_dice(counts)
        part.counts = part.counts + counts
        part.cells = part.cells + cells
    return tuple(_score(kind, sums[kind], teaching) for kind in sorted(sums))


def classes_of(
    forward: Forward,
    image: Raster,
    *,
    sizes: Sizes,
    halo_px: int,
    channels: int,
    device: torch.device,
    precision: str = "fp32",
    turned: bool = False,
) -> NDArray[np.uint8]:
    """Class ids (y, x) that a network finds; of the image a tile at a time is held as floats."""

    def read(box: Box) -> NDArray[np.float32]:
        return to_share(read_pixels(image, box), channels=channels)

    if turned:
        whole = read(Box.of_shape(image.extent))
        return to_classes(
            predict_turned(
                forward, whole, sizes, halo_px=halo_px, device=device, precision=precision
            )
        )
    classes = np.empty(image.extent, np.uint8)
    for core, values in iter_predicted(
        forward, read, image.extent, sizes, halo_px=halo_px, device=device, precision=precision
    ):
        classes[core.slices] = to_classes(values)
    return classes


def compare(
    classes: NDArray[np.uint8], labels: Raster, teaching: Teaching, *, n_classes: int
) -> tuple[Confusion, CellCounts]:
    """Hold (y, x) class ids against labels; those of a slide by pieces, as ``evaluate`` does.

    Rings, and the cells in them, are made of the whole, of whatever size.
    """
    whole = Box.of_shape(labels.extent)
    if labels.in_memory or teaching.target == "foreground+border":
        ids = read_labels(labels, whole)
        counts = confusion(classes, teaching.targets(ids, source=labels.path), n_classes)
        if teaching.target == "classes":
            return counts, NO_CELLS
        return counts, count_cells(to_cells(classes, teaching), ids)
    counts = np.zeros((n_classes, n_classes), np.int64)
    counter = OverlapCounter(labels.extent, truth_instances=True)
    for box in whole.split((PIECE_PX, PIECE_PX)):
        ids, mine = read_labels(labels, box), classes[box.slices]
        counts += confusion(mine, teaching.targets(ids, source=labels.path), n_classes)
        if teaching.target == "foreground":
            counter.add(mine, ids, box)
    overlap = counter.result()
    shared = {pair: count for pair, count in overlap.shared.items() if pair[1]}
    return counts, match(overlap.predicted, overlap.truth, shared)


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
    per_class = [class_score(part.counts, value).dice for value in range(1, len(part.counts))]
    present = [value for value in per_class if not np.isnan(value)]
    instances = teaching.target != "classes"
    return KindScore(
        kind=kind,
        images=part.images,
        dice=part.dice / part.images,
        pooled_dice=foreground_dice(part.counts),
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


def scores_json(scores: Sequence[KindScore]) -> list[dict[str, Any]] | None:
    """Return the scores as plain values for the header of weights; None of too many kinds.

    The log has them, of any number.
    """
    plain = [asdict(score) for score in scores]
    return plain if len(json.dumps(plain)) <= _MOST_BYTES else None
