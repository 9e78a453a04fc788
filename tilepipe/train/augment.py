"""Where a training sample is taken from: flips, rotation, scale and elastic deformation.

The U-Net paper (section 3.1): "smooth deformations using random displacement vectors on a coarse
3 by 3 grid. The displacements are sampled from a Gaussian distribution with 10 pixels standard
deviation. Per-pixel displacements are then computed using bicubic interpolation." All of it is one
map from sample pixels to source coordinates, so that image, labels and weights are read once each,
by the same map, and beyond the image's borders by mirroring, as inference does.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn import functional

from tilepipe.tiling import Shape


class AugmentSpec(BaseModel):
    """How samples are varied; probabilities are 0-1, 0 turns a variation off."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    flips: bool = True
    """Mirror images and quarter turns."""
    rotate: float = Field(default=180.0, ge=0, le=180)
    """Largest rotation, degrees."""
    scale: float = Field(default=1.25, ge=1, le=8)
    """Zoom between 1/scale and scale, log-uniform."""
    elastic_px: float = Field(default=10.0, ge=0, le=1000)
    """Standard deviation of the displacement vectors, px."""
    elastic_grid: int = Field(default=3, ge=2, le=64)
    """Displacement vectors per axis."""
    elastic: float = Field(default=0.5, ge=0, le=1)
    gain: float = Field(default=1.4, ge=1, le=16)
    """Contrast between 1/gain and gain, log-uniform."""
    brightness: float = Field(default=0.08, ge=0, le=1)
    """Largest shift, share of the range: of bytes 0 to 255, else what nearly all pixels span."""
    gamma: float = Field(default=1.4, ge=1, le=8)
    """Exponent between 1/gamma and gamma, log-uniform."""
    noise: float = Field(default=0.03, ge=0, le=1)
    """Largest standard deviation of added noise, share of the same range."""
    blur_px: float = Field(default=1.2, ge=0, le=16)
    """Largest sigma of a Gaussian blur, px."""
    stain: float = Field(default=0.15, ge=0, le=1)
    """Largest relative change of haematoxylin, eosin and rest (RGB colour images only)."""
    tint: float = Field(default=0.0, ge=0, le=1)
    """Probability that a grey image is shown in one colour (RGB networks only)."""
    gray: float = Field(default=0.0, ge=0, le=1)
    """Probability that a colour image is shown in grey."""
    invert: float = Field(default=0.0, ge=0, le=1)
    """Probability that dark becomes bright."""


NO_AUGMENT = AugmentSpec(
    flips=False,
    rotate=0,
    scale=1,
    elastic=0,
    gain=1,
    brightness=0,
    gamma=1,
    noise=0,
    blur_px=0,
    stain=0,
)
"""Samples as they are."""


def uniform(generator: torch.Generator, low: float, high: float) -> float:
    """One number from [low, high)."""
    return low + (high - low) * float(torch.rand((), generator=generator))


def log_uniform(generator: torch.Generator, factor: float) -> float:
    """One number between 1/factor and factor, as likely up as down."""
    return float(math.exp(uniform(generator, -1.0, 1.0) * math.log(factor)))


def happens(generator: torch.Generator, probability: float) -> bool:
    """Tell whether it happens this time."""
    return bool(torch.rand((), generator=generator) < probability)


def source_coordinates(
    extent: Shape, side_px: int, *, out_px: int, spec: AugmentSpec, generator: torch.Generator
) -> Tensor:
    """Draw where the pixels of one sample come from.

    Parameters
    ----------
    extent
        Source image (y, x) px.
    side_px
        Side of the sample that the network reads.
    out_px
        Side of its output, centred in the sample: its centre region lies on the image, so that
        what is learnt from is image, and what is mirrored is mostly context.
    spec, generator
        What to vary; the source of chance (CPU).

    Returns
    -------
    (side_px, side_px, 2) float32 source coordinates (y, x) in px; may leave the image.
    """
    angle = math.radians(uniform(generator, -spec.rotate, spec.rotate))
    zoom = log_uniform(generator, spec.scale)
    turns = int(torch.randint(4, (), generator=generator)) if spec.flips else 0
    mirror = -1.0 if spec.flips and happens(generator, 0.5) else 1.0
    steps = torch.arange(side_px, dtype=torch.float32) - (side_px - 1) / 2
    rows, columns = torch.meshgrid(steps, steps, indexing="ij")
    offsets = torch.stack([rows, columns * mirror], dim=-1)
    elastic = happens(generator, spec.elastic) and spec.elastic_px > 0
    field = torch.randn((1, 2, spec.elastic_grid, spec.elastic_grid), generator=generator)
    if elastic:
        offsets = offsets + elastic_field(field * spec.elastic_px, side_px)
    # A whole quarter turn stays on the pixel grid: exact where nothing else turns.
    cos, sin = _turn(turns, angle)
    turn = torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float32) / zoom
    return offsets @ turn.T + _centre(extent, out_px / zoom, side_px, generator)


def _turn(turns: int, angle: float) -> tuple[float, float]:
    if angle == 0.0:
        return ((1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0))[turns]
    total = angle + turns * math.pi / 2
    return math.cos(total), math.sin(total)


def _centre(extent: Shape, out_px: float, side_px: int, generator: torch.Generator) -> Tensor:
    parts = []
    for length in extent:
        free = max(0.0, length - out_px)
        start = math.floor(uniform(generator, 0.0, free + 1)) if free else -((out_px - length) // 2)
        # Half a pixel where the sample's side is even, so that unturned samples hit pixel centres.
        half = ((side_px - 1) / 2) % 1
        parts.append(math.floor(start + (out_px - 1) / 2) + half)
    return torch.tensor(parts, dtype=torch.float32)


def elastic_field(vectors: Tensor, side_px: int) -> Tensor:
    """Interpolate (1, 2, g, g) displacement vectors (px) bicubically to (side, side, 2)."""
    dense = functional.interpolate(
        vectors, size=(side_px, side_px), mode="bicubic", align_corners=True
    )
    return dense[0].permute(1, 2, 0)


def sample_at(
    pixels: Tensor, coordinates: Tensor, *, mode: str = "bilinear", origin: tuple[int, int] = (0, 0)
) -> Tensor:
    """Read (C, Y, X) at (S, T, 2) coordinates (y, x) px -> (C, S, T) float32.

    Outside, the image is mirrored about its border pixels (``tiling.mirror``'s rule). ``origin`` is
    the coordinate of the first pixel.
    """
    height, width = pixels.shape[-2:]
    device = pixels.device
    scale = torch.tensor([max(height - 1, 1), max(width - 1, 1)], device=device)
    start = torch.tensor(origin, device=device)
    grid = (coordinates.to(device) - start) * (2.0 / scale) - 1.0
    if height == 1 or width == 1:
        grid = torch.where(torch.tensor([height == 1, width == 1], device=device), 0.0, grid)
    read: Any = functional.grid_sample(
        pixels[None].float(),
        grid.flip(-1)[None].float(),
        mode=mode,
        padding_mode="reflection",
        align_corners=True,
    )
    result: Tensor = read[0]
    return result
