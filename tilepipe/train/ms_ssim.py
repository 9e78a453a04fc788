"""Multi-scale structural similarity (Wang et al. 2003), differentiable, mirrored borders.

Per scale: Gaussian window of 11 px, sigma 1.5, C1 = 0.01², C2 = 0.03² (values 0-1); luminance only
at the coarsest scale; 2x2 mean between scales. Small images use as many scales as fit, with the
published exponents of those scales renormalised to sum 1.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

EXPONENTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
WINDOW_PX = 11
SIGMA_PX = 1.5
_C1, _C2 = 0.01**2, 0.03**2
_LEAST = 1e-6
"""Contrast terms are held above this: a negative base has no real power."""


def n_scales(height: int, width: int) -> int:
    """Return how many scales an image can have: the window fits into each one's shorter side."""
    side, scales = min(height, width), 0
    while side >= WINDOW_PX and scales < len(EXPONENTS):
        scales += 1
        side //= 2
    return max(1, scales)


def ms_ssim(first: Tensor, second: Tensor) -> Tensor:
    """Mean MS-SSIM over batch and channels of two (B, C, Y, X) images of values 0-1; scalar."""
    scales = n_scales(first.shape[-2], first.shape[-1])
    exponents = torch.tensor(EXPONENTS[:scales], dtype=first.dtype, device=first.device)
    exponents = exponents / exponents.sum()
    result: Tensor | None = None
    for scale in range(scales):
        luminance, contrast = _terms(first, second)
        term = luminance * contrast if scale == scales - 1 else contrast
        value = term.mean((-2, -1)).clamp(min=_LEAST) ** exponents[scale]
        result = value if result is None else result * value
        if scale < scales - 1:
            first = functional.avg_pool2d(first, 2)
            second = functional.avg_pool2d(second, 2)
    assert result is not None
    return result.mean()


def _terms(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    mean_1, mean_2 = _window(first), _window(second)
    variance_1 = _window(first * first) - mean_1**2
    variance_2 = _window(second * second) - mean_2**2
    covariance = _window(first * second) - mean_1 * mean_2
    luminance = (2 * mean_1 * mean_2 + _C1) / (mean_1**2 + mean_2**2 + _C1)
    contrast = (2 * covariance + _C2) / (variance_1 + variance_2 + _C2)
    return luminance, contrast


def _window(image: Tensor) -> Tensor:
    radius = min(WINDOW_PX // 2, min(image.shape[-2:]) - 1)
    steps = torch.arange(-radius, radius + 1, dtype=image.dtype, device=image.device)
    kernel = torch.exp(-(steps**2) / (2 * SIGMA_PX**2))
    kernel = kernel / kernel.sum()
    flat = image.flatten(0, 1)[:, None]
    flat = functional.pad(flat, (radius, radius, radius, radius), mode="reflect")
    flat = functional.conv2d(flat, kernel[None, None, :, None])
    flat = functional.conv2d(flat, kernel[None, None, None, :])
    return flat.reshape(image.shape)
