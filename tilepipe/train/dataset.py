"""Random samples of annotated images: cut, warped, recoloured, with their targets and weights.

A sample is a function of (seed, step, place in the batch) alone, so a resumed training sees what
an uninterrupted one sees. A valid network reads its margin around what it is taught; where that
leaves the image it is mirrored, exactly as in inference.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tilepipe.errors import TrainError
from tilepipe.tiling import Box, mirror_source, read_mirrored
from tilepipe.train.augment import NO_AUGMENT, AugmentSpec, sample_at, source_coordinates
from tilepipe.train.colour import vary_colour
from tilepipe.train.ids import read_labels
from tilepipe.train.images import Pair, Raster, open_pair
from tilepipe.train.pixels import read_pixels, span_of, to_share
from tilepipe.train.targets import Target, make_target
from tilepipe.train.weight_map import border_term, influence_px

CELL_PX = 64
"""Cells of a slide up to this size are taught as they would be of the whole slide at once; larger
ones as if what is farther away were not there."""


@dataclass(frozen=True, slots=True)
class Teaching:
    """How labels become targets and weights."""

    target: Target
    n_classes: int
    ring_px: float = 2.0
    weighted: bool = False
    class_weights: tuple[float, ...] | None = None
    w0: float = 10.0
    sigma: float = 5.0

    def targets(self, labels: NDArray[Any], *, source: str = "labels") -> NDArray[np.uint8]:
        """(y, x) labels -> (y, x) uint8 class ids; TrainError names ``source``."""
        return make_target(
            labels, self.target, n_classes=self.n_classes, ring_px=self.ring_px, source=source
        )

    def weights(self, labels: NDArray[Any], targets: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(y, x) labels and class ids -> (y, x) float32 w(x) = w_c(class) + border term.

        Labels that are class ids have no cells: each connected part of class 1 and above is one.
        """
        from scipy import ndimage

        cells = ndimage.label(labels)[0] if self.target == "classes" else labels
        table = np.ones(256)
        if self.class_weights is not None:
            table[: len(self.class_weights)] = self.class_weights
        return (table[targets] + border_term(cells, w0=self.w0, sigma=self.sigma)).astype(
            np.float32
        )

    @property
    def reach_px(self) -> int:
        """How far labels around a piece matter to it.

        How wide a ring is depends on all of its cell, and whether two parts of a class are one cell
        on what lies between them: so cells near the piece are seen whole, up to ``CELL_PX``.
        """
        reach = influence_px(w0=self.w0, sigma=self.sigma) if self.weighted else 0
        if self.target == "foreground+border":
            return max(reach, CELL_PX + math.ceil(self.ring_px) + 1)
        return reach + CELL_PX if self.target == "classes" and self.weighted else reach


@dataclass(frozen=True)
class _Kept:
    image: NDArray[Any]
    span: tuple[float, float] | None
    targets: NDArray[np.uint8]
    weights: NDArray[np.float32] | None


class Samples:
    """Draws samples from annotated images."""

    def __init__(
        self,
        pairs: Sequence[Pair],
        *,
        teaching: Teaching,
        channels: int,
        input_px: int,
        output_px: int,
        augment: AugmentSpec = NO_AUGMENT,
        kind_weights: Mapping[str, float] | None = None,
        seed: int = 0,
        keep_bytes: int = 4 << 30,
    ) -> None:
        if not pairs:
            raise TrainError("no image is left to learn from")
        self.pairs = tuple(pairs)
        self.teaching = teaching
        self.channels = channels
        self.input_px, self.output_px = input_px, output_px
        self.augment = augment
        self.seed = seed
        self._keep_bytes = keep_bytes
        self._kept: dict[int, _Kept] = {}
        self._lock = threading.Lock()
        self._rasters: dict[int, tuple[Raster, Raster]] = {}
        chances = [(kind_weights or {}).get(pair.kind, 1.0) for pair in pairs]
        if min(chances) < 0 or sum(chances) <= 0:
            raise TrainError(f"kind weights {kind_weights}: no image has a chance")
        self._chances = torch.tensor(chances, dtype=torch.float64)

    def sample(
        self, step: int, place: int, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Make the sample at one place of the batch of one step; from any thread.

        Returns (C, S, S) float32, (O, O) int64 class ids, and (O, O) float32 weights or None.
        """
        generator = torch.Generator()
        generator.manual_seed(((self.seed * 1_000_003 + step) * 4_099 + place) % (1 << 62))
        index = int(torch.multinomial(self._chances, 1, generator=generator))
        whole = self._whole(index)
        extent = self._open(index)[0].extent if whole is None else whole.targets.shape
        coordinates = source_coordinates(
            (extent[0], extent[1]),
            self.input_px,
            out_px=self.output_px,
            spec=self.augment,
            generator=generator,
        )
        margin = (self.input_px - self.output_px) // 2
        inner = coordinates[
            margin : margin + self.output_px, margin : margin + self.output_px
        ].contiguous()
        if whole is not None:
            kept, origin, inner_origin = _cut(whole, coordinates, inner)
        else:
            kept, origin, inner_origin = self._part(*self._open(index), coordinates, inner)
        share = torch.from_numpy(to_share(kept.image, channels=self.channels)).to(device)
        pixels = sample_at(share, coordinates, origin=origin)
        ids = torch.from_numpy(kept.targets)[None].to(device)
        target = sample_at(ids, inner, mode="nearest", origin=inner_origin)[0].long()
        weight = None
        if kept.weights is not None:
            values = torch.from_numpy(kept.weights)[None].to(device)
            weight = sample_at(values, inner, origin=inner_origin)[0]
        varied = vary_colour(pixels, spec=self.augment, generator=generator, span=kept.span)
        if kept.image.dtype.kind == "u":  # shares of full scale, which no image can leave
            varied = varied.clamp(0.0, 1.0)
        return varied, target, weight

    def _open(self, index: int) -> tuple[Raster, Raster]:
        """Open a pair; only large ones stay open: others hold their pixels, or a file each."""
        if index in self._rasters:
            return self._rasters[index]
        opened = open_pair(self.pairs[index])
        if not opened[0].in_memory:
            self._rasters[index] = opened
        return opened

    def _teach(
        self, labels: NDArray[Any], *, source: str
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32] | None]:
        targets = self.teaching.targets(labels, source=source)
        if not self.teaching.weighted:
            return targets, None
        return targets, self.teaching.weights(labels, targets)

    def _whole(self, index: int) -> _Kept | None:
        """Return a whole pair, kept while there is room; None of a large one."""
        # One at a time: a border term holds many times the bytes of its image while it is made.
        with self._lock:
            if index not in self._kept:
                image, labels = self._open(index)
                if not image.in_memory:
                    return None
                box = Box.of_shape(image.extent)
                pixels = np.ascontiguousarray(read_pixels(image, box))
                taught = self._teach(read_labels(labels, box), source=labels.path)
                kept = _Kept(pixels, span_of(pixels), *taught)
                self._keep_bytes -= kept.image.nbytes + 5 * kept.targets.nbytes
                if self._keep_bytes < 0:
                    return kept
                self._kept[index] = kept
            return self._kept[index]

    def _part(
        self, image: Raster, labels: Raster, coordinates: Tensor, inner: Tensor
    ) -> tuple[_Kept, tuple[int, int], tuple[int, int]]:
        box, taught = _hull(coordinates), _hull(inner)
        pixels = read_mirrored(lambda part: read_pixels(image, part), box, image.extent)
        return (
            _Kept(pixels, span_of(pixels), *self._teach_part(labels, taught)),
            (box.y0, box.x0),
            (taught.y0, taught.x0),
        )

    def _teach_part(
        self, labels: Raster, box: Box
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32] | None]:
        """Teach a box of a large image as the whole would be: made first, then mirrored.

        In labels that are mirrored, a cell at the image's border has a neighbour: itself.
        """
        extent = labels.extent
        near = mirror_source(box, extent).grow(self.teaching.reach_px)
        near = near.intersect(Box.of_shape(extent))

        def mirrored(made: NDArray[Any]) -> NDArray[Any]:
            return read_mirrored(
                lambda part: made[part.shift(-near.y0, -near.x0).slices], box, extent
            )

        targets, weights = self._teach(read_labels(labels, near), source=labels.path)
        return mirrored(targets), None if weights is None else mirrored(weights)


def _cut(
    whole: _Kept, coordinates: Tensor, inner: Tensor
) -> tuple[_Kept, tuple[int, int], tuple[int, int]]:
    """Cut a kept pair down to what a sample reads of it, so that its cost is that of a sample.

    Where the image is left, the cut ends at the image's border, about which both are mirrored.
    """
    extent = (whole.targets.shape[0], whole.targets.shape[1])
    box, taught = (mirror_source(_hull(part), extent) for part in (coordinates, inner))
    weights = None if whole.weights is None else whole.weights[taught.slices]
    return (
        _Kept(
            whole.image[(slice(None), *box.slices)],
            whole.span,
            whole.targets[taught.slices],
            weights,
        ),
        (box.y0, box.x0),
        (taught.y0, taught.x0),
    )


def _hull(coordinates: Tensor) -> Box:
    low = coordinates.flatten(0, 1).amin(0).floor().int().tolist()
    high = coordinates.flatten(0, 1).amax(0).ceil().int().tolist()
    return Box(low[0], low[1], high[0] + 1, high[1] + 1)
