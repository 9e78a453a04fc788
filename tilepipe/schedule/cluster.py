"""``connect``: a Dask client for this process, for N processes, for GPUs, or for a cluster."""

from __future__ import annotations

import logging
import os
import pickle
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tilepipe.errors import ScheduleError
from tilepipe.malloc import one_arena
from tilepipe.schedule.local import LANES, forget_handlers, local_cluster, same_environment
from tilepipe.schedule.versions import Sealed, ask_versions, version_here

if TYPE_CHECKING:
    from distributed import Client, Future

T = TypeVar("T")
ASK_S = 600.0
"""What a worker may take to load and measure a network."""
ASK_ANOTHER_S = 60.0
"""After this long without an answer another one is asked, too: a worker may hang."""
ANSWER_S = 30.0
"""A scheduler that answers no sooner, at the start or after the connection broke, is gone
(``TILEPIPE_SCHEDULER_TIMEOUT_S``)."""


@dataclass(frozen=True, slots=True)
class Connection:
    """A client and what stands behind it."""

    client: Client
    local: bool
    """The workers are ours: they live and die with this process."""
    dashboard: str | None
    checked: frozenset[str] = frozenset()
    """Workers of a cluster that were found to have the tilepipe of this process."""

    def workers(self) -> dict[str, int]:
        """Addresses of the workers that take tasks now → threads."""
        return {
            address: int(worker["nthreads"])
            for address, worker in _known(self.client).items()
            if worker["status"] == "running"
        }

    def n_paused(self) -> int:
        """Workers to which Dask gives no task, since their memory is near its limit."""
        return _n_paused(self.client)


def _known(client: Client) -> dict[str, dict[str, Any]]:
    workers: dict[str, dict[str, Any]] = client.scheduler_info(n_workers=-1)["workers"]
    return workers


def _n_paused(client: Client) -> int:
    return sum(worker["status"] == "paused" for worker in _known(client).values())


def paused_error(count: int) -> ScheduleError:
    """Return what to say where all workers are paused; a network's memory never becomes less."""
    return ScheduleError(
        f"Dask has paused all {count} workers, since their memory is near its limit; what was done "
        "is recorded: start workers with a larger --memory-limit (0: none), or fewer on a machine, "
        "and give the same command again to go on"
    )


@contextmanager
def connect(
    scheduler: str,
    *,
    workers: int | None = None,
    gpus: str | None = None,
    lanes: int = LANES,
    timeout_s: float | None = None,
) -> Iterator[Connection]:
    """Open a Dask client.

    ``scheduler`` is ``local``, an address (``tcp://…``, ``tls://…``) or a scheduler file. Local
    workers are threads of this process, or ``workers`` processes, or one process per GPU of
    ``gpus`` (``all`` or ``0,1``), each seeing its own device alone; of ``lanes`` threads each.

    TLS material for ``tls://`` comes from Dask's own configuration
    (``DASK_DISTRIBUTED__COMM__TLS__*`` or its YAML files).

    Raises ScheduleError if no scheduler answers or it has no worker, or if Dask's configuration
    cannot be read.
    """
    try:
        import dask
        from distributed import Client
    except (ValueError, OSError) as error:  # it reads all of its files as it is imported
        said = " ".join(str(error).split())
        raise ScheduleError(
            f"Dask cannot read its configuration: {said}; mend that file, or name another folder "
            "in DASK_CONFIG"
        ) from error

    # A lost worker is told once, by us; the library's tracebacks would bury the message.
    for name in (
        "distributed.client",
        "distributed.nanny",
        "distributed.worker",
        "distributed.core",
        "distributed.scheduler",
        "distributed.comm",
        "distributed.batched",
        "distributed.process",
        "distributed.utils",
        "tornado.application",
    ):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    quiet: dict[str, Any] = {
        "distributed.comm.timeouts.connect": "30s",
        "distributed.worker.memory.target": False,
        "distributed.worker.memory.spill": False,
        "distributed.worker.memory.pause": False,
        "distributed.worker.memory.terminate": False,
        # Large native stacks are normal for a network: no advice about them.
        "distributed.admin.tick.limit": "1h",
        # So nobody looks at how late the loop is. Fifty times a second, in each server, an idle
        # loop takes 2.5 % of a core; once a second 0.75 %.
        "distributed.admin.tick.interval": "1s",
        # Samples every thread's stack a hundred times a second; --trace tells what is of use.
        "distributed.worker.profile.enabled": False,
    }
    if scheduler == "local":
        # Our own dashboard listens on this machine alone.
        quiet["distributed.dashboard.link"] = "http://127.0.0.1:{port}/status"
    with dask.config.set(quiet):
        if scheduler == "local":
            one_arena()
            with ExitStack() as held:
                held.enter_context(same_environment())
                held.callback(forget_handlers)
                cluster = local_cluster(workers, gpus, lanes)
                held.callback(_close, cluster)
                client = Client(cluster)
                held.callback(_close, client)
                yield Connection(client, True, _dashboard(client))
            return
        client, checked = _remote_client(
            scheduler, timeout_s or from_environment("SCHEDULER_TIMEOUT_S", ANSWER_S)
        )
        try:
            yield Connection(client, False, _dashboard(client), checked)
        finally:
            _close(client)


def ask_a_worker(scheduler: str, function: Callable[..., T], *arguments: Any) -> T:
    """Run a function on a worker of a cluster; what it raises is raised here.

    The first answer counts, where one worker takes long and another was asked, too. Raises
    ScheduleError if no scheduler answers, if it has no worker, or if they are lost.
    """
    from distributed import KilledWorker

    with connect(scheduler) as connection:
        call = pickle.dumps(Sealed(function, arguments))
        try:
            found: T = _first_answer(connection, call).result(timeout=ANSWER_S)
        except (KilledWorker, CancelledError, TimeoutError) as error:
            reason = str(error) or f"none has answered in {ASK_S:.0f} s"
            raise ScheduleError(
                f"no worker at {scheduler} could say how to run the network: {reason}; see the "
                "workers' own messages"
            ) from error
        return found


def _first_answer(connection: Connection, call: bytes) -> Future:
    """Return the first task with a pickled call that a worker has done; TimeoutError."""
    from distributed import wait

    client = connection.client
    end_s = time.monotonic() + ASK_S
    asked: list[Future] = []
    silent: set[str] = set()
    while True:
        workers = set(connection.workers()) - silent
        if not asked or (silent and workers):
            only = {"workers": sorted(workers)} if silent else {}
            asked.append(client.submit(pickle.loads, call, pure=False, priority=100, **only))
        left_s = end_s - time.monotonic()
        try:
            done = wait(
                asked, timeout=max(0.0, min(ASK_ANOTHER_S, left_s)), return_when="FIRST_COMPLETED"
            ).done
        except TimeoutError:
            if left_s <= ASK_ANOTHER_S:
                raise
            keys = {future.key for future in asked}
            silent |= {at for at, busy in client.processing().items() if keys.intersection(busy)}
            continue
        answered: Future = done.pop()
        return answered


def from_environment(name: str, default: float) -> float:
    """Return the number in ``TILEPIPE_<name>``; ScheduleError if it is none."""
    text = os.environ.get(f"TILEPIPE_{name}", "")
    try:
        return float(text) if text else default
    except ValueError:
        raise ScheduleError(f"TILEPIPE_{name}={text}: give a number of seconds") from None


def _close(thing: Any) -> None:
    try:
        thing.close(timeout=10)
    except Exception:  # the scheduler may be gone; the work is journalled
        logging.getLogger(__name__).debug("closing %r", thing, exc_info=True)


def _dashboard(client: Client) -> str | None:
    try:
        link: str | None = client.dashboard_link
    except Exception:  # a nicety, whatever is missing for it
        return None
    return link


def _remote_client(scheduler: str, timeout_s: float) -> tuple[Client, frozenset[str]]:
    """Return a client, and the workers that were found to have the same tilepipe."""
    from distributed import Client

    try:
        if "://" in scheduler:
            client = Client(scheduler, timeout=timeout_s)
        else:
            path = Path(scheduler)
            if not path.is_file():
                raise ScheduleError(
                    f"--scheduler {scheduler}: neither 'local', an address such as "
                    "tcp://host:8786, nor a scheduler file that exists"
                )
            client = Client(scheduler_file=str(path), timeout=timeout_s)
    except (OSError, TimeoutError, ValueError, TypeError) as error:
        raise ScheduleError(
            f"no Dask scheduler answers at {scheduler}: {error}; start one with `dask scheduler`"
        ) from error
    try:
        client.wait_for_workers(1, timeout=2 * timeout_s)
    except TimeoutError:
        paused = _n_paused(client)
        _close(client)
        if paused:
            raise paused_error(paused) from None
        raise ScheduleError(
            f"the scheduler at {scheduler} has no worker after {2 * timeout_s:.0f} s; start some "
            f"with `dask worker {scheduler}`"
        ) from None
    try:
        return client, _check_workers(client, scheduler, timeout_s)
    except BaseException:
        _close(client)
        raise


def _check_workers(client: Client, scheduler: str, timeout_s: float) -> frozenset[str]:
    """Return the workers that say that they have the tilepipe of this process.

    Raises ScheduleError if some have none or another, whose units are other units.
    """
    there = client.scheduler_info(n_workers=-1)["workers"]
    try:
        theirs = client.sync(ask_versions, client, there, callback_timeout=timeout_s)
    except TimeoutError:  # one that hangs; its units will go elsewhere
        return frozenset(there)
    ours = version_here()
    others = {address: version for address, version in theirs.items() if version != ours}
    if others:
        address, version = min(others.items())
        raise ScheduleError(
            f"{len(others)} of the {len(theirs)} workers at {scheduler} have another tilepipe than "
            f"this process, which has {ours or 'no version'}: {address} has {version or 'none'}; "
            "install the same in the environment of all workers and start them again"
        )
    return frozenset(theirs)
