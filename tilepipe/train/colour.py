"""How a training sample looks: contrast, gamma, noise, blur, stain, tint, inversion.

Values are shares of the range of bytes (0-1), or of kinds whose range is not that of their images:
those are varied relative to the span of their image, and what lies outside it is kept, not cut off.
Each sample draws its own numbers from its own generator, so a sample does not depend on its batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from tilepipe.slide.shown import LUMINANCE
from tilepipe.train.augment import AugmentSpec, happens, log_uniform, uniform

# Optical densities of haematoxylin, eosin and the direction across both (Ruifrok & Johnston 2001).
_STAINS = torch.tensor([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]])


def vary_colour(
    sample: Tensor,
    *,
    spec: AugmentSpec,
    generator: torch.Generator,
    span: tuple[float, float] | None = None,
) -> Tensor:
    """Vary one (C, Y, X) float sample; same shape.

    ``span`` None: values are and stay 0-1. Else nearly all values of the image lie between these
    two (low < high), and a varied sample may leave them.
    """
    if span is None:
        return _vary(sample, spec, generator).clamp(0.0, 1.0)
    low, high = span
    return _vary((sample - low) / (high - low), spec, generator, bounded=False) * (high - low) + low


def _vary(
    sample: Tensor, spec: AugmentSpec, generator: torch.Generator, *, bounded: bool = True
) -> Tensor:
    """Vary values that mean dark at 0 and bright at 1; ``bounded``: nothing lies beyond these."""
    if sample.shape[0] == 3:
        sample = _vary_rgb(sample, spec, generator)
    if happens(generator, spec.invert):
        sample = 1.0 - sample
    gain = log_uniform(generator, spec.gain)
    shift = uniform(generator, -spec.brightness, spec.brightness)
    gamma = log_uniform(generator, spec.gamma)
    middle = sample.mean()
    level = log_uniform(generator, spec.gain)
    # A bright image is varied in its darkness: scaled up it would be white all over.
    moved = middle * level if middle < 0.5 else 1.0 - (1.0 - middle) * level
    sample = (sample - middle) * gain + moved + shift
    inside = sample.clamp(0.0, 1.0)
    # A gamma has a meaning between 0 and 1 only; it leaves both, so what lies beyond goes on there.
    beyond = 0.0 if bounded else sample - inside
    sample = (inside.pow(gamma) if gamma != 1.0 else inside) + beyond
    sigma = uniform(generator, -spec.blur_px, spec.blur_px)
    if sigma > 0.3:
        sample = blur(sample, sigma)
    strength = spec.noise * max(0.0, uniform(generator, -1.0, 1.0))
    if strength > 0:
        noise = torch.randn(sample.shape, generator=generator).to(sample.device)
        sample = sample + strength * noise
    return sample


def _vary_rgb(sample: Tensor, spec: AugmentSpec, generator: torch.Generator) -> Tensor:
    if is_gray(sample):
        if happens(generator, spec.tint):
            # As viewers colour a channel: one dye, often a pure colour (DAPI blue).
            colour = torch.rand(3, generator=generator)
            if happens(generator, 0.5):
                colour = (colour > colour.median()).float() + 0.1 * torch.rand(
                    3, generator=generator
                )
            sample = sample * (colour / colour.max()).to(sample.device)[:, None, None]
        return sample
    if happens(generator, spec.gray):
        weights = torch.tensor(LUMINANCE, device=sample.device)[:, None, None]
        return (sample * weights).sum(0, keepdim=True).expand(3, -1, -1)
    if spec.stain > 0:
        factors = 1.0 + spec.stain * (2.0 * torch.rand(3, generator=generator) - 1.0)
        inside = sample.clamp(0.0, 1.0)
        sample = vary_stain(inside, factors) + (sample - inside)
    return sample


def is_gray(sample: Tensor) -> bool:
    """Tell whether the three channels of (3, Y, X) are the same."""
    return bool((sample[0] - sample[1]).abs().max() < 0.02) and bool(
        (sample[0] - sample[2]).abs().max() < 0.02
    )


def vary_stain(sample: Tensor, factors: Tensor) -> Tensor:
    """Scale the amounts of the three stains of (3, Y, X) RGB in 0-1 by three factors."""
    stains = functional.normalize(_STAINS, dim=1)
    change = torch.linalg.inv(stains) @ torch.diag(factors) @ stains
    density = -torch.log(sample.clamp(min=1 / 255))
    mixed = torch.einsum("cyx,ck->kyx", density, change.to(sample.device))
    return torch.exp(-mixed).clamp(0.0, 1.0)


def blur(sample: Tensor, sigma_px: float) -> Tensor:
    """Gaussian blur of (C, Y, X), borders mirrored."""
    radius = min(math.ceil(3 * sigma_px), min(sample.shape[-2:]) - 1)
    steps = torch.arange(-radius, radius + 1, device=sample.device, dtype=sample.dtype)
    kernel = torch.exp(-(steps**2) / (2 * sigma_px**2))
    kernel = kernel / kernel.sum()
    rows = functional.pad(sample[:, None], (0, 0, radius, radius), mode="reflect")
    rows = functional.conv2d(rows, kernel[None, None, :, None])
    both = functional.pad(rows, (radius, radius, 0, 0), mode="reflect")
    return functional.conv2d(both, kernel[None, None, None, :])[:, 0]
