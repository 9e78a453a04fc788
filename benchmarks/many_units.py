"""Identity work through a real scheduler: ms a unit, and memory that must not grow with units.

    python benchmarks/many_units.py 10000 100000 1000000

Each size runs in fresh processes: a `dask scheduler`, two `dask worker`, a client. The units are
those of a square image and its pyramid; a unit does nothing. Printed are the peak memory of client
and scheduler and the time a unit costs. `--max-ms` and `--max-growth` make it a check.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from tilepipe.pipeline.stages import Layout, build_stages
from tilepipe.schedule import Dag, Outcome
from tilepipe.schedule.cluster import connect
from tilepipe.schedule.stream import drive
from tilepipe.tiling.grid import level_extents


def do_nothing(ticket: str, stage: int, units: tuple[int, ...]) -> list[Outcome]:
    """Return an Outcome a unit, as a worker does."""
    del stage
    return [Outcome(unit, True, elapsed_s=1e-5, worker=ticket) for unit in units]


class Identity:
    """A job of about ``count`` units: an image of one-pixel units and its pyramid."""

    ticket = "a ticket"

    def __init__(self, count: int) -> None:
        side = max(1, math.isqrt(round(count * 3 / 4)))
        image = level_extents((side, side), smallest_px=1)
        self.dag = Dag(build_stages(Layout(image=image, label=(), unit_px=1, level=0, plan=None)))
        self.dag.start({})
        self.recorded = 0

    def record(self, stage: int, outcome: Outcome) -> None:
        self.recorded += outcome.ok

    def close(self, reason: str | None) -> None:
        assert reason is None
        assert self.dag.finished


def client(address: str, count: int, scheduler_pid: int) -> dict[str, float]:
    """Run one size in this process and measure it."""
    here, there = psutil.Process(), psutil.Process(scheduler_pid)
    peak = {"client": 0, "scheduler": 0}
    sampled_s = 0.0

    def sample(_: object = None) -> None:
        nonlocal sampled_s
        if time.monotonic() - sampled_s < 0.5:
            return
        sampled_s = time.monotonic()
        peak["client"] = max(peak["client"], here.memory_info().rss)
        peak["scheduler"] = max(peak["scheduler"], there.memory_info().rss)

    job = Identity(count)
    with connect(address) as connection:
        started_s, started_cpu_s = time.perf_counter(), time.process_time()
        drive(connection, iter([job]), do_nothing, on_tick=sample)
        elapsed_s = time.perf_counter() - started_s
        cpu_s = time.process_time() - started_cpu_s
    sampled_s = 0.0
    sample()
    return {
        "units": job.recorded,
        "seconds": elapsed_s,
        "ms_per_unit": 1e3 * elapsed_s / job.recorded,
        "client_cpu_ms_per_unit": 1e3 * cpu_s / job.recorded,
        "client_mb": peak["client"] / 1e6,
        "scheduler_mb": peak["scheduler"] / 1e6,
    }


def measure(count: int) -> dict[str, float]:
    """Start a cluster and a client of its own for one size."""
    here = str(Path(__file__).resolve().parent)
    env = {**os.environ, "PYTHONPATH": here}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        file = Path(folder) / "scheduler.json"

        def start(*argv: str, **options: object) -> subprocess.Popen[str]:
            process = subprocess.Popen(argv, env=env, text=True, cwd=folder, **options)  # type: ignore[call-overload]
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        scheduler = start(
            sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1",
            "--port", "0", "--dashboard-address", "127.0.0.1:0", "--scheduler-file", str(file),
            **quiet,
        )  # fmt: skip
        while not file.exists() or not file.read_text().rstrip().endswith("}"):
            time.sleep(0.05)
        for _ in range(2):
            start(
                sys.executable, "-m", "distributed.cli.dask_worker", "--scheduler-file", str(file),
                "--no-nanny", "--nthreads", "2", "--no-dashboard", "--memory-limit", "0", **quiet,
            )  # fmt: skip
        runner = start(
            sys.executable, str(Path(__file__).resolve()), "--client", str(file),
            "--scheduler-pid", str(scheduler.pid), str(count), stdout=subprocess.PIPE,
        )  # fmt: skip
        out, _ = runner.communicate()
        if runner.returncode:
            raise SystemExit(f"{count} units: the client failed")
        found: dict[str, float] = json.loads(out.splitlines()[-1])
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("counts", type=int, nargs="+")
    parser.add_argument("--client", help=argparse.SUPPRESS)
    parser.add_argument("--scheduler-pid", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--max-ms", type=float, help="Fail if a unit costs more.")
    parser.add_argument("--max-growth", type=float, help="Fail if memory grows by more, e.g. 0.2.")
    asked = parser.parse_args()
    if asked.client:
        import many_units  # by name: workers import it, nothing is pickled by value

        found = many_units.client(asked.client, asked.counts[0], asked.scheduler_pid)
        print(json.dumps(found))
        return
    rows = []
    print("   units  seconds  ms/unit  client MB  scheduler MB")
    for count in asked.counts:
        row = measure(count)
        rows.append(row)
        print(
            f"{row['units']:8.0f} {row['seconds']:8.1f} {row['ms_per_unit']:8.3f} "
            f"{row['client_mb']:10.1f} {row['scheduler_mb']:13.1f}",
            flush=True,
        )
    for key in ("client_mb", "scheduler_mb"):
        grown = max(row[key] for row in rows) / rows[0][key] - 1
        print(f"{key.removesuffix('_mb')} memory grew by {grown:.1%}")
        if asked.max_growth is not None and grown > asked.max_growth:
            raise SystemExit(f"{key} grew by more than {asked.max_growth:.0%}")
    slowest = max(row["ms_per_unit"] for row in rows)
    if asked.max_ms is not None and slowest > asked.max_ms:
        raise SystemExit(f"a unit costs {slowest:.2f} ms, more than {asked.max_ms}")


if __name__ == "__main__":
    main()
