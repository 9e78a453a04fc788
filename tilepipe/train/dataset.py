"""Random samples of annotated images: cut, warped, recoloured, with their targets and weights.

A sample is a function of (seed, step, place in the batch) alone, so a resumed training sees what
an uninterrupted one sees. A valid network reads its margin around what it is taught; where that
leaves the image it is mirrored, exactly as in inference.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tilepipe.errors import TrainError
from tilepipe.tiling import Box, read_mirrored
from tilepipe.train.augment import NO_AUGMENT, AugmentSpec, sample_at, source_coordinates
from tilepipe.train.colour import LUMINANCE, vary_colour
from tilepipe.train.images import Pair, Raster, open_raster
from tilepipe.train.targets import Target, make_target
from tilepipe.train.weight_map import border_term, influence_px


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

    def targets(self, labels: NDArray[Any]) -> NDArray[np.uint8]:
        """(y, x) labels -> (y, x) uint8 class ids."""
        return make_target(labels, self.target, n_classes=self.n_classes, ring_px=self.ring_px)

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
        """How far labels around a piece matter to it."""
        reach = influence_px(w0=self.w0, sigma=self.sigma) if self.weighted else 0
        return max(reach, int(self.ring_px) + 2 if self.target == "foreground+border" else 0)


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step learns from."""

    images: Tensor
    """(B, C, S, S) float32, shares of the dtype's range."""
    targets: Tensor
    """(B, O, O) int64 class ids."""
    weights: Tensor | None
    """(B, O, O) float32."""


@dataclass(frozen=True)
class _Kept:
    image: NDArray[Any]
    targets: NDArray[np.uint8]
    weights: NDArray[np.float16] | None


def to_share(pixels: NDArray[Any], *, channels: int) -> NDArray[np.float32]:
    """(c, y, x) pixels -> (channels, y, x) float32 shares of the dtype's range.

    A grey image fills every channel of a colour network; colour becomes luminance for one channel.
    Raises TrainError where channels cannot be matched.
    """
    if pixels.dtype.kind == "u":
        share = pixels.astype(np.float32) / np.float32(np.iinfo(pixels.dtype).max)
    elif pixels.dtype.kind == "f":
        share = pixels.astype(np.float32)
    else:
        raise TrainError(f"images of dtype {pixels.dtype}; uint8, uint16 or float wanted")
    if share.shape[0] == channels:
        return share
    if share.shape[0] == 1:
        return np.repeat(share, channels, axis=0)
    if share.shape[0] == 3 and channels == 1:
        return np.tensordot(np.array(LUMINANCE, np.float32), share, axes=1)[None]
    raise TrainError(f"images of {share.shape[0]} channels for a network of {channels}")


def read_labels(raster: Raster, box: Box) -> NDArray[Any]:
    """(y, x) integer labels of a box; TrainError where the file is not a label image."""
    planes = raster.read(box)
    if planes.shape[0] != 1:
        if not (planes == planes[:1]).all():
            raise TrainError(
                f"{raster.path}: labels of {planes.shape[0]} channels; one channel of ids wanted"
            )
        planes = planes[:1]
    if planes.dtype.kind not in "ui":
        raise TrainError(f"{raster.path}: labels of dtype {planes.dtype}; integers wanted")
    return planes[0]


class Samples:
    """Draws batches from annotated images."""

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
        self._rasters: dict[int, tuple[Raster, Raster]] = {}
        chances = [(kind_weights or {}).get(pair.kind, 1.0) for pair in pairs]
        if min(chances) < 0 or sum(chances) <= 0:
            raise TrainError(f"kind weights {kind_weights}: no image has a chance")
        self._chances = torch.tensor(chances, dtype=torch.float64)

    def batch(self, step: int, size: int, device: torch.device) -> Batch:
        """Draw the batch of ``step``."""
        drawn = [self._sample(step, place, device) for place in range(size)]
        weights = [weight for _, _, weight in drawn if weight is not None]
        return Batch(
            images=torch.stack([image for image, _, _ in drawn]),
            targets=torch.stack([target for _, target, _ in drawn]),
            weights=torch.stack(weights) if weights else None,
        )

    def _sample(
        self, step: int, place: int, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        generator = torch.Generator()
        generator.manual_seed(((self.seed * 1_000_003 + step) * 4_099 + place) % (1 << 62))
        index = int(torch.multinomial(self._chances, 1, generator=generator))
        image, labels = self._open(index)
        coordinates = source_coordinates(
            image.extent,
            self.input_px,
            out_px=self.output_px,
            spec=self.augment,
            generator=generator,
        )
        margin = (self.input_px - self.output_px) // 2
        inner = coordinates[
            margin : margin + self.output_px, margin : margin + self.output_px
        ].contiguous()
        if image.in_memory:
            kept, origin, inner_origin = self._whole(index), (0, 0), (0, 0)
        else:
            kept, origin, inner_origin = self._part(image, labels, coordinates, inner)
        share = torch.from_numpy(to_share(kept.image, channels=self.channels)).to(device)
        pixels = sample_at(share, coordinates, origin=origin)
        ids = torch.from_numpy(kept.targets)[None].to(device)
        target = sample_at(ids, inner, mode="nearest", origin=inner_origin)[0].long()
        weight = None
        if kept.weights is not None:
            values = torch.from_numpy(kept.weights)[None].to(device)
            weight = sample_at(values, inner, origin=inner_origin)[0]
        return vary_colour(pixels, spec=self.augment, generator=generator), target, weight

    def _open(self, index: int) -> tuple[Raster, Raster]:
        if index not in self._rasters:
            pair = self.pairs[index]
            image, labels = open_raster(pair.image), open_raster(pair.labels)
            if image.extent != labels.extent:
                raise TrainError(
                    f"{pair.name}: the image has {image.extent} px (y, x), "
                    f"its labels have {labels.extent}"
                )
            self._rasters[index] = (image, labels)
        return self._rasters[index]

    def _teach(self, image: NDArray[Any], labels: NDArray[Any]) -> _Kept:
        targets = self.teaching.targets(labels)
        weights = None
        if self.teaching.weighted:
            weights = self.teaching.weights(labels, targets).astype(np.float16)
        return _Kept(np.ascontiguousarray(image), targets, weights)

    def _whole(self, index: int) -> _Kept:
        if index not in self._kept:
            image, labels = self._open(index)
            box = Box.of_shape(image.extent)
            kept = self._teach(image.read(box), read_labels(labels, box))
            self._keep_bytes -= kept.image.nbytes + 3 * kept.targets.nbytes
            if self._keep_bytes < 0:
                return kept
            self._kept[index] = kept
        return self._kept[index]

    def _part(
        self, image: Raster, labels: Raster, coordinates: Tensor, inner: Tensor
    ) -> tuple[_Kept, tuple[int, int], tuple[int, int]]:
        box = _hull(coordinates)
        pixels = read_mirrored(image.read, box, image.extent)
        taught = _hull(inner).grow(self.teaching.reach_px)
        ids = read_mirrored(lambda part: read_labels(labels, part), taught, labels.extent)
        kept = self._teach(np.zeros((1, 1, 1), np.uint8), ids)
        return (
            _Kept(pixels, kept.targets, kept.weights),
            (box.y0, box.x0),
            (taught.y0, taught.x0),
        )


def _hull(coordinates: Tensor) -> Box:
    low = coordinates.flatten(0, 1).amin(0).floor().int().tolist()
    high = coordinates.flatten(0, 1).amax(0).ceil().int().tolist()
    return Box(low[0], low[1], high[0] + 1, high[1] + 1)
