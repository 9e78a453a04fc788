"""Lanes beside a network on the same processor."""

from __future__ import annotations

import os
import threading

import pytest

from tilepipe.pipeline.worker import _give_way

linux = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="priorities per thread")


def priority_after(*settings):
    """Priority of a fresh thread after it gave way under each of the settings."""
    found = []

    def lane():
        for one in settings:
            _give_way(one)
        found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    thread = threading.Thread(target=lane)
    thread.start()
    thread.join()
    return found[0]


@linux
def test_a_lane_gives_way_to_a_network_on_the_same_processor():
    here = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    assert priority_after({"device": "cpu"}, {"device": "cpu"}) == max(here, 10)
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == here


@linux
def test_a_lane_beside_a_gpu_keeps_its_place():
    here = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    assert priority_after({"device": "cuda:0"}) == here
