"""A scheduler and three workers started by hand: workers, client and scheduler are killed."""

import itertools
import random
import signal
import threading
import time

import pytest

from tilepipe.models import build, load_model, save_checkpoint
from tilepipe.models.seeded import fill_seeded
from tilepipe.store import open_store


class Cluster:
    """`dask scheduler` and `dask worker` processes."""

    def __init__(self, zygote, folder, *, workers=3, port=0, scheme="tcp", env=None, flags=()):
        self._zygote = zygote
        self._folder = folder
        self._env = {
            "DASK_DISTRIBUTED__WORKER__MEMORY__TARGET": "false",
            "DASK_DISTRIBUTED__WORKER__MEMORY__SPILL": "false",
            "DASK_DISTRIBUTED__WORKER__MEMORY__PAUSE": "false",
            **(env or {}),
        }
        self._names = itertools.count()
        self.file = folder / "scheduler.json"
        self.scheme = scheme
        self._flags = flags
        self.scheduler = None
        self.start_scheduler(port)
        self.workers = [self.start_worker() for _ in range(workers)]

    def start_scheduler(self, port=0):
        self.file.unlink(missing_ok=True)
        self.scheduler = self._zygote.start(
            "scheduler", "--host", f"{self.scheme}://127.0.0.1", "--port", port,
            "--dashboard-address", "127.0.0.1:0", "--no-show",
            "--scheduler-file", self.file, *self._flags, env=self._env, cwd=self._folder,
        )  # fmt: skip
        end_s = time.monotonic() + 100
        while not self.file.exists() or not self.file.read_text().rstrip().endswith("}"):
            assert self.scheduler.poll() is None, self.scheduler.text()
            assert time.monotonic() < end_s, self.scheduler.text()
            time.sleep(0.02)

    def start_worker(self, **env):
        return self._zygote.start(
            "worker", "--scheduler-file", self.file, "--no-nanny", "--nthreads", 2,
            "--host", f"{self.scheme}://127.0.0.1", "--no-dashboard", "--memory-limit", 0,
            "--name", f"worker-{next(self._names)}",
            "--local-directory", self._folder / "dask-space",
            *self._flags, env={**self._env, **env}, cwd=self._folder,
        )  # fmt: skip

    def replace(self, number):
        self.workers[number].kill()
        self.workers[number] = self.start_worker()

    def close(self):
        for process in [*self.workers, self.scheduler]:
            process.kill()


@pytest.fixture
def start_cluster(zygote, tmp_path):
    found = []

    def start(**options):
        folder = tmp_path / f"cluster{len(found)}"
        folder.mkdir()
        found.append(Cluster(zygote, folder, **options))
        return found[-1]

    yield start
    for cluster in found:
        cluster.close()


def kill_about_one_a_second(cluster, process, done, *, seed=0, interval_s=1.0):
    """Kill one worker a second and start another, while units go on being done in between.

    On a machine so slow that nothing is done within a second, a kill waits for the next record.
    """
    chance = random.Random(seed)
    kills, before = 0, -1
    while process.poll() is None:
        time.sleep(interval_s)
        now = done()
        if now > before and now > 0:
            cluster.replace(chance.randrange(len(cluster.workers)))
            kills, before = kills + 1, now
    return kills


def test_workers_killed_all_along(
    start_cluster, zygote, slide, flags, reference, equal, records, tmp_path
):
    cluster = start_cluster()
    store = tmp_path / "out.zarr"
    process = zygote.start(
        "tilepipe", "run", slide, "-o", store, *flags, "--scheduler", cluster.file
    )
    kills = kill_about_one_a_second(cluster, process, lambda: records(store), interval_s=0.2)
    assert process.code == 0, process.text()
    assert kills >= 2
    equal(store, reference)
    record = open_store(str(store)).label("unet").read_record()
    assert record["state"] == "done"
    assert not record["failed"]


def test_the_client_killed_and_run_again(
    start_cluster, zygote, slide, flags, reference, equal, records, tmp_path, wait_until
):
    cluster = start_cluster()
    store = tmp_path / "out.zarr"
    command = ["run", slide, "-o", store, *flags, "--scheduler", cluster.file]
    process = zygote.start("tilepipe", *command)
    wait_until(lambda: records(store) > 3 or process.poll() is not None, "some units")
    process.kill()
    zygote.run(*command)
    equal(store, reference)


def test_the_scheduler_killed_then_a_new_one(
    start_cluster, zygote, slide, flags, reference, equal, records, tmp_path, wait_until
):
    cluster = start_cluster(workers=2)
    store = tmp_path / "out.zarr"
    command = ["run", slide, "-o", store, *flags, "--scheduler"]
    process = zygote.start(
        "tilepipe", *command, cluster.file, env={"TILEPIPE_SCHEDULER_TIMEOUT_S": 2}
    )
    wait_until(lambda: records(store) > 3, "some units")
    cluster.scheduler.kill()
    assert process.wait() == 1
    told = process.text().strip().splitlines()[-1]
    assert told.startswith("Error: the Dask scheduler is gone; what was done is recorded")
    assert "Traceback" not in process.text()
    done = records(store)
    assert 3 < done < records(reference)
    assert open_store(str(store)).label("unet").read_record()["state"] == "running"
    again = start_cluster(workers=2)
    zygote.run(*command, again.file)
    equal(store, reference)


def test_the_scheduler_comes_back_at_its_address(
    start_cluster, zygote, slide, flags, reference, equal, records, tmp_path, wait_until
):
    """A restarted scheduler pod knows nothing: the client hands everything out anew."""
    import json

    cluster = start_cluster(workers=2)
    address = json.loads(cluster.file.read_text())["address"]
    store = tmp_path / "out.zarr"
    process = zygote.start(
        "tilepipe", "run", slide, "-o", store, *flags, "--scheduler", address,
        env={"TILEPIPE_SCHEDULER_TIMEOUT_S": 100},
    )  # fmt: skip
    wait_until(lambda: records(store) > 3, "some units")
    cluster.scheduler.kill()
    for worker in cluster.workers:
        worker.kill()
    cluster.start_scheduler(int(address.rsplit(":", 1)[1]))
    cluster.workers = [cluster.start_worker() for _ in range(2)]
    assert process.wait() == 0, process.text()
    equal(store, reference)


def test_the_network_cut_for_a_while(
    start_cluster, zygote, slide, flags, reference, equal, records, tmp_path, wait_until
):
    cluster = start_cluster(workers=2)
    store = tmp_path / "out.zarr"
    process = zygote.start(
        "tilepipe", "run", slide, "-o", store, *flags, "--scheduler", cluster.file
    )
    wait_until(lambda: records(store) > 3, "some units")
    # Nobody hears from the scheduler for a while; connections stay.
    cluster.scheduler.send(signal.SIGSTOP)
    time.sleep(3)
    cluster.scheduler.send(signal.SIGCONT)
    assert process.wait() == 0, process.text()
    equal(store, reference)


def test_a_worker_that_hangs_does_not_hold_up_the_rest(
    start_cluster, zygote, slide, flags, reference, equal, at_rest, records, tmp_path, wait_until
):
    cluster = start_cluster()
    store = tmp_path / "out.zarr"
    process = zygote.start(
        "tilepipe", "run", slide, "-o", store, *flags, "--scheduler", cluster.file,
        env={"TILEPIPE_STRAGGLER_S": 1},
    )  # fmt: skip
    wait_until(lambda: records(store) > 3, "some units")
    hung = cluster.workers[0]
    hung.send(signal.SIGSTOP)
    assert process.wait() == 0, process.text()
    # It wakes, goes on with what it had begun, and writes the same bytes once more.
    hung.send(signal.SIGCONT)
    equal(wait_until(lambda: at_rest(store), "what it had begun to be written"), reference)


def test_a_full_disk_on_one_worker(start_cluster, zygote, slide, flags, reference, equal, tmp_path):
    """A patched write stands for it: the worker's writes fail, everybody else's do not."""
    cluster = start_cluster(workers=2)
    store = tmp_path / "out.zarr"
    limited = cluster.start_worker(TEST_FULL_UNDER=store)
    cluster.workers.append(limited)
    zygote.run("run", slide, "-o", store, *flags, "--scheduler", cluster.file)
    equal(store, reference)
    assert limited.poll() is None


def test_a_unit_of_a_stopped_job_is_not_written_over_that_of_the_next(
    start_cluster, zygote, slide, flags, reference, equal, tmp_path, wait_until
):
    """Ctrl-C, and at once other weights with --overwrite; a worker still has a unit of before."""
    cluster = start_cluster(workers=1)
    store, hangs = tmp_path / "out.zarr", tmp_path / "hangs"
    hangs.touch()
    cluster.workers.append(cluster.start_worker(TEST_STALLS_WHILE=hangs))
    option = flags.index("random:0")
    before = [*flags[:option], "random:5", *flags[option + 1 :]]
    process = zygote.start(
        "tilepipe", "run", slide, "-o", store, *before, "--scheduler", cluster.file
    )
    wait_until(lambda: hangs.with_suffix(".reached").exists(), "a unit that is computed")
    process.send(signal.SIGINT)
    assert process.wait() == 130, process.text()
    zygote.run(
        "run", slide, "-o", store, *flags, "--overwrite", "--scheduler", cluster.file,
        env={"TILEPIPE_STRAGGLER_S": 1},
    )  # fmt: skip
    hangs.unlink()
    zygote.run("run", slide, "-o", tmp_path / "other.zarr", *flags, "--scheduler", cluster.file)
    equal(store, reference)


@pytest.mark.parametrize("missing", ["slide", "weights"])
def test_a_worker_that_lacks_what_the_job_needs_spoils_no_unit(
    start_cluster, zygote, make_slide, flags, records, tmp_path, wait_until, missing
):
    slide = make_slide(tmp_path / "large.tif", shape=(1500, 1300))
    weights, store = tmp_path / "weights.safetensors", tmp_path / "out.zarr"
    save_seeded(weights, 0)
    option = flags.index("random:0")
    used = [*flags[:option], weights, "--precision", "fp32", "--device", "cpu", "--unit", "128"]
    cluster = start_cluster(workers=1)
    process = zygote.start(
        "tilepipe", "run", slide, "-o", store, *used, "--scheduler", cluster.file
    )
    wait_until(lambda: records(store) > 3 or process.poll() is not None, "some units")
    path = {"slide": slide, "weights": weights}[missing]
    cluster.workers.append(cluster.start_worker(TEST_NOT_MOUNTED=path))
    assert process.wait() == 0, process.text()
    assert process.text().count("a worker gets no more units of this job: ") == 1
    assert f"{path}: cannot be read: No such file or directory (on the worker tcp" in process.text()


def test_where_a_path_is_not_seen_is_told(start_cluster, zygote, slide, flags, tmp_path):
    cluster = start_cluster(workers=0)
    cluster.workers.append(cluster.start_worker(TEST_NOT_MOUNTED=slide))
    text = zygote.run(
        "run", slide, "-o", tmp_path / "out.zarr", *flags, "--scheduler", cluster.file, code=1
    )
    assert f"{slide}: cannot be read: No such file or directory (on the worker tcp" in text
    assert not (tmp_path / "out.zarr").exists()


def test_a_full_disk_everywhere_then_room(
    start_cluster, zygote, slide, flags, reference, equal, tmp_path
):
    cluster = start_cluster(workers=0)
    store = tmp_path / "out.zarr"
    cluster.workers += [cluster.start_worker(TEST_FULL_UNDER=store) for _ in range(2)]
    command = ["run", slide, "-o", store, *flags, "--scheduler", cluster.file]
    text = zygote.run(*command, code=1)
    assert "No space left on device" in text
    assert "the disk is full" in text
    assert open_store(str(store)).label("unet").read_record()["state"] == "units failed"
    cluster.workers.append(cluster.start_worker())
    for worker in cluster.workers[:2]:
        worker.kill()
    zygote.run(*command)
    equal(store, reference)


def test_a_worker_that_served_a_mask_finds_its_objects_too(
    start_cluster, zygote, slide, flags, equal, tmp_path
):
    cluster = start_cluster(workers=1)
    store, local = tmp_path / "out.zarr", tmp_path / "local.zarr"
    there = ["run", slide, "-o", store, *flags, "--scheduler", cluster.file]
    zygote.run(*there)
    zygote.run(*there, "--instances")
    zygote.run("run", slide, "-o", local, *flags, "--instances")
    equal(store, local)


def test_a_worker_takes_no_weights_but_those_of_the_job(
    start_cluster, zygote, slide, flags, equal, tmp_path
):
    """It outlives jobs: a file of the same name may hold others by now, here or there."""
    cluster = start_cluster(workers=1)
    weights = tmp_path / "weights.safetensors"
    option = flags.index("random:0")
    used = [*flags[:option], weights, "--precision", "fp32", "--device", "cpu", "--quiet"]
    for seed in (0, 1):
        save_seeded(weights, seed)
        store, local = tmp_path / f"out{seed}.zarr", tmp_path / f"local{seed}.zarr"
        zygote.run("run", slide, "-o", store, *used, "--unit", "128", "--scheduler", cluster.file)
        zygote.run("run", slide, "-o", local, *used, "--unit", "128")
        equal(store, local)


def save_seeded(path, seed):
    model = load_model("unet", weights=f"random:{seed}", base=2, options={"depth": 1})
    net = build("unet", in_channels=3, classes=2, base=2, depth=1)
    fill_seeded(net, seed)
    save_checkpoint(
        path, net, name="unet", arguments={"base": 2, "depth": 1}, classes=model.classes,
        normalisation=model.normalisation,
    )  # fmt: skip


def test_no_worker_comes(start_cluster, zygote, slide, flags, tmp_path):
    cluster = start_cluster(workers=0)
    text = zygote.run(
        "run", slide, "-o", tmp_path / "out.zarr", *flags, "--scheduler", cluster.file,
        code=1, env={"TILEPIPE_SCHEDULER_TIMEOUT_S": 1},
    )  # fmt: skip
    assert "has no worker" in text
    assert "dask worker" in text


@pytest.mark.parametrize("version", ["0.0.1", ""])
def test_a_worker_of_another_tilepipe_that_joins_late_gets_no_work(
    start_cluster, zygote, slide, flags, reference, equal, records, tmp_path, wait_until, version
):
    cluster = start_cluster(workers=1)
    store = tmp_path / "out.zarr"
    process = zygote.start(
        "tilepipe", "run", slide, "-o", store, *flags, "--scheduler", cluster.file
    )
    wait_until(lambda: records(store) > 3, "some units")
    (known,) = cluster.workers
    known.send(signal.SIGSTOP)  # there would be work for another
    other = cluster.start_worker(TEST_OTHER_TILEPIPE=version)
    cluster.workers.append(other)
    found_out = "gets no work"
    wait_until(lambda: found_out in process.text() or process.poll() is not None, found_out)
    known.send(signal.SIGCONT)
    assert process.wait() == 0, process.text()
    equal(store, reference)
    assert f"has tilepipe {version or 'not at all'}, this process" in process.text()
    assert other.poll() is None, other.text()
    assert "DID A UNIT" not in other.text()


def test_worker_processes_of_our_own(zygote, slide, flags, reference, equal, tmp_path):
    store = tmp_path / "out.zarr"
    zygote.run("run", slide, "-o", store, *flags, "--workers", "2")
    equal(store, reference)


@pytest.mark.slow
def test_a_worker_killed_each_second_on_a_large_slide(
    start_cluster, zygote, make_slide, flags, equal, records, tmp_path
):
    big = make_slide(tmp_path / "big.tif", shape=(8192, 8192), tile=256)
    flags = [*flags, "--unit", "512"]
    local, store = tmp_path / "local.zarr", tmp_path / "out.zarr"
    zygote.run("run", big, "-o", local, *flags)
    cluster = start_cluster()
    process = zygote.start("tilepipe", "run", big, "-o", store, *flags, "--scheduler", cluster.file)
    found = {}

    def watch():
        while process.poll() is None:
            for path in (store / "tilepipe" / "journal").rglob("*.json"):
                found.setdefault(path, path.stat().st_mtime_ns)
            time.sleep(0.5)

    watcher = threading.Thread(target=watch)
    watcher.start()
    kills = kill_about_one_a_second(cluster, process, lambda: records(store))
    watcher.join()
    assert process.code == 0, process.text()
    assert kills >= 5  # how many there are is a matter of the machine's speed
    equal(store, local)
    again = sum(path.stat().st_mtime_ns != first for path, first in found.items())
    # Only units whose result was lost with its worker were written a second time.
    assert again <= 6 * kills
