"""What lanes beside a network may keep of memory."""

from __future__ import annotations

from tilepipe.pipeline import lanes
from tilepipe.pipeline.lanes import SLACK_BYTES, Memory, recent_bytes, slack_bytes
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
