"""``random:SEED`` weights: He-initialised, the same numbers on every machine."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from tilepipe.errors import CheckpointError
from tilepipe.models.blocks import fan_in
from tilepipe.models.net import Net

_CALIBRATION_PX = 96
_LOGIT_STEP = 1.0 / 256


def parse_seed(weights: str) -> int | None:
    """Return SEED of ``random:SEED``, or None if ``weights`` is something else."""
    if not weights.startswith("random:"):
        return None
    text = weights.removeprefix("random:")
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise CheckpointError(f"weights {weights!r}: the seed is a whole number, e.g. random:0")
    return int(text)


def fill_seeded(net: Net, seed: int) -> None:
    """Overwrite every parameter of ``net`` (float32, CPU) from ``seed``, in place.

    Each tensor has its own generator, seeded by its name: the order of the layers does not
    matter. Uniform draws only: they are exact 24-bit fractions on every machine, normal ones are
    not. At the end the head is scaled so that every class occurs (see ``_spread_logits``).
    """
    modules = dict(net.named_modules())
    with torch.no_grad():
        for name, tensor in sorted(net.named_parameters()):
            owner = modules[name.rpartition(".")[0]]
            if isinstance(owner, nn.Conv2d | nn.ConvTranspose2d) and name.endswith("weight"):
                tensor.copy_(_uniform(tensor.shape, seed, name) * math.sqrt(6.0 / fan_in(owner)))
            elif isinstance(owner, nn.BatchNorm2d) and name.endswith("weight"):
                tensor.fill_(1.0)
            elif isinstance(owner, nn.Conv2d | nn.ConvTranspose2d):
                tensor.copy_(_uniform(tensor.shape, seed, name) * 0.05)
            else:
                tensor.zero_()
    _spread_logits(net, seed)


def _uniform(shape: torch.Size, seed: int, name: str) -> Tensor:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator(device="cpu")
    generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    # 24-bit integers are exact in float32, so are these fractions of them.
    whole = torch.randint(-(2**23), 2**23, shape, generator=generator, dtype=torch.int64)
    return whole.to(torch.float32) / 2.0**23


def _spread_logits(net: Net, seed: int) -> None:
    """Scale and shift the logits so that on a picture with light and dark places all classes occur.

    Random features are nearly all positive, so one class would win everywhere. The shift is
    measured in float64 and rounded to 1/256, so that it too is the same on every machine.
    """
    side = net.next_legal(_CALIBRATION_PX)
    picture = _picture(net.in_channels, side, seed)
    training = net.training
    net.double().eval()
    with torch.no_grad():
        logits = net.infer(picture)
    net.float().train(training)
    mean = logits.mean(dim=(0, 2, 3))
    std = logits.std(dim=(0, 2, 3)).clamp_min(1e-6)
    scale = torch.exp2(torch.round(torch.log2(1.0 / std)))
    shift = torch.round(-mean * scale / _LOGIT_STEP) * _LOGIT_STEP
    with torch.no_grad():
        for head in net.main_heads():
            head.weight.mul_(scale.float()[:, None, None, None])
            if head.bias is not None:
                head.bias.mul_(scale.float()).add_(shift.float())


def _picture(channels: int, side: int, seed: int) -> Tensor:
    """(1, channels, side, side) float64 in 0-1: light and dark blots with fine texture."""
    total = torch.zeros(1, channels, side, side, dtype=torch.float64)
    for cells, weight in ((3, 0.4), (8, 0.3), (24, 0.2), (side, 0.1)):
        name = f"picture {cells}"
        coarse = _uniform(torch.Size((1, channels, cells, cells)), seed, name).double()
        index = torch.arange(side) * cells // side
        total += weight * coarse[:, :, index][:, :, :, index]
    return (total + 0.6).clamp(0.0, 1.0)
