"""The bundled weights (or others) on the 87 images that were held back, per kind.

python workflows/nuclei/evaluate.py [--weights FILE] [--data DIR] [--turned] [--json]
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch

from tilepipe.infer.plans import usual_halo
from tilepipe.models import load_model
from tilepipe.train.dataset import Teaching
from tilepipe.train.images import find_pairs, read_kinds, read_names
from tilepipe.train.validate import score_images

HERE = Path(__file__).parent
DATA = HERE / "../../../shared/data/dsb2018"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", help="default: the bundled ones")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--turned", action="store_true", help="mean of 8 flips and turns")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    model = load_model("unet", weights=arguments.weights)
    held = set(read_names(HERE / "test.txt"))
    pairs = find_pairs(
        arguments.data / "images",
        arguments.data / "labels",
        kinds=read_kinds(arguments.data / "index.csv"),
    )
    module = model.module.to(memory_format=torch.channels_last)
    scores = score_images(
        lambda shares: module(model.normalise(shares)),
        [pair for pair in pairs if pair.name in held],
        sizes=model.module,
        halo_px=usual_halo(model.locality),
        teaching=Teaching(target="foreground+border", n_classes=3),
        channels=model.in_channels,
        device=torch.device("cpu"),
        precision=arguments.precision,
        turned=arguments.turned,
    )
    if arguments.json:
        print(json.dumps([asdict(score) for score in scores], indent=1))
        return
    print("| kind | images | cells | Dice (mean) | Dice (pooled) | F1 at IoU 0.5 | mean AP |")
    print("|---|---|---|---|---|---|---|")
    for s in scores:
        print(
            f"| {s.kind} | {s.images} | {s.cells} | {s.dice:.3f} | {s.pooled_dice:.3f} "
            f"| {s.f1:.3f} | {s.mean_ap:.3f} |"
        )


if __name__ == "__main__":
    main()
