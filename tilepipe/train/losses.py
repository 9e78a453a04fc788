"""Losses of (B, K, Y, X) logits against (B, Y, X) class ids; all return a scalar mean.

K = 1 is a binary network (sigmoid; class ids 0 and 1), K > 1 has one channel per class (softmax).
``weight`` is a (B, Y, X) map of how much each pixel counts (the U-Net paper's w(x)).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from tilepipe.errors import TrainError
from tilepipe.train.ms_ssim import ms_ssim

Loss = Callable[..., Tensor]
"""(logits, target, weight | None) -> scalar."""

_EPSILON = 1e-6


def one_hot(target: Tensor, channels: int) -> Tensor:
    """(B, Y, X) ids -> (B, K, Y, X) bool; one channel says "not 0"."""
    if channels == 1:
        return (target != 0)[:, None]
    return functional.one_hot(target.long(), channels).movedim(-1, 1).bool()


def probabilities(logits: Tensor) -> Tensor:
    """Softmax over the classes, or sigmoid of one channel; same shape."""
    return logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)


def _mean(values: Tensor, weight: Tensor | None) -> Tensor:
    return values.mean() if weight is None else (values * weight).mean()


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    class_weights: Sequence[float] | None = None,
) -> Tensor:
    """Mean of weight * class weight * -log p(target); the paper's energy if ``weight`` is w(x).

    The mean is over pixels, not over the sum of weights, so that a pixel's pull does not depend on
    its neighbours' weights.
    """
    channels = logits.shape[1]
    if channels == 1:
        truth = (target != 0).to(logits.dtype)
        values = functional.binary_cross_entropy_with_logits(logits[:, 0], truth, reduction="none")
    else:
        values = functional.cross_entropy(logits, target.long(), reduction="none")
    if class_weights is not None:
        table = torch.tensor(class_weights, dtype=values.dtype, device=values.device)
        values = values * table[target.long()]
    return _mean(values, weight)


def binary_cross_entropy(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Each channel on its own against "is this class"; mean over channels and pixels."""
    truth = one_hot(target, logits.shape[1]).to(logits.dtype)
    values = functional.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    return _mean(values.mean(1), weight)


def soft_dice(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """1 - Dice of probabilities, over batch and pixels per class, mean over classes.

    Softmax networks leave out class 0 (background), which would only mirror the others.
    """
    predicted, truth = _overlap_channels(logits, target)
    if weight is not None:
        predicted, truth = predicted * weight[:, None], truth * weight[:, None]
    both = (predicted * one_hot_part(target, logits.shape[1])).sum((0, 2, 3))
    total = predicted.sum((0, 2, 3)) + truth.sum((0, 2, 3))
    return (1 - (2 * both + _EPSILON) / (total + _EPSILON)).mean()


def one_hot_part(target: Tensor, channels: int) -> Tensor:
    """Channels of ``one_hot`` that overlap losses look at: all but background."""
    hot = one_hot(target, channels)
    return hot if channels == 1 else hot[:, 1:]


def _overlap_channels(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    predicted = probabilities(logits)
    truth = one_hot_part(target, logits.shape[1]).to(logits.dtype)
    return (predicted if logits.shape[1] == 1 else predicted[:, 1:]), truth


def iou(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """1 - intersection over union of probabilities per image and class, mean over both."""
    predicted, truth = _overlap_channels(logits, target)
    share = 1.0 if weight is None else weight[:, None]
    both = (predicted * truth * share).sum((2, 3))
    either = ((predicted + truth - predicted * truth) * share).sum((2, 3))
    return (1 - (both + _EPSILON) / (either + _EPSILON)).mean()


def focal(
    logits: Tensor, target: Tensor, weight: Tensor | None = None, *, gamma: float = 2.0
) -> Tensor:
    """Mean of -(1 - p)^gamma * log p of the true class (Lin et al. 2017)."""
    if logits.shape[1] == 1:
        sign = 2 * (target != 0).to(logits.dtype) - 1
        log_p = functional.logsigmoid(logits[:, 0] * sign)
    else:
        log_p = logits.log_softmax(1).gather(1, target.long()[:, None])[:, 0]
    # -expm1 keeps 1 - p exact where p is near 1.
    return _mean((-torch.expm1(log_p)).clamp(min=0) ** gamma * -log_p, weight)


def ms_ssim_loss(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """1 - MS-SSIM of probabilities and truth (UNet 3+); ``weight`` has no meaning here."""
    del weight
    predicted, truth = _overlap_channels(logits, target)
    return 1 - ms_ssim(predicted, truth)


def hybrid(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """UNet 3+: focal + MS-SSIM + IoU, for pixels, patches and maps (Huang et al. 2020)."""
    return (
        focal(logits, target, weight)
        + ms_ssim_loss(logits, target, weight)
        + iou(logits, target, weight)
    )


LOSSES: dict[str, Loss] = {
    "ce": cross_entropy,
    "weighted-ce": cross_entropy,
    "bce": binary_cross_entropy,
    "dice": soft_dice,
    "focal": focal,
    "ms-ssim": ms_ssim_loss,
    "iou": iou,
    "hybrid": hybrid,
}
"""Name on the command line -> loss. ``weighted-ce`` asks for the weight map, which then weighs all
that are summed with it, ``ms-ssim`` apart."""


def make_loss(name: str, *, class_weights: Sequence[float] | None = None) -> Loss:
    """Return the loss called ``name``, or the sum of several: ``ce+dice``.

    Raises TrainError for an unknown name.
    """
    parts: list[Loss] = []
    for part in name.split("+"):
        if part not in LOSSES:
            raise TrainError(f"loss {part!r} is unknown; there are {', '.join(LOSSES)}")
        loss = LOSSES[part]
        if loss is cross_entropy and class_weights is not None:
            loss = partial(cross_entropy, class_weights=tuple(class_weights))
        parts.append(loss)

    def total(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        values = [loss(logits, target, weight) for loss in parts]
        return torch.stack(values).sum()

    return total


def supervised(
    outputs: Sequence[Tensor],
    target: Tensor,
    weight: Tensor | None,
    *,
    loss: Loss,
    output_weights: Sequence[float] | None = None,
) -> Tensor:
    """Deep supervision: the weighted mean of the loss of every output at full size.

    UNet++, UNet 3+ and U²-Net all give each side output the same say (the default).
    """
    shares = [1.0] * len(outputs) if output_weights is None else list(output_weights)
    if len(shares) != len(outputs):
        raise TrainError(f"{len(shares)} weights for {len(outputs)} outputs of the network")
    values = [s * loss(o, target, weight) for s, o in zip(shares, outputs, strict=True)]
    return torch.stack(values).sum() / sum(shares)


def gate_loss(gate: Tensor, target: Tensor) -> Tensor:
    """UNet 3+'s "does the sample hold any object": (B,) logits against (B, Y, X) ids."""
    present = (target != 0).flatten(1).any(1).to(gate.dtype)
    return functional.binary_cross_entropy_with_logits(gate, present)
