"""Make the slide, export the network for the peers' environments and tell the machine's facts.

Runs with tilepipe's own interpreter, as a process of its own: the runner stays free of torch.
Prints a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tilepipe.bench.machine import machine_facts
from tilepipe.bench.run import write_slide
from tilepipe.models import Model, load_model
from tilepipe.slide import open_slide

sys.path.insert(0, str(Path(__file__).resolve().parent / "scripts"))
from plain_unet import PlainUNet

TILE_PX = 572


def export(model: Model, path: Path) -> PlainUNet:
    """Write ``model``, a valid U-Net, for ``plain_unet.load``; the two agree to the last bit.

    SystemExit for any other architecture: the peers' scripts have that one.
    """
    if model.name != "unet":
        raise SystemExit(f"{model.name}: the peers' scripts have the valid U-Net; use --model unet")
    ours = [m for m in model.module.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    ups = sum(isinstance(m, nn.ConvTranspose2d) for m in ours)
    widths = [m.out_channels for m in ours[: 2 * ups + 2 : 2]]
    net = PlainUNet(model.in_channels, model.n_outputs, widths).eval()
    theirs = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    with torch.no_grad():
        for one, other in zip(ours, theirs, strict=True):
            other.weight.copy_(one.weight)
            if other.bias is None or one.bias is None:
                raise SystemExit("a convolution without bias: not the U-Net of the peers' scripts")
            other.bias.copy_(one.bias)
        x = torch.rand(1, model.in_channels, TILE_PX, TILE_PX)
        if not torch.equal(net(x), model.module(x)):
            raise SystemExit("the exported network is not the same network")
    facts = {"in_channels": model.in_channels, "outputs": model.n_outputs, "widths": widths}
    scale = {"mean": list(model.normalisation.mean), "std": list(model.normalisation.std)}
    torch.save({**facts, **scale, "state": net.state_dict()}, path)
    return net


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slide", type=Path, required=True)
    parser.add_argument("--size", type=int, help="make the slide, of this side in px")
    parser.add_argument("--export", type=Path, required=True)
    parser.add_argument("--model", default="unet")
    parser.add_argument("--weights")
    parser.add_argument("--base", type=int)
    asked = parser.parse_args()
    if asked.size:
        write_slide(asked.slide, asked.size)
    with open_slide(asked.slide) as slide:
        shape, channels, dtype = slide.levels[0].shape, slide.channels, slide.dtype
    if channels != 3 or dtype != "uint8":
        raise SystemExit(f"{asked.slide}: {channels} channels of {dtype}; want RGB, 8 bit")
    seeded = (asked.weights or "").startswith("random:")
    model = load_model(
        asked.model,
        weights=asked.weights,
        in_channels=channels if seeded else None,
        base=asked.base,
    )
    export(model, asked.export)
    facts: dict[str, Any] = {
        "shape": list(shape),
        "model": model.to_json(),
        "machine": machine_facts("cpu"),
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
