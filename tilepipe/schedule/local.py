"""``local_cluster``: a Dask cluster of this machine's own threads, processes or GPUs."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

from tilepipe.errors import ScheduleError
from tilepipe.malloc import ONE_ARENA

_HERE = "127.0.0.1"
"""Whoever reaches a scheduler or a worker may run any code there."""
_WHERE_GPUS_ARE = (
    (Path("/proc/driver/nvidia/gpus"), "*"),
    (Path("/dev"), "nvidia[0-9]*"),  # a container may have the devices and not what tells of them
)
LANES = 3
"""Threads of a worker: one unit on the device, one being read, one being written."""

_starting = threading.Lock()


def local_cluster(workers: int | None, gpus: str | None, lanes: int) -> Any:
    """Return a cluster of this process's threads, of ``workers`` processes, or of one per GPU.

    Raises ScheduleError where a process ends before it works (then Dask stops the others), or for
    GPUs that are not here.
    """
    try:
        # Threads of one process may each have a job, and Dask is still imported as it starts.
        with _starting:
            return _start(workers, gpus, lanes)
    except ScheduleError:
        raise
    except (RuntimeError, OSError, TimeoutError) as error:
        raise ScheduleError(
            f"Dask could not start workers on this machine ({str(error).rstrip('.')}): the "
            "system may have ended one for want of memory, or allows too few open files or "
            "processes (ulimit -n, -u), or a script of yours starts them outside of "
            "`if __name__ == '__main__':`; what was done is recorded: give the same command "
            "again, if need be with fewer workers"
        ) from error


def _start(workers: int | None, gpus: str | None, lanes: int) -> Any:
    from distributed import LocalCluster, Worker

    def worker(*args: Any, **options: Any) -> Worker:
        # LocalCluster's own address for what it tells over HTTP is any, where all is threads.
        return Worker(*args, **{**options, "dashboard_address": f"{_HERE}:0"})

    dashboard = os.environ.get("TILEPIPE_DASHBOARD", "127.0.0.1:0")
    if gpus is not None:
        return _gpu_cluster(gpu_numbers(gpus), lanes, dashboard)
    common: dict[str, Any] = {
        "dashboard_address": dashboard,
        "memory_limit": 0,
        "silence_logs": logging.CRITICAL,
    }
    if workers is None:
        return LocalCluster(
            n_workers=1,
            processes=False,
            threads_per_worker=lanes,
            worker_class=worker,
            **common,
        )
    return LocalCluster(
        n_workers=workers,
        processes=True,
        threads_per_worker=lanes,
        host=_HERE,
        env=dict(ONE_ARENA),
        preload=_preload(),
        **common,
    )


def _preload() -> list[str]:
    """Return what worker processes load: what Dask's configuration says, and ours."""
    import dask

    return [*dask.config.get("distributed.worker.preload", []), "tilepipe.schedule.deaf"]


def gpu_numbers(gpus: str) -> list[int]:
    """Return the numbers of ``all`` or ``0,1``; ScheduleError for what makes no sense here."""
    visible = _visible_gpus()
    if gpus == "all":
        if not visible:
            raise ScheduleError("--gpus all: no NVIDIA GPU is visible here; leave --gpus out")
        return list(range(len(visible)))
    try:
        numbers = [int(part) for part in gpus.split(",")]
    except ValueError:
        raise ScheduleError(f"--gpus {gpus}: give 'all' or numbers such as 0,1") from None
    if len(set(numbers)) != len(numbers) or min(numbers) < 0:
        raise ScheduleError(f"--gpus {gpus}: each number once, none negative")
    if visible and max(numbers) >= len(visible):
        raise ScheduleError(f"--gpus {gpus}: {len(visible)} GPUs are visible here, numbered from 0")
    return numbers


def _visible_gpus() -> list[str]:
    """Return what CUDA calls the GPUs that this process may use, as torch numbers them.

    A batch system gives a job some of a machine's: those that ``CUDA_VISIBLE_DEVICES`` names, by
    number or by UUID, up to the first that it does not know (CUDA's programming guide).
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        found = (list(folder.glob(names)) for folder, names in _WHERE_GPUS_ARE)
        return [str(n) for n, _ in enumerate(next(filter(None, found), ()))]
    names = [name.strip() for name in named.split(",")]
    return list(takewhile(lambda name: name and not name.startswith("-"), names))


def gpu_worker_specs(numbers: list[int], lanes: int = LANES) -> dict[str, dict[str, Any]]:
    """Dask worker specifications, one a GPU, each process seeing that device alone."""
    from distributed import Nanny

    names = dict(enumerate(_visible_gpus()))
    return {
        f"gpu{number}": {
            "cls": Nanny,
            "options": {
                "host": _HERE,
                "dashboard": False,
                "silence_logs": logging.CRITICAL,
                "nthreads": lanes,
                "memory_limit": 0,
                "resources": {"GPU": 1},
                "preload": _preload(),
                "env": {**ONE_ARENA, "CUDA_VISIBLE_DEVICES": names.get(number, str(number))},
            },
        }
        for number in numbers
    }


def _gpu_cluster(numbers: list[int], lanes: int, dashboard: str) -> Any:
    from distributed import Scheduler, SpecCluster

    return SpecCluster(
        workers=gpu_worker_specs(numbers, lanes),
        scheduler={
            "cls": Scheduler,
            "options": {"host": _HERE, "port": 0, "dashboard_address": dashboard},
        },
        silence_logs=logging.CRITICAL,
    )


@contextmanager
def same_environment() -> Iterator[None]:
    """Leave this process's environment as it was.

    What Dask has its worker processes inherit (one thread for each library) it sets here, and
    leaves; what a script starts after a run would compute with one thread.
    """
    import dask

    names = dask.config.get("distributed.nanny.pre-spawn-environ", {})
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def forget_handlers() -> None:
    """Let go of the scheduler and the workers that were ours.

    Dask remembers every handler that was ever called, and by it whose that is: of each run in a
    Python process it would keep 2000 objects, and what its logs hold.
    """
    from distributed import core

    forget = getattr(getattr(core, "_expects_comm", None), "cache_clear", None)
    if forget is not None:
        forget()
