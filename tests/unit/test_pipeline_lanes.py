"""What lanes beside a network may keep of memory."""

from __future__ import annotations

from types import SimpleNamespace

from tilepipe.pipeline import lanes
from tilepipe.pipeline.lanes import (
    MOST_LANES,
    SLACK_BYTES,
    Memory,
    lanes_of,
    recent_bytes,
    slack_bytes,
)
from tilepipe.schedule.local import LANES
from tilepipe.spec import JobSpec


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


def settings_on(device):
    return SimpleNamespace(device=device)


def test_a_gpu_gets_as_many_lanes_as_its_process_has_cores(monkeypatch):
    monkeypatch.setattr("tilepipe.pipeline.lanes.cores", lambda: 16)
    gpu = settings_on("cuda:0")
    assert lanes_of(JobSpec(), gpu) == MOST_LANES
    assert lanes_of(JobSpec(gpus="0,1"), gpu) == 8
    assert lanes_of(JobSpec(workers=4), gpu) == 4
    monkeypatch.setattr("tilepipe.pipeline.lanes.cores", lambda: 2)
    assert lanes_of(JobSpec(), gpu) == LANES
    assert lanes_of(JobSpec(), settings_on("cpu")) == lanes_of(JobSpec(), None) == LANES


def test_more_lanes_keep_more_units_and_more_freed_memory():
    assert recent_bytes(JobSpec(), 4 * LANES) == 4 * recent_bytes(JobSpec())
    assert slack_bytes(JobSpec(), 0, 4 * LANES) == 4 * slack_bytes(JobSpec(), 0)
