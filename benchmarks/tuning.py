"""Is the tuner's choice near the best? Its tile and batch against an exhaustive grid.

    python benchmarks/tuning.py --base 16 --precision fp32

Prints JSON: the choice, the best of the grid, their ratio, the seconds that tuning took the first
time and with its cache. Wanted: within 5 % of the best, under 15 s, then 0.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from dataclasses import asdict

import numpy as np

from tilepipe.bench.machine import machine_facts
from tilepipe.infer import choose_settings
from tilepipe.infer.plans import plan_for
from tilepipe.infer.tuning import measure
from tilepipe.malloc import keep_memory
from tilepipe.models import load_model
from tilepipe.spec import JobSpec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="unet")
    parser.add_argument("--base", type=int, default=16)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--side", type=int, default=16384, help="of the level that is planned")
    parser.add_argument("--step", type=int, default=128, help="of the grid's cores, px")
    arguments = parser.parse_args()
    os.environ["TILEPIPE_CACHE"] = tempfile.mkdtemp(prefix="tilepipe-tuning-")
    keep_memory()
    model = load_model(arguments.model, weights="random:0", base=arguments.base)
    spec = JobSpec(precision=arguments.precision, backend=arguments.backend)
    extent = (arguments.side, arguments.side)
    seconds = []
    for _ in range(2):
        started_s = time.perf_counter()
        chosen = choose_settings(model, extent=extent, spec=spec, unit_px=2048)
        seconds.append(round(time.perf_counter() - started_s, 3))
    plans = {}
    for core in range(arguments.step, 2048 + 1, arguments.step):
        plan, _ = plan_for(model, extent, spec, unit_px=2048, core_px=core)
        plans[plan.input_px] = plan
    batches = (1, 2) if chosen.device == "cpu" else (1, 2, 4, 8)
    grid = [(plan, batch) for plan in plans.values() for batch in batches]
    trials = [  # one by one: the tuner itself leaves out what lies behind a slower tile
        trial
        for candidate in grid
        for trial in measure(
            chosen, model, [candidate], dtype=np.dtype(np.uint8), budget_s=float("inf")
        )
    ]
    trials.sort(key=lambda trial: -trial.mpix_per_s)
    own = measure(
        chosen, model, [(chosen.plan, chosen.batch)], dtype=np.dtype(np.uint8), budget_s=1e9
    )[0]
    print(
        json.dumps(
            {
                "chosen": asdict(own),
                "best": asdict(trials[0]),
                "ratio": round(own.mpix_per_s / trials[0].mpix_per_s, 4),
                "tuning_s": seconds[0],
                "again_s": seconds[1],
                "grid": [asdict(trial) for trial in trials],
                "backend": chosen.backend,
                "machine": machine_facts(chosen.device),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
