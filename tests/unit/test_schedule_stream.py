"""The bounded stream through a real Dask client in this process."""

import asyncio
import os
import threading
import time
from collections import Counter
from dataclasses import replace

import psutil
import pytest

from tilepipe.errors import ScheduleError, SlideError
from tilepipe.schedule import Dag, Outcome, Stage
from tilepipe.schedule import cluster as cluster_room
from tilepipe.schedule import crew as crew_room
from tilepipe.schedule import local as local_room
from tilepipe.schedule import pace as pace_room
from tilepipe.schedule import versions as versions_room
from tilepipe.schedule.cluster import (
    Connection,
    ask_a_worker,
    connect,
)
from tilepipe.schedule.local import gpu_numbers, gpu_worker_specs
from tilepipe.schedule.stream import drive
from tilepipe.tiling import Grid

CALLS = Counter()
TASKS = []
_LOCK = threading.Lock()
PLANS = {}
"""Ticket → what a unit's n-th try does; the workers are threads of this process."""


def here():
    from distributed import get_worker

    return get_worker().address


def work_on(ticket, stage, units):
    outcomes = []
    with _LOCK:
        TASKS.append((ticket, stage, units))
    for unit in units:
        with _LOCK:
            CALLS[ticket, stage, unit] += 1
            nth = CALLS[ticket, stage, unit]
        told = PLANS.get(ticket, lambda *_: {})(stage, unit, nth, here())
        told = {"elapsed_s": 1e-4, **told}
        outcomes.append(Outcome(unit, not told.get("error"), worker=here(), **told))
    return outcomes


class Pyramid:
    """A row of units and a second stage that needs pairs of them."""

    def __init__(self, ticket, count=8):
        row, pairs = Grid((1, count), 1), Grid((1, -(-count // 2)), 1)
        self.ticket = ticket
        self.dag = Dag(
            [
                Stage("low", 0, row, feeds=lambda u: [(1, u.ix // 2)], root=True),
                Stage(
                    "high", 1, pairs, rank=1, on_device=True,
                    needs=lambda u: [(0, i) for i in (2 * u.ix, 2 * u.ix + 1) if i < count],
                ),
            ]
        )  # fmt: skip
        self.dag.start({})
        self.recorded = Counter()
        self.closed = []

    def record(self, stage, outcome):
        assert outcome.ok
        self.recorded[stage, outcome.unit] += 1

    def close(self, reason):
        self.closed.append(reason)


@pytest.fixture(scope="module")
def connection():
    import logging

    from distributed import Client, LocalCluster

    cluster = LocalCluster(
        n_workers=2, processes=False, threads_per_worker=2, dashboard_address="127.0.0.1:0",
        memory_limit=0, silence_logs=logging.CRITICAL,
    )  # fmt: skip
    client = Client(cluster)
    yield Connection(client, True, None)
    client.close()
    cluster.close()


@pytest.fixture(autouse=True)
def clean():
    CALLS.clear()
    TASKS.clear()
    PLANS.clear()


def run(connection, *jobs, **options):
    drive(connection, iter(jobs), work_on, **options)
    return jobs[0]


def test_each_unit_runs_once_and_is_recorded_once(connection):
    jobs = [Pyramid(f"job {n}", count=9) for n in range(7)]
    run(connection, *jobs)
    for job in jobs:
        assert job.dag.finished
        assert job.closed == [None]
        assert set(job.recorded.values()) == {1}
        assert len(job.recorded) == 9 + 5
    assert set(CALLS.values()) == {1}


def test_a_unit_that_fails_once_is_tried_elsewhere(connection):
    seen = []

    def plan(stage, unit, nth, worker):
        if (stage, unit) == (0, 3):
            seen.append(worker)
            return {"error": "flaky"} if nth == 1 else {}
        return {}

    PLANS["flaky"] = plan
    job = run(connection, Pyramid("flaky"))
    assert job.dag.finished
    assert not job.dag.failed
    assert len(seen) == 2
    assert len(set(seen)) == 2


def test_what_keeps_failing_is_recorded_and_the_rest_goes_on(connection):
    PLANS["broken"] = lambda stage, unit, nth, worker: (
        {"error": f"broken for the {nth}. time"} if (stage, unit) == (0, 3) else {}
    )
    job = run(connection, Pyramid("broken"), retries=2)
    assert CALLS["broken", 0, 3] == 3
    assert job.dag.failed == {(0, 3): "broken for the 3. time"}
    assert job.closed == [None]
    assert not job.dag.finished
    assert job.dag.blocked == 1
    assert len(job.recorded) == 7 + 3


def test_permanent_errors_are_not_tried_again(connection):
    PLANS["damaged"] = lambda stage, unit, nth, worker: (
        {"error": "damaged", "permanent": True} if unit == 1 else {}
    )
    job = run(connection, Pyramid("damaged"))
    assert CALLS["damaged", 0, 1] == 1
    assert CALLS["damaged", 1, 1] == 1
    assert job.dag.failed == {(0, 1): "damaged", (1, 1): "damaged"}


def test_a_full_disk_on_one_worker_moves_the_work_to_the_other(connection, monkeypatch):
    monkeypatch.setattr(pace_room, "MOST_UNITS", 1)
    full = sorted(connection.workers())[0]
    PLANS["full"] = lambda stage, unit, nth, worker: (
        {"error": "disk full", "unfit": True} if worker == full else {}
    )
    job = run(connection, Pyramid("full", count=60), retries=3)
    assert job.dag.finished
    assert job.closed == [None]
    # Once known, the full worker gets nothing more: only what was under way failed.
    assert sum(CALLS.values()) < 60 + 30 + 20


def test_a_unit_does_not_go_back_to_a_worker_where_it_fails(connection, monkeypatch):
    """One that fails at once is always idle, and Dask moves to the idle what waits for others."""
    monkeypatch.setattr(pace_room, "MOST_UNITS", 1)
    bad = sorted(connection.workers())[0]

    def plan(stage, unit, nth, worker):
        if worker == bad:
            return {"error": "never here"}
        time.sleep(0.15)
        return {}

    PLANS["stolen"] = plan
    job = run(connection, Pyramid("stolen", count=24), retries=1)
    assert not job.dag.failed
    assert job.dag.finished


def test_an_unfit_worker_is_told_of_once_and_spoils_no_unit(connection, monkeypatch):
    monkeypatch.setattr(pace_room, "MOST_UNITS", 1)
    unfit = sorted(connection.workers())[0]
    PLANS["unfit"] = lambda stage, unit, nth, worker: (
        {"error": "no such file", "unfit": True} if worker == unfit else {}
    )
    told = []
    job = Pyramid("unfit", count=60)
    drive(connection, iter([job]), work_on, retries=0, on_other=told.append)
    assert job.dag.finished
    assert told == ["a worker gets no more units of this job: no such file"]


def test_a_full_disk_everywhere_gives_the_job_up_and_others_go_on(connection):
    PLANS["no room"] = lambda *_: {"error": "disk full", "unfit": True}
    job, other = Pyramid("no room", count=300), Pyramid("fine", count=30)
    run(connection, job, other)
    assert job.closed == ["disk full"]
    assert not job.dag.finished
    assert sum(n for (ticket, *_), n in CALLS.items() if ticket == "no room") < 100
    assert other.dag.finished


def test_a_task_that_raises_is_tried_again_then_recorded(connection):
    def plan(stage, unit, nth, worker):
        if unit == 2 and stage == 0:
            raise RuntimeError("not even an outcome")
        return {}

    PLANS["raises"] = plan
    job = run(connection, Pyramid("raises"), retries=1)
    assert list(job.dag.failed) == [(0, 2)]
    assert "not even an outcome" in job.dag.failed[0, 2]
    assert CALLS["raises", 0, 2] == 2


def test_quick_units_travel_together_and_the_window_is_bounded(connection):
    job = run(connection, Pyramid("quick", count=3000))
    assert job.dag.finished
    sizes = [len(units) for _, _, units in TASKS]
    assert max(sizes) == pace_room.MOST_UNITS
    assert sum(sizes) == 4500
    assert len(TASKS) < 300


def test_units_of_empty_glass_are_no_measure_of_those_that_are_computed(connection):
    """A lane would be given dozens of units for the device, one after the other."""

    class Glass(Pyramid):
        def __init__(self, ticket):
            super().__init__(ticket, count=400)
            low, high = self.dag.stages
            share = lambda unit: float(unit.ix >= 150)  # noqa: E731
            self.dag = Dag([low, replace(high, share=share)])
            self.dag.start({})

    PLANS["glass"] = lambda stage, unit, *_: (
        {"elapsed_s": 1.0} if stage == 1 and unit >= 150 else {"elapsed_s": 1e-4}
    )
    assert run(connection, Glass("glass")).dag.finished
    tasks = [units for _, stage, units in TASKS if stage == 1]
    assert {len(units) for units in tasks if units[-1] >= 150} == {1}
    assert max(len(units) for units in tasks if units[-1] < 150) > 8


def test_the_scheduler_never_sees_more_than_the_window(connection, monkeypatch):
    monkeypatch.setattr(pace_room, "MOST_UNITS", 1)
    most = 0

    def tick(_):
        nonlocal most
        most = max(most, len(connection.client.futures))

    run(connection, Pyramid("window", count=300), on_tick=tick)
    # Twice that at most: what is forgotten here is forgotten there a moment later.
    assert 0 < most <= 2 * (2 * 4 + 2)


def test_the_devices_first_unit_waits_behind_nothing(connection, monkeypatch):
    monkeypatch.setattr(pace_room, "MOST_UNITS", 1)
    begun, came = threading.Event(), []

    def plan(stage, unit, nth, worker):
        if stage == 1:
            begun.set()
        elif unit > 1:  # all but what the device's first unit needs hold their lane up
            came.append(begun.wait(10))
        return {}

    PLANS["first"] = plan
    assert run(connection, Pyramid("first", count=20)).dag.finished
    assert len(came) == 18
    assert all(came)


def test_half_of_a_workers_lanes_are_for_the_device(monkeypatch):
    monkeypatch.setattr(pace_room, "MOST_UNITS", 1)
    together, lock, here_now, most = threading.Barrier(4), threading.Lock(), [], []

    def plan(stage, unit, nth, worker):
        if stage == 1:
            with lock:
                here_now.append(unit)
                most.append(len(here_now))
            together.wait(30)  # breaks unless four units are held at the same time
            with lock:
                here_now.remove(unit)
        return {}

    PLANS["many lanes"] = plan
    with connect("local", lanes=8) as connection:
        assert set(connection.workers().values()) == {8}
        assert run(connection, Pyramid("many lanes", count=40)).dag.finished
    assert max(most) == 4
    crew = crew_room.Crew(connection)
    assert crew.device_lanes == 2, "before anybody was seen"
    crew.workers = {"one": 1, "three": 3, "eight": 8}
    assert crew.device_lanes == 2 + 2 + 4


def test_a_straggler_gets_a_second_copy_and_the_first_to_come_back_counts(connection, monkeypatch):
    monkeypatch.setenv("TILEPIPE_STRAGGLER_S", "0.5")
    release = threading.Event()

    def plan(stage, unit, nth, worker):
        if (stage, unit, nth) == (0, 5, 1):
            release.wait(60)
        return {}

    PLANS["slow"] = plan
    job = run(connection, Pyramid("slow"))
    assert not release.is_set()
    release.set()
    assert job.dag.finished
    assert CALLS["slow", 0, 5] == 2
    assert set(job.recorded.values()) == {1}


def test_a_scheduler_that_does_not_say_who_works_is_asked_again(connection, monkeypatch):
    """A broken connection is seen by whoever talks over it next, and comes back."""
    monkeypatch.setenv("TILEPIPE_STRAGGLER_S", "0.5")
    ask, asked = connection.client.processing, []

    def processing():
        asked.append(len(asked))
        if len(asked) == 1:
            raise OSError("connection closed")
        return ask()

    monkeypatch.setattr(connection.client, "processing", processing)
    release = threading.Event()

    def plan(stage, unit, nth, worker):
        if (stage, unit, nth) == (0, 5, 1):
            release.wait(60)
        return {}

    PLANS["silent"] = plan
    try:
        assert run(connection, Pyramid("silent")).dag.finished
    finally:
        release.set()
    assert len(asked) == 2
    assert CALLS["silent", 0, 5] == 2


def test_the_first_unit_that_also_loads_the_network_is_not_what_is_usual(monkeypatch):
    monkeypatch.setenv("TILEPIPE_STRAGGLER_S", "1")
    pace = pace_room.Pace()
    assert pace.task_units("segment") == 1
    pace.learn("segment", 20.0)
    for _ in range(2):
        pace.learn("segment", 0.01)
    assert pace.patience_s("segment", 1) == 1.0
    assert pace.task_units("segment") == 5
    assert pace.patience_s("segment", 100) == pytest.approx(8.0)
    for _ in range(pace_room.REMEMBERED):
        pace.learn("segment", 2.0)
    assert pace.patience_s("segment", 1) == 16.0


def test_results_lost_with_their_worker_are_made_again(connection, monkeypatch):
    client = connection.client
    gather, broken = client.gather, []

    def breaks_twice(future, *args, **kwargs):
        if len(broken) < 2:
            broken.append(future)
            raise KeyError("lost with its worker")
        return gather(future, *args, **kwargs)

    async def later(*args, **kwargs):
        return await breaks_twice(*args, **kwargs)

    monkeypatch.setattr(client, "gather", later)
    job = run(connection, Pyramid("gone"), retries=0)
    assert len(broken) == 2
    assert job.dag.finished
    assert set(job.recorded.values()) == {1}


def test_a_job_without_units_is_closed(connection):
    class Nothing:
        ticket = None

        def __init__(self):
            self.dag = Dag([])
            self.closed = []

        def close(self, reason):
            self.closed.append(reason)

    nothing = Nothing()
    run(connection, nothing, Pyramid("other"))
    assert nothing.closed == [None]


def test_a_cluster_that_loses_all_workers_for_good_is_given_up(connection, monkeypatch):
    class Empty:
        client = connection.client
        local = True
        checked = frozenset()

        def workers(self):
            return {}

        def n_paused(self):
            return 0

    monkeypatch.setattr(crew_room, "NO_WORKER_S", 0.0)
    with pytest.raises(ScheduleError, match=r"no worker .* same command again"):
        drive(Empty(), iter([Pyramid("alone", count=2000)]), work_on)


@pytest.mark.parametrize("version", ["0.0.1", None])
def test_a_worker_of_another_tilepipe_that_comes_later_gets_no_work(
    connection, monkeypatch, version
):
    ours, other = sorted(connection.workers())
    asked = []

    async def answer(client, workers):
        asked.append(sorted(workers))
        return dict.fromkeys(workers, version)

    monkeypatch.setattr(crew_room, "ask_versions", answer)
    seen, told = set(), []
    PLANS["strangers"] = lambda stage, unit, nth, worker: seen.add(worker) or {}
    cluster = Connection(connection.client, False, None, frozenset({ours}))
    job = run(cluster, Pyramid("strangers", count=60), on_other=told.append)
    assert job.dag.finished
    assert seen == {ours}
    assert asked == [[other]]
    assert len(told) == 1
    assert f"{other} has tilepipe {version or 'not at all'}" in told[0]
    assert "gets no work" in told[0]


def test_a_worker_of_our_tilepipe_that_comes_later_gets_work(connection):
    ours, other = sorted(connection.workers())
    seen = set()

    def plan(stage, unit, nth, worker):
        seen.add(worker)
        time.sleep(0.0 if other in seen else 0.02)
        return {}

    PLANS["late"] = plan
    cluster = Connection(connection.client, False, None, frozenset({ours}))
    job = run(cluster, Pyramid("late", count=4000), on_other=pytest.fail)
    assert job.dag.finished
    assert seen == {ours, other}


def test_what_only_workers_may_run_that_are_gone_is_handed_out_anew(connection):
    """With a stranger about, tasks are bound to those that are known."""
    gone = "tcp://127.0.0.1:9"
    looks = []

    class Shrinking(Connection):
        def workers(self):
            looks.append(True)
            found = connection.workers()
            return {gone: 2, **found} if len(looks) < 3 else found

    cluster = Shrinking(connection.client, False, None, frozenset({gone}))
    job = run(cluster, Pyramid("stranded", count=40))
    assert job.dag.finished
    assert not job.dag.failed
    assert set(CALLS.values()) == {1}
    assert len(looks) >= 3


def test_a_sealed_task_runs_nothing_on_a_worker_of_another_tilepipe(connection, monkeypatch):
    """It may be given one before anybody could ask it; its refusal is not held against units."""
    main, refusals, most = threading.main_thread(), [], 40

    def version():
        if threading.current_thread() is main:
            return "ours"
        refusals.append(True)
        return "ours" if len(refusals) > most else "theirs"

    monkeypatch.setattr(versions_room, "version_here", version)
    everybody = Connection(connection.client, False, None, frozenset(connection.workers()))
    known = run(everybody, Pyramid("known", count=2))
    assert "has tilepipe theirs, the task comes from ours" in known.dag.failed[0, 0]
    assert not CALLS, "and no stranger was there to blame"
    refusals.clear()
    monkeypatch.setattr(crew_room.Crew, "sees_strangers", lambda _: True)
    unknown = run(everybody, Pyramid("unknown"))
    assert unknown.dag.finished
    assert not unknown.dag.failed
    assert len(refusals) == most + len(TASKS)


@pytest.fixture
def paused(connection):
    """Both workers as Dask has them whose memory is near its limit."""
    from distributed.core import Status

    workers = list(connection.client.cluster.workers.values())

    def become(status):
        for worker in workers:
            worker.loop.add_callback(setattr, worker, "status", status)
        while connection.n_paused() != (len(workers) if status is Status.paused else 0):
            time.sleep(0.01)

    become(Status.paused)
    yield len(workers)
    become(Status.running)


def test_workers_that_dask_paused_for_good_are_not_waited_for(connection, paused, monkeypatch):
    monkeypatch.setattr(crew_room, "PAUSED_S", 0.5)
    assert connection.workers() == {}
    with pytest.raises(ScheduleError, match=rf"paused all {paused} workers, .* --memory-limit"):
        run(connection, Pyramid("waits"))
    address = connection.client.scheduler.address
    with (
        pytest.raises(ScheduleError, match=rf"paused all {paused} workers, .* --memory-limit"),
        connect(address, timeout_s=0.5),
    ):
        pass
    assert not CALLS


def test_workers_that_go_on_after_a_pause_are_given_tasks_again(connection, paused):
    from distributed.core import Status

    workers = list(connection.client.cluster.workers.values())
    timer = threading.Timer(
        1.0,
        lambda: [w.loop.add_callback(setattr, w, "status", Status.running) for w in workers],
    )
    timer.start()
    job = run(connection, Pyramid("goes on"))
    timer.join()
    assert job.dag.finished
    assert job.closed == [None]


def test_no_scheduler_there_is_one_clear_error():
    with (
        pytest.raises(ScheduleError, match=r"no Dask scheduler answers at tcp://127.0.0.1:9"),
        connect("tcp://127.0.0.1:9", timeout_s=1),
    ):
        pass
    with (
        pytest.raises(ScheduleError, match="scheduler file that exists"),
        connect("not-there.json"),
    ):
        pass


def test_workers_are_ended_where_no_client_comes_to_them(monkeypatch):
    closed = []

    class Workers:
        def close(self, timeout):
            closed.append(timeout)

    def refuse(_):
        raise OSError("too many open files")

    monkeypatch.setattr(cluster_room, "local_cluster", lambda *_: Workers())
    monkeypatch.setattr("distributed.Client", refuse)
    with pytest.raises(OSError, match="too many open files"), connect("local"):
        pytest.fail("there is no client")
    assert closed == [10]


def told_by(what):
    if what == "the slide":
        raise SlideError("no such slide here")
    if what == "nothing":
        time.sleep(0.5)
    return what, here()


def test_a_worker_is_asked_and_what_it_raises_is_raised_here(connection, monkeypatch):
    address = connection.client.scheduler.address
    what, where = ask_a_worker(address, told_by, "all")
    assert what == "all"
    assert where in connection.workers()
    with pytest.raises(SlideError, match="no such slide here"):
        ask_a_worker(address, told_by, "the slide")
    monkeypatch.setattr(cluster_room, "ASK_S", 0.05)
    with pytest.raises(ScheduleError, match="how to run the network: none has answered in"):
        ask_a_worker(address, told_by, "nothing")


def test_where_the_worker_that_was_asked_hangs_another_one_is_asked(connection, monkeypatch):
    monkeypatch.setattr(cluster_room, "ASK_ANOTHER_S", 0.2)
    asked, over = [], threading.Event()
    monkeypatch.setitem(ANSWERS, "hangs", lambda: hang_first(asked, over))
    try:
        found = ask_a_worker(connection.client.scheduler.address, answer_of, "hangs")
    finally:
        over.set()
    assert asked[1] == found != asked[0]


ANSWERS = {}


def answer_of(key):
    return ANSWERS[key]()


def hang_first(asked, over):
    asked.append(here())
    if len(asked) == 1:
        over.wait()
    return here()


@pytest.mark.parametrize(
    ("theirs", "told"), [(None, "has none"), ("0.0.1", r"has 0\.0\.1"), ("ours", None)]
)
def test_workers_with_another_tilepipe_or_none_are_refused(connection, monkeypatch, theirs, told):
    asked = cluster_room.ask_versions

    async def answer(client, workers):
        found = await asked(client, workers)
        assert set(found) == set(workers) == set(connection.workers())
        return found if theirs == "ours" else dict.fromkeys(found, theirs)

    monkeypatch.setattr(cluster_room, "ask_versions", answer)
    address = connection.client.scheduler.address
    if told is None:
        with connect(address):
            return
    with pytest.raises(ScheduleError, match=told), connect(address):
        pass


def test_a_worker_that_does_not_say_its_version_holds_nothing_up(connection, monkeypatch):
    async def hangs(*_):
        await asyncio.sleep(60)

    monkeypatch.setattr(cluster_room, "ask_versions", hangs)
    started_s = time.monotonic()
    with connect(connection.client.scheduler.address, timeout_s=1) as found:
        assert 1 <= time.monotonic() - started_s < 30
        assert found.checked == set(found.workers())


def test_each_gpu_has_a_process_that_sees_it_alone(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    specs = gpu_worker_specs([0, 3], 5)
    assert list(specs) == ["gpu0", "gpu3"]
    for number, spec in zip([0, 3], specs.values(), strict=True):
        assert spec["options"]["env"]["CUDA_VISIBLE_DEVICES"] == str(number)
        assert spec["options"]["env"]["MALLOC_ARENA_MAX"] == "1"
        assert spec["options"]["resources"] == {"GPU": 1}
        assert spec["options"]["nthreads"] == 5


def listening():
    """Return where this process and its children listen: (address, port)."""
    me = psutil.Process()
    return {
        socket.laddr
        for process in (me, *me.children(recursive=True))
        for socket in process.net_connections()
        if socket.status == psutil.CONN_LISTEN
    }


@pytest.mark.parametrize("how", [{}, {"workers": 1}, {"gpus": "0,1"}], ids=str)
def test_what_is_started_here_listens_here_and_says_nothing(monkeypatch, capfd, how):
    """Whoever reaches a scheduler or a worker may run any code there."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")  # whatever this machine has
    before = listening()
    with connect("local", **how) as own:
        assert own.client.submit(lambda: 1).result(timeout=60) == 1
        found = listening() - before
    assert len(found) > len(how)
    assert {address for address, _ in found} == {"127.0.0.1"}
    assert "".join(capfd.readouterr()) == ""


def test_jobs_of_two_threads_start_their_workers_one_after_the_other(monkeypatch):
    """Dask is imported as it starts: a second thread found its modules half made."""
    inside = threading.Lock()
    alone: list[bool] = []

    def start(*_):
        alone.append(inside.acquire(blocking=False))
        time.sleep(0.2)
        if alone[-1]:
            inside.release()

    monkeypatch.setattr(local_room, "_start", start)
    threads = [
        threading.Thread(target=local_room.local_cluster, args=(None, None, 3)) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert alone == [True, True]


def test_processes_that_were_started_leave_the_environment_as_it_was(monkeypatch):
    """Dask sets what they inherit here: a script's next program had one thread a library."""
    monkeypatch.setenv("MKL_NUM_THREADS", "3")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with connect("local", workers=1) as own:
        seen = own.client.submit(lambda: dict(os.environ)).result(timeout=60)
        assert (seen["OMP_NUM_THREADS"], seen["MKL_NUM_THREADS"]) == ("1", "3")
    assert "OMP_NUM_THREADS" not in os.environ
    assert os.environ["MKL_NUM_THREADS"] == "3"


@pytest.mark.parametrize(
    ("visible", "names"),
    [("4,6", ["4", "6"]), ("GPU-aa, GPU-bb", ["GPU-aa", "GPU-bb"]), ("2,-1,3", ["2"])],
)
def test_workers_see_the_gpus_that_a_batch_system_gave_this_job(monkeypatch, visible, names):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    numbers = gpu_numbers("all")
    seen = [
        spec["options"]["env"]["CUDA_VISIBLE_DEVICES"]
        for spec in gpu_worker_specs(numbers).values()
    ]
    assert seen == names
    with pytest.raises(ScheduleError, match=f"{len(names)} GPUs are visible here"):
        gpu_numbers("0,2")


@pytest.mark.parametrize("visible", ["", "-1", "-1,0"])
def test_no_gpu_is_visible_where_the_environment_says_so(monkeypatch, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ScheduleError, match="no NVIDIA GPU is visible"):
        gpu_numbers("all")


@pytest.mark.parametrize(
    ("driver", "devices", "numbers"),
    [(["0000:17:00.0"], ["nvidia0", "nvidiactl"], [0]),
     ([], ["nvidia0", "nvidia3", "nvidiactl", "nvidia-uvm", "null"], [0, 1])],
)  # fmt: skip
def test_gpus_are_found_by_the_driver_or_else_by_their_devices(
    tmp_path, monkeypatch, driver, devices, numbers
):
    places = {"driver": (driver, "*"), "devices": (devices, local_room._WHERE_GPUS_ARE[1][1])}
    for folder, (names, _) in places.items():
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).touch()
    found = tuple((tmp_path / folder, pattern) for folder, (_, pattern) in places.items())
    monkeypatch.setattr(local_room, "_WHERE_GPUS_ARE", found)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu_numbers("all") == numbers
    with pytest.raises(ScheduleError, match=f"{len(numbers)} GPUs are visible here"):
        gpu_numbers("5")


@pytest.mark.parametrize("gpus", ["x", "0,0", "-1", ""])
def test_gpu_numbers_that_make_no_sense_are_refused(gpus):
    with pytest.raises(ScheduleError, match="--gpus"), connect("local", gpus=gpus):
        pass


def test_a_client_that_closes_under_the_stream_is_a_lost_scheduler():
    job = Pyramid("closing", count=4000)
    PLANS["closing"] = lambda *_: time.sleep(0.002) or {}
    with connect("local") as own:
        told = []

        def tick(_):
            if not told:
                told.append(True)
                own.client.close()

        with pytest.raises(ScheduleError, match="the Dask scheduler is gone"):
            drive(own, iter([job]), work_on, on_tick=tick)
    assert job.closed == []


def test_a_worker_process_that_dies_as_it_starts(tmp_path, monkeypatch):
    """Killed for want of memory, say: it was told as a bug of tilepipe."""
    (tmp_path / "dies_at_once.py").write_text("import os\nos._exit(9)\n")
    monkeypatch.setattr(local_room, "_preload", lambda: [str(tmp_path / "dies_at_once.py")])
    with (
        pytest.raises(ScheduleError, match=r"could not start workers .* same command again"),
        connect("local", workers=2),
    ):
        pass


def test_a_client_that_closes_while_tasks_are_handed_out_is_a_lost_scheduler(monkeypatch):
    """It refuses every task from then on: to try the next one is no way on."""
    with connect("local") as own:
        submit, refused = own.client.submit, []

        def closing(*args, **named):
            own.client.close()
            refused.append(True)
            if len(refused) > 100:
                pytest.fail("asked for ever")
            return submit(*args, **named)

        monkeypatch.setattr(own.client, "submit", closing)
        with pytest.raises(ScheduleError, match="the Dask scheduler is gone"):
            drive(own, iter([Pyramid("refused", count=40)]), work_on)
