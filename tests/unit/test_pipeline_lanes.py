"""Lanes beside a network on the same processor."""

from __future__ import annotations

import os
import threading

import pytest

from tilepipe.pipeline import lanes
from tilepipe.pipeline.lanes import SLACK_BYTES, Memory, give_way, recent_bytes, slack_bytes
from tilepipe.spec import JobSpec

linux = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="priorities per thread")


def priorities_after(settings, *names):
    """Priorities of threads with these names after the lanes gave way under the settings."""
    over = threading.Event()
    threads = [threading.Thread(target=over.wait, name=name) for name in names]
    try:
        for thread in threads:
            thread.start()
        give_way(settings)
        give_way(settings)
        return [os.getpriority(os.PRIO_PROCESS, thread.native_id) for thread in threads]
    finally:
        over.set()
        for thread in threads:
            thread.join()


@linux
def test_lanes_give_way_to_a_network_on_the_same_processor():
    here = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    lane, codec, device = priorities_after(
        {"device": "cpu"}, "0-Dask-Default-Threads-1-0", "zarr_io", "tilepipe-device_0"
    )
    assert (lane, codec) == (max(here, 10), max(here, 10))
    assert device == here
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == here


@linux
def test_lanes_beside_a_gpu_keep_their_place():
    here = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    assert priorities_after({"device": "cuda:0"}, "zarr_io") == [here]


def test_memory_goes_back_when_more_gathered_than_a_forward_takes(monkeypatch):
    resident, trims = [100 << 20], []

    class Libc:
        @staticmethod
        def malloc_trim(pad):
            trims.append(pad)
            resident[0] = 110 << 20

    monkeypatch.setattr(lanes.ctypes, "CDLL", lambda _: Libc)
    monkeypatch.setattr(Memory, "_resident", staticmethod(lambda: resident[0]))
    memory = Memory()
    memory.give_back(SLACK_BYTES)
    assert len(trims) == 1, "the first look sets the floor"
    resident[0] += SLACK_BYTES
    memory.give_back(SLACK_BYTES)
    assert len(trims) == 1
    resident[0] += 50 << 20
    memory.give_back(slack_bytes(JobSpec(), 50 << 20))
    assert len(trims) == 1, "what the next forward takes again stays"
    memory.give_back(SLACK_BYTES)
    assert len(trims) == 2


def test_worker_processes_share_what_one_keeps():
    assert recent_bytes(JobSpec(workers=4)) * 4 == recent_bytes(JobSpec())
    one, four = (slack_bytes(JobSpec(workers=n), 1 << 30) - SLACK_BYTES for n in (None, 4))
    assert one == 4 * four == 2 << 30
