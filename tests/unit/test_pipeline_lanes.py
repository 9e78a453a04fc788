"""Lanes beside a network on the same processor."""

from __future__ import annotations

import os
import threading

import pytest

from tilepipe.pipeline.lanes import give_way

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
