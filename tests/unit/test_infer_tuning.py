"""Tuning, its cache and its bounds; memory forecast; the allocator's switch."""

from __future__ import annotations

import errno
import json
import os
import pwd
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tilepipe.infer import (
    caches,
    choose_settings,
    estimate_memory,
    estimate_seconds,
    memory,
    race,
    tuning,
)
from tilepipe.infer.race import Trial, kept_px, useful_px
from tilepipe.infer.tuning import candidate_plans, chosen, tuned
from tilepipe.models import load_model
from tilepipe.spec import JobSpec


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TILEPIPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def model():
    return load_model("unet", weights="random:0", base=2)


def start(model, **spec):
    asked = JobSpec(precision="fp32", backend="torch", **spec)
    return asked, choose_settings(
        model, extent=(9000, 9000), spec=asked.replace(tune=False), channels=3, unit_px=2048
    )


def fast(best_px, calls=None):
    """Stands for the measurement: tiles near ``best_px`` are the fastest."""

    def measure(settings, model, candidates, *, dtype, **_):
        if calls is not None:
            calls.append(len(candidates))
        return [
            Trial(plan.input_px, plan.core_px, batch, 1000.0 - abs(plan.input_px - best_px))
            for plan, batch in candidates
        ]

    return measure


def contenders(lap, ready=None):
    """Stands for what opens a back-end and times it."""

    class Contender:
        def __init__(self, settings, model, plan, batch, **_) -> None:
            self.plan, self.batch = plan, batch
            if ready is not None:
                ready.add(self)

        def lap(self):
            return lap(self.plan, self.batch)

        def close(self) -> None:
            if ready is not None:
                ready.remove(self)

    return Contender


def test_the_fastest_tile_is_taken_and_remembered(model, monkeypatch, cache):
    spec, settings = start(model)
    calls: list[int] = []
    monkeypatch.setattr(tuning, "measure", fast(700, calls))
    first = tuned(settings, model, spec, dtype=np.dtype(np.uint8), workers=1)
    assert first.plan.input_px < settings.plan.input_px
    assert "measured" in first.notes[-1]
    assert len(list(cache.glob("tune-*.json"))) == 1
    again = tuned(settings, model, spec, dtype=np.dtype(np.uint8), workers=1)
    assert again.plan == first.plan
    assert "earlier measurement" in again.notes[-1]
    assert len(calls) == 1


def test_of_those_as_fast_as_the_fastest_the_one_that_takes_least_is_taken():
    small, middle, large = (
        Trial(572, 384, 1, 5.0), Trial(876, 692, 1, 5.9), Trial(1212, 1024, 1, 6.0)
    )  # fmt: skip
    assert chosen([large, small, middle]) is middle
    assert chosen([large, small]) is large
    twice = Trial(876, 692, 2, 5.95)
    assert chosen([twice, middle, large]) is middle


def test_another_precision_is_another_measurement(model, monkeypatch):
    spec, settings = start(model)
    calls: list[int] = []
    monkeypatch.setattr(tuning, "measure", fast(700, calls))
    tuned(settings, model, spec, dtype=np.dtype(np.uint8), workers=1)
    tuned(replace(settings, precision="bf16"), model, spec, dtype=np.dtype(np.uint8), workers=1)
    assert len(calls) == 2


def test_a_spoilt_cache_is_measured_again(model, monkeypatch, cache):
    spec, settings = start(model)
    monkeypatch.setattr(tuning, "measure", fast(700))
    first = tuned(settings, model, spec, dtype=np.dtype(np.uint8), workers=1)
    next(cache.glob("tune-*.json")).write_text("{]")
    assert tuned(settings, model, spec, dtype=np.dtype(np.uint8), workers=1).plan == first.plan
    next(cache.glob("tune-*.json")).write_text(json.dumps({"input_px": 13, "batch": 1}))
    assert tuned(settings, model, spec, dtype=np.dtype(np.uint8), workers=1).plan == first.plan


def test_what_the_user_says_wins(model):
    spec, settings = start(model, tile=572, batch=2)
    assert list(candidate_plans(settings, model, spec, workers=1)) == [(settings.plan, 2)]
    same = tuned(settings, model, spec, dtype=np.dtype(np.uint8), workers=1)
    assert same == settings
    assert same.batch == 2


def test_candidates_are_bounded_by_free_memory(model, monkeypatch):
    spec, settings = start(model)
    wide = [plan.input_px for plan, _ in candidate_plans(settings, model, spec, workers=1)]
    assert max(wide) > settings.plan.input_px
    monkeypatch.setattr(tuning, "free_bytes", lambda device: 1 << 20)
    narrow = [plan.input_px for plan, _ in candidate_plans(settings, model, spec, workers=1)]
    assert narrow == [settings.plan.input_px]


def test_processes_that_share_a_device_share_its_memory(model, monkeypatch):
    spec, settings = start(model)
    gpu = replace(settings, device="cuda:0")
    monkeypatch.setattr(tuning, "free_bytes", lambda _: 1 << 40)
    largest = max(
        tuning.activation_bytes(gpu, model, plan, batch)
        for plan, batch in candidate_plans(gpu, model, spec, workers=1)
    )
    monkeypatch.setattr(tuning, "free_bytes", lambda _: largest / tuning.MEMORY_SHARE)
    alone, shared = (
        [tuning.activation_bytes(gpu, model, *pair) for pair in found]
        for found in (
            candidate_plans(gpu, model, spec, workers=1),
            candidate_plans(gpu, model, spec, workers=4),
        )
    )
    assert max(alone) == largest
    assert max(shared) <= largest / 4


def test_blended_tiles_are_not_tuned_because_they_are_part_of_the_answer():
    dilated = load_model("unet-dilated", weights="random:0", base=2)
    spec, settings = start(dilated)
    assert settings.plan.mode == "blended"
    assert len(list(candidate_plans(settings, dilated, spec, workers=1))) == 1


def test_measuring_leaves_out_what_does_not_fit_and_keeps_to_its_budget(model, monkeypatch):
    _, settings = start(model)
    plans = [settings.plan] * 3
    made = []

    class Backend:
        depth = 1

        def submit(self, tiles, account):
            if len(made) == 1:
                raise MemoryError
            return None

        def collect(self, ticket, account):
            return None

        def close(self):
            pass

    def make(*args, **kwargs):
        made.append(kwargs["batch"])
        return Backend()

    monkeypatch.setattr(race, "make_backend", make)
    now = iter(range(1000))
    found = tuning.measure(
        settings, model, [(plan, 1 + n) for n, plan in enumerate(plans)],
        dtype=np.dtype(np.uint8), budget_s=1e9, clock=lambda: float(next(now)),
    )  # fmt: skip
    assert made == [1, 2, 3]
    assert [trial.batch for trial in found] == [2, 3]
    made.clear()
    found = tuning.measure(
        settings, model, [(plan, 2) for plan in plans],
        dtype=np.dtype(np.uint8), budget_s=-1.0, clock=lambda: float(next(now)),
    )  # fmt: skip
    assert len(found) == 1


@pytest.mark.parametrize(("batch_s", "most"), [(0.01, 7), (0.4, 5), (2.0, 3), (20.0, 3)])
def test_a_heavy_network_is_timed_by_fewer_batches(model, monkeypatch, batch_s, most):
    _, settings = start(model)
    now, submitted = [0.0], []

    class Backend:
        depth = 3

        def submit(self, tiles, account):
            submitted.append(now[0])

        def collect(self, ticket, account):
            now[0] += batch_s

        def close(self):
            pass

    monkeypatch.setattr(race, "make_backend", lambda *args, **kwargs: Backend())
    (trial,) = tuning.measure(
        settings, model, [(settings.plan, 1)], dtype=np.dtype(np.uint8), clock=lambda: now[0]
    )
    assert len(submitted) == most
    assert trial.mpix_per_s == pytest.approx(useful_px(settings.plan) / batch_s / 1e6)


def test_useful_px_counts_what_sticks_out(model):
    _, settings = start(model)
    plan = settings.plan
    assert useful_px(replace(plan, unit_px=2048, core_px=1024)) == 1024**2
    assert useful_px(replace(plan, unit_px=2048, core_px=1536)) == 1024**2


def test_a_batch_of_a_gpu_is_worth_the_tiles_that_a_unit_has(model, monkeypatch):
    _, settings = start(model)
    whole = replace(settings.plan, unit_px=2048, core_px=2048)
    assert kept_px(whole, 1, device="cuda:0") == 2048**2
    assert kept_px(whole, 4, device="cuda:0") == 2048**2
    assert kept_px(whole, 4, device="cpu") == 4 * 2048**2
    assert kept_px(replace(whole, core_px=1024), 4, device="cuda:0") == 2048**2
    assert kept_px(replace(whole, core_px=704), 4, device="cuda:0") == 2048**2 / 3

    now = [0.0]

    class Backend:
        """As fast as it gets: the larger the batch, the more tiles a second."""

        depth = 1

        def submit(self, tiles, account):
            now[0] += 1 + 0.1 * len(tiles)

        def collect(self, ticket, account):
            pass

        def close(self):
            pass

    monkeypatch.setattr(race, "make_backend", lambda *args, **kwargs: Backend())
    gpu = replace(settings, device="cuda:0", plan=whole)
    found = tuning.measure(
        gpu, model, [(whole, batch) for batch in (1, 2, 4)],
        dtype=np.dtype(np.uint8), clock=lambda: now[0],
    )  # fmt: skip
    assert chosen(found).batch == 1


@pytest.mark.parametrize(
    "device, threads, lanes", [("cpu", 1, 1), ("cpu", 2, 1), ("cpu", 16, 3), ("cuda:0", 2, 0)]
)
def test_a_processor_is_measured_beside_what_lanes_do(model, monkeypatch, device, threads, lanes):
    def at_work():
        return sum(thread.name == "tilepipe-tuning" for thread in threading.enumerate())

    seen = []

    def lap(plan, batch):
        seen.append(at_work())
        if plan.input_px > 600:
            raise MemoryError
        return Trial(plan.input_px, plan.core_px, batch, 1.0)

    monkeypatch.setattr(tuning, "Contender", contenders(lap))
    _, settings = start(model)
    settings = replace(settings, device=device, threads=threads)
    plans = [(settings.plan, 1), (replace(settings.plan, input_px=380), 1)]
    tuning.measure(settings, model, plans, dtype=np.dtype(np.uint8))
    assert seen == [lanes, lanes]
    assert at_work() == 0


@pytest.mark.parametrize(
    "speeds, tried",
    [
        ({300: 1.0, 500: 2.0, 700: 3.0, 900: 4.0}, [500, 700, 900]),
        ({300: 4.0, 500: 3.0, 700: 2.0, 900: 1.0}, [500, 700, 300]),
        ({300: 1.0, 500: 3.0, 700: 2.99, 900: 4.0}, [500, 700, 300, 900]),
        ({300: 1.0, 500: 3.0, 700: 2.99, 900: 3.1}, [500, 700, 300, 900, *[500, 900] * 2]),
    ],
)
def test_what_lies_behind_a_slower_tile_is_not_tried(model, monkeypatch, speeds, tried):
    _, settings = start(model)
    settings = replace(settings, plan=replace(settings.plan, input_px=500))
    seen = []

    def lap(plan, batch):
        seen.append(plan.input_px)
        return Trial(plan.input_px, plan.core_px, batch, speeds[plan.input_px])

    monkeypatch.setattr(tuning, "Contender", contenders(lap))
    plans = [(replace(settings.plan, input_px=px), 1) for px in (500, 900, 700, 300)]
    tuning.measure(settings, model, plans, dtype=np.dtype(np.uint8))
    assert seen == tried


def test_larger_batches_do_not_use_up_the_time_of_larger_tiles(model, monkeypatch):
    _, settings = start(model)
    settings = replace(settings, device="cuda:0", plan=replace(settings.plan, input_px=500))
    now, seen = [0.0], []

    def lap(plan, batch):
        seen.append((plan.input_px, batch))
        now[0] += batch * 2.0
        return Trial(plan.input_px, plan.core_px, batch, plan.input_px / 100)

    monkeypatch.setattr(tuning, "Contender", contenders(lap))
    plans = [
        (replace(settings.plan, input_px=px), batch) for px in (300, 500, 900) for batch in (1, 2)
    ]
    tuning.measure(
        settings, model, plans, dtype=np.dtype(np.uint8), budget_s=5.0, clock=lambda: now[0]
    )
    assert seen == [(500, 1), (300, 1), (900, 1)]


@pytest.mark.parametrize(
    ("mpix_per_s", "tried"), [(100.0, [2048, 1024, 4096]), (10.0, [2048, 1024])]
)
def test_a_tile_that_a_gpu_would_take_long_for_is_not_tried(model, monkeypatch, mpix_per_s, tried):
    """In float32 one forward of a heavy network may take seconds."""
    _, settings = start(model)
    plan = replace(settings.plan, unit_px=4096, core_px=2048, input_px=2236)
    settings = replace(settings, device="cuda:0", plan=plan)
    now, seen = [0.0], []

    def lap(plan, batch):
        seen.append(plan.core_px)
        now[0] += tuning.GPU_FORWARDS * plan.core_px**2 / mpix_per_s / 1e6
        return Trial(plan.input_px, plan.core_px, batch, mpix_per_s)

    monkeypatch.setattr(tuning, "Contender", contenders(lap))
    plans = [(replace(plan, core_px=px, input_px=px + 188), 1) for px in (1024, 2048, 4096)]
    tuning.measure(settings, model, plans, dtype=np.dtype(np.uint8), clock=lambda: now[0])
    assert seen == tried


def test_one_spoilt_measurement_does_not_decide(model, monkeypatch):
    _, settings = start(model)
    # The second was disturbed at first.
    told = {380: iter([3.0] * 3), 500: iter([2.7, 3.1, 3.3])}

    def lap(plan, batch):
        return Trial(plan.input_px, plan.core_px, batch, next(told[plan.input_px]))

    monkeypatch.setattr(tuning, "Contender", contenders(lap))
    plans = [(replace(settings.plan, input_px=px), 1) for px in told]
    trials = tuning.measure(settings, model, plans, dtype=np.dtype(np.uint8))
    assert chosen(trials).input_px == 500
    assert sorted(trial.mpix_per_s for trial in trials) == [3.0, 3.3]


@pytest.mark.parametrize(
    ("device", "race_bytes", "at_once"),
    [("cpu", 1 << 30, 2), ("cpu", 1 << 20, 1), ("cuda:0", 1 << 30, 1)],
)
def test_no_more_back_ends_are_open_than_the_device_holds_and_all_are_closed(
    model, monkeypatch, device, race_bytes, at_once
):
    monkeypatch.setattr(tuning, "RACE_BYTES", race_bytes)
    _, settings = start(model)
    ready, most, laps = set(), [], []
    speeds = {380: 1.0, 444: 2.0, 572: 3.0, 700: 2.9}

    def lap(plan, batch):
        most.append(len(ready))
        laps.append(plan.input_px)
        return Trial(plan.input_px, plan.core_px, batch, speeds[plan.input_px])

    monkeypatch.setattr(tuning, "Contender", contenders(lap, ready))
    settings = replace(settings, device=device, plan=replace(settings.plan, input_px=380))
    plans = [(replace(settings.plan, input_px=px), 1) for px in speeds]
    tuning.measure(settings, model, plans, dtype=np.dtype(np.uint8))
    assert max(most) == at_once
    assert not ready
    assert laps[:4] == [380, 444, 572, 700]
    assert laps[4:] == ([572, 700] * 2 if at_once == 2 else [])


def test_a_real_measurement_of_a_small_tile(model):
    _, settings = start(model, tile=252)
    seconds = estimate_seconds(model, settings)
    assert 0 < seconds < 60


def test_memory_forecast_grows_with_the_tile_and_is_near_the_truth(model):
    per_px = memory.peak_activation_bytes(model)
    # At the widest: two maps of base channels and a concatenation of twice as many.
    assert 4 * 2 * 2 < per_px < 4 * 2 * 10
    assert memory.peak_activation_bytes(model, precision="bf16") == per_px / 2
    _, settings = start(model, tile=572)
    _, larger = start(model, tile=1196)
    assert estimate_memory(model, settings) < estimate_memory(model, larger)
    assert estimate_memory(model, replace(settings, backend="openvino")) > estimate_memory(
        model, settings
    )
    # OpenVINO has a second network for tiles of other shapes, where there are any.
    trims = replace(settings, backend="openvino", trims=True)
    plan = trims.plan
    plan = replace(plan, unit_px=4 * plan.core_px)
    same = replace(trims, plan=replace(plan, extent=(2 * plan.unit_px, plan.unit_px)))
    assert estimate_memory(model, same, skips=True) > estimate_memory(model, same)
    clipped = replace(same, plan=replace(plan, extent=(plan.unit_px, plan.unit_px + 16)))
    assert estimate_memory(model, clipped) > estimate_memory(
        model, replace(clipped, plan=replace(plan, extent=(plan.unit_px, plan.unit_px)))
    )


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("TILEPIPE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert caches.cache_folder() == tmp_path / "tilepipe"


def test_a_user_without_a_home_folder_has_no_cache(monkeypatch):
    """An id of a container or a batch system that no list of users knows."""

    def unknown(number):
        raise KeyError(number)

    monkeypatch.delenv("TILEPIPE_CACHE")
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert caches.usable_cache() is None
    caches.write_cached("x", {"a": 1})
    caches.write_blob("x", b"blob")
    assert caches.read_cached("x") is None
    assert caches.read_blob("x") is None


def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("TILEPIPE_CACHE", str(blocked / "below"))
    assert caches.usable_cache() is None
    caches.write_cached("x", {"a": 1})
    assert caches.read_cached("x") is None


def test_keep_memory_holds_freed_blocks():
    code = """
import ctypes, sys
from tilepipe.malloc import keep_memory
if not keep_memory():
    print("no glibc"); sys.exit()
import resource, numpy as np
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(64 << 20, np.uint8)
before = faults()
for _ in range(5): np.ones(64 << 20, np.uint8)
print(faults() - before)
"""
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()
    if out == "no glibc":
        pytest.skip(out)
    # 64 MiB in pages of 4 KiB, five times over, would be 81920 faults.
    assert int(out) < 8000


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_large_blocks_are_given_back_after_a_job_that_kept_them():
    code = """
import numpy as np
from tilepipe.malloc import give_large_back, keep_memory
def resident():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status")
                if line.startswith("VmRSS"))
def hole(size):
    # Freed below one that is still held: in malloc's heap it stays, and is used again if it fits.
    block, above = np.ones(size, np.uint8), np.ones(8 << 20, np.uint8)
    before = resident()
    del block
    return before - resident()
keep_memory()
kept = hole(96 << 20)
give_large_back()
print(kept, hole(160 << 20))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    kept, given_back = map(int, done.stdout.split())
    assert kept < 8 << 20
    assert given_back > 144 << 20


@pytest.mark.parametrize(
    ("limit", "stat", "free"),
    [
        (1000, "anon 300\ninactive_file 600\nactive_file 50\n", 700),
        (1000, "anon 900\n", 100),
        (800, "inactive_file 0\n", 0),
        ("max", "inactive_file 0\n", None),
    ],
)
def test_what_was_read_of_files_is_free_memory_of_a_container(
    tmp_path, monkeypatch, limit, stat, free
):
    for name, text in (("max", limit), ("current", 900), ("stat", stat)):
        (tmp_path / f"memory.{name}").write_text(f"{text}\n")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    found = memory.free_bytes()
    assert found == free if free is not None else found > 1 << 20


def test_free_bytes_is_believable():
    assert 1 << 20 < memory.free_bytes() < 1 << 50
    if torch.cuda.is_available():
        assert memory.free_bytes("cuda:0") > 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_threads_share_one_arena_where_it_is_asked_for_early():
    code = """
import ctypes, re, sys, threading
from tilepipe.malloc import one_arena
if sys.argv[1] == "early":
    assert one_arena()
libc = ctypes.CDLL(None)
def take():  # a thread's first allocation gives it its arena
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc(5000)
for _ in range(3):
    thread = threading.Thread(target=take)
    thread.start(); thread.join()
gate = threading.Barrier(4)
def hold():
    take(); gate.wait()
threads = [threading.Thread(target=hold) for _ in range(3)]
[thread.start() for thread in threads]
gate.wait()
[thread.join() for thread in threads]
libc.malloc_stats()
"""
    found = {}
    for when in ("early", "never"):
        done = subprocess.run(
            [sys.executable, "-c", code, when], capture_output=True, text=True, check=True
        )
        found[when] = done.stderr.count("Arena ")
    assert found["early"] == 1 < found["never"]


def test_what_did_not_get_into_the_cache_leaves_nothing_there(monkeypatch, tmp_path):
    def full(self, content):
        with self.open("wb") as file:
            file.write(content[:2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setenv("TILEPIPE_CACHE", str(tmp_path))
    monkeypatch.setattr(Path, "write_bytes", full)
    caches.write_blob("x", b"blob")
    assert not list(tmp_path.iterdir())
