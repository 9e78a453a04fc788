"""Lanes beside a fast device: how busy it is by their number. The work is sleep, the rest is real.

    python benchmarks/lanes.py --device-mpix 150 --lanes 3,6,8,12

Stages, graph, stream and Dask are a job's own; a unit's stages sleep as long as one core takes for
them, and one at a time sleeps on the "device". So a
machine of two cores tells what one of sixteen would do, as far as scheduling goes.
"""

from __future__ import annotations

import argparse
import importlib
import json
import threading
import time

from tilepipe.infer.plans import plan_for
from tilepipe.models import load_model
from tilepipe.pipeline.stages import Layout, build_stages
from tilepipe.schedule import Dag, Outcome
from tilepipe.schedule.cluster import connect
from tilepipe.schedule.stream import drive
from tilepipe.spec import JobSpec
from tilepipe.tiling.grid import level_extents

MS = {"ingest": 15.0, "reduce": 13.0, "read": 4.0, "write": 2.5, "label-reduce": 2.5}
"""Core-milliseconds a MPix: slide.read and an image's write; a unit of a pyramid; a hull, half of
it from memory; a mask's write."""
UNIT_MS = 2.0
"""Journal and the like."""


class Device:
    """One forward at a time."""

    def __init__(self, mpix_per_s: float) -> None:
        self.mpix_per_s = mpix_per_s
        self.busy_s = 0.0
        self.began_s = self.ended_s = 0.0
        self._lock = threading.Lock()

    def run(self, mpix: float) -> None:
        """Sleep as long as the device computes."""
        with self._lock:
            self.began_s = self.began_s or time.perf_counter()
            time.sleep(mpix / self.mpix_per_s)
            self.busy_s += mpix / self.mpix_per_s
            self.ended_s = time.perf_counter()


class Job:
    """The job of one slide, as the stream sees it."""

    current: Job
    """Tasks find it here: they run in threads of this process."""
    ticket = "a ticket"

    def __init__(self, side_px: int, unit_px: int, device: Device) -> None:
        model = load_model("unet", weights="random:0", base=4)
        extent = (side_px, side_px)
        plan, _ = plan_for(model, extent, JobSpec(), unit_px=unit_px, device="cuda")
        levels = level_extents(extent)
        self.stages = build_stages(
            Layout(image=levels, label=levels, unit_px=unit_px, level=0, plan=plan, band=4)
        )
        self.dag = Dag(self.stages)
        self.dag.start({})
        self.device = device
        Job.current = self

    def record(self, stage: int, outcome: Outcome) -> None:
        """Take in a done unit."""
        assert outcome.ok, (stage, outcome)

    def close(self, reason: str | None) -> None:
        """End; all must be done."""
        assert reason is None
        assert self.dag.finished


def work(ticket: str, stage: int, units: tuple[int, ...]) -> list[Outcome]:
    """Sleep through units of one stage."""
    job = Job.current
    name = job.stages[stage].name
    outcomes = []
    for unit in units:
        started_s = time.perf_counter()
        mpix = job.stages[stage].grid.at(unit).box.area / 1e6
        if name == "segment":
            time.sleep(MS["read"] * mpix / 1e3)
            job.device.run(mpix)
            time.sleep(MS["write"] * mpix / 1e3)
        else:
            time.sleep(MS[name] * mpix / 1e3)
        time.sleep(UNIT_MS / 1e3)
        elapsed_s = time.perf_counter() - started_s
        outcomes.append(Outcome(unit, True, elapsed_s=elapsed_s, worker=ticket))
    return outcomes


def measure(lanes: int, *, side_px: int, unit_px: int, mpix_per_s: float) -> dict[str, float]:
    """Run one job."""
    device = Device(mpix_per_s)
    job = Job(side_px, unit_px, device)
    with connect("local", lanes=lanes) as connection:
        started_s = time.perf_counter()
        drive(connection, iter([job]), work)
        wall_s = time.perf_counter() - started_s
    return {
        "lanes": lanes,
        "mpix_per_s": side_px**2 / 1e6 / wall_s,
        "busy": device.busy_s / wall_s,
        "busy_between": device.busy_s / (device.ended_s - device.began_s),
    }


def main() -> None:
    """Print one line a number of lanes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lanes", default="3,6,8,12")
    parser.add_argument("--device-mpix", type=float, default=150.0)
    parser.add_argument("--size", type=int, default=32768)
    parser.add_argument("--unit", type=int, default=2048)
    given = parser.parse_args()
    for lanes in given.lanes.split(","):
        print(json.dumps(measure(
            int(lanes), side_px=given.size, unit_px=given.unit, mpix_per_s=given.device_mpix
        )))  # fmt: skip


if __name__ == "__main__":
    # Tasks name the module of their function; what is in a script itself would travel by value.
    importlib.import_module("lanes").main()
