"""Is the tuner's choice near the best? Its tile and batch against an exhaustive grid.

    python benchmarks/tuning.py --base 16 --precision fp32

Prints JSON: the choice, the best of the grid within the memory that a job takes, their ratio, the
same for the whole grid, the seconds that tuning took the first time and with its cache.
Wanted: within 5 % of the best, under 15 s, then 0.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from dataclasses import asdict

from tilepipe.malloc import one_arena

one_arena()  # as the command does: before numpy and torch have threads

import numpy as np  # noqa: E402

from tilepipe.bench.machine import machine_facts  # noqa: E402
from tilepipe.infer import choose_settings  # noqa: E402
from tilepipe.infer.memory import FORWARD_BYTES  # noqa: E402
from tilepipe.infer.plans import plan_for  # noqa: E402
from tilepipe.infer.race import Trial, speed_of  # noqa: E402
from tilepipe.infer.tuning import activation_bytes, measure  # noqa: E402
from tilepipe.models import load_model  # noqa: E402
from tilepipe.spec import JobSpec  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="unet")
    parser.add_argument("--base", type=int, default=16)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--side", type=int, default=16384, help="of the level that is planned")
    parser.add_argument("--rounds", type=int, default=3, help="over the grid; the best counts")
    parser.add_argument("--step", type=int, default=128, help="of the grid's cores, px")
    arguments = parser.parse_args()
    os.environ["TILEPIPE_CACHE"] = tempfile.mkdtemp(prefix="tilepipe-tuning-")
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
    # The choice once more: another run's figure of it is no measure beside the grid's.
    plans[chosen.plan.input_px] = chosen.plan
    grid = [(plan, batch) for plan in plans.values() for batch in {*batches, chosen.batch}]
    best: dict[tuple[int, int], Trial] = {}
    for _ in range(arguments.rounds):
        for candidate in grid:
            # One by one: the tuner itself leaves out what lies behind a slower tile.
            for trial in measure(
                chosen, model, [candidate], dtype=np.dtype(np.uint8), budget_s=float("inf")
            ):
                place = trial.input_px, trial.batch
                best[place] = max(best.get(place, trial), trial, key=speed_of)
    trials = sorted(best.values(), key=speed_of, reverse=True)
    own = best[chosen.plan.input_px, chosen.batch]
    # What the job's memory allows (tuning.candidate_plans), and whatever it takes.
    own_bytes = activation_bytes(chosen, model, chosen.plan, chosen.batch)
    allowed = {
        (plan.input_px, batch)
        for plan, batch in grid
        if activation_bytes(chosen, model, plan, batch) <= max(FORWARD_BYTES, own_bytes)
    }
    fitting = next(trial for trial in trials if (trial.input_px, trial.batch) in allowed)
    print(
        json.dumps(
            {
                "chosen": asdict(own),
                "best": asdict(fitting),
                "ratio": round(own.mpix_per_s / fitting.mpix_per_s, 4),
                "best_of_any_memory": asdict(trials[0]),
                "ratio_to_any": round(own.mpix_per_s / trials[0].mpix_per_s, 4),
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
