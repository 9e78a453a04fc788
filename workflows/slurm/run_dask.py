"""One run whose workers are Slurm jobs, through dask-jobqueue: they come and go as nodes are free.

    pip install 'tilepipe[cluster]'
    python workflows/slurm/run_dask.py --jobs 8 slide.svs -o /shared/slide.zarr --model unet

Everything after --jobs (and --queue, --gres) goes to `tilepipe run` as it stands.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from typing import Any


def cluster_options(asked: argparse.Namespace) -> dict[str, Any]:
    """Return what dask_jobqueue.SLURMCluster is made with."""
    return {
        "queue": asked.queue,
        "cores": 3,  # lanes of one worker: one unit on the device, one read, one written
        "processes": 1,
        "job_cpu": asked.cpus,
        "memory": asked.memory,
        "walltime": asked.walltime,
        "job_extra_directives": [f"--gres={asked.gres}"] if asked.gres else [],
        # A worker leaves in good order before Slurm ends its job.
        "worker_extra_args": ["--lifetime", "3h50m", "--lifetime-stagger", "5m"],
        "scheduler_options": {"dashboard_address": "127.0.0.1:0"},
    }


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the options of this script, and what is for ``tilepipe run``."""
    parser = argparse.ArgumentParser(description=__doc__, add_help=False, allow_abbrev=False)
    parser.add_argument("--jobs", type=int, default=4)
    parser.add_argument("--queue")
    parser.add_argument("--gres", default="gpu:1", help="'' for none")
    parser.add_argument("--cpus", type=int, default=8)
    parser.add_argument("--memory", default="24GB")
    parser.add_argument("--walltime", default="04:00:00")
    return parser.parse_known_args(arguments)


def main() -> int:
    asked, rest = parse(sys.argv[1:])
    from dask_jobqueue import SLURMCluster

    with SLURMCluster(**cluster_options(asked)) as cluster:
        print(cluster.job_script())
        cluster.adapt(minimum_jobs=1, maximum_jobs=asked.jobs)
        return subprocess.call(["tilepipe", "run", *rest, "--scheduler", cluster.scheduler_address])


if __name__ == "__main__":
    raise SystemExit(main())
