"""The paper's metrics of weights on the slices that were left out.

    python workflows/isbi2012/evaluate.py membranes.safetensors [--data DIR] [--json]

One pass, and the mean over the 8 flips and quarter turns (the paper used 7 rotations). Each at the
threshold 0.5, at the threshold that is best on the *training* slices, and, as the challenge did
for its entries, at the best threshold of all for each metric.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from tilepipe.infer.plans import usual_halo
from tilepipe.models import load_model
from tilepipe.train.em import rand_error, warping_error
from tilepipe.train.images import find_pairs, read_names
from tilepipe.train.predict import choose_precision, predict, predict_turned
from tilepipe.train.validate import load

HERE = Path(__file__).parent
DATA = HERE / "../../../shared/data/isbi2012_em/train"
THRESHOLDS = np.round(np.arange(0.1, 0.95, 0.05), 2)
METRICS = {
    "rand": rand_error,
    "pixel": lambda mask, truth: float((mask != truth).mean()),
    "warping": warping_error,
}


def scores(
    values: list[np.ndarray], truths: list[np.ndarray], threshold: float
) -> dict[str, float]:
    return {
        name: float(
            np.mean([metric(v > threshold, t) for v, t in zip(values, truths, strict=True)])
        )
        for name, metric in METRICS.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    model = load_model("unet", weights=arguments.weights)
    device = torch.device("cpu")
    precision = choose_precision("auto", device)
    module = model.module.to(memory_format=torch.channels_last)

    def forward(shares: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = module(model.normalise(shares))
        return logits

    left_out = set(read_names(HERE / "test.txt"))
    pairs = find_pairs(arguments.data / "image", arguments.data / "label")
    report: dict[str, dict[str, dict[str, float]]] = {}
    for title, run in (("one pass", predict), ("8 flips and turns", predict_turned)):
        sides: dict[bool, tuple[list[np.ndarray], list[np.ndarray]]] = {
            True: ([], []),
            False: ([], []),
        }
        for pair in pairs:
            test = pair.name in left_out
            if not test and len(sides[False][0]) >= 3:
                continue  # three training slices are enough to find a threshold
            share, labels = load(pair, channels=model.in_channels)
            cell = run(
                forward, share, model.module, halo_px=usual_halo(model.locality), device=device,
                precision=precision,
            )[-1]  # fmt: skip
            sides[test][0].append(cell)
            sides[test][1].append(labels != 0)
        rand_of = {float(t): scores(*sides[False], float(t))["rand"] for t in THRESHOLDS}
        learnt = min(rand_of, key=lambda t: rand_of[t])
        swept = [scores(*sides[True], float(t)) for t in THRESHOLDS]
        report[title] = {
            "at 0.5": scores(*sides[True], 0.5),
            f"at {learnt} (best on training slices)": scores(*sides[True], learnt),
            "best threshold for each": {name: min(s[name] for s in swept) for name in METRICS},
        }
    if arguments.json:
        print(json.dumps(report, indent=1))
        return
    print("| prediction | threshold | Rand error | pixel error | warping error |")
    print("|---|---|---|---|---|")
    for title, rows in report.items():
        for threshold, row in rows.items():
            print(
                f"| {title} | {threshold} | {row['rand']:.4f} | {row['pixel']:.4f} "
                f"| {row['warping']:.6f} |"
            )


if __name__ == "__main__":
    main()
