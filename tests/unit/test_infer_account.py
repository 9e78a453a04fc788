"""The account: seconds per step, nested spans, shares that add up."""

from __future__ import annotations

import json
import threading

import pytest

from tilepipe.infer.account import Account, account_json, merge_seconds


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_span_counts_own_time_only():
    clock = Clock()
    account = Account(clock=clock)
    with account.span("read"):
        clock.now += 1.0
        with account.span("decode"):
            clock.now += 2.0
        clock.now += 0.5
    assert account.seconds == {"read": 1.5, "decode": 2.0}


def test_nesting_is_seen_across_accounts_and_parents_get_the_same():
    clock = Clock()
    worker = Account(clock=clock)
    unit = Account(clock=clock, parent=worker)
    with unit.span("read"):
        clock.now += 1.0
        with worker.span("decode"):
            clock.now += 3.0
    assert unit.seconds == {"read": 1.0}
    assert worker.seconds == {"read": 1.0, "decode": 3.0}


def test_a_span_that_raises_is_counted_and_leaves_no_trace_in_the_stack():
    clock = Clock()
    account = Account(clock=clock)
    with pytest.raises(ValueError, match="no"), account.span("write"):
        clock.now += 2.0
        raise ValueError("no")
    with account.span("read"):
        clock.now += 1.0
    assert account.seconds == {"write": 2.0, "read": 1.0}


def test_shares_add_up_to_100():
    found = account_json({"read": 1.0, "compute": 5.0, "odd": 1.0}, wall_s=10.0, lanes=2)
    assert found["seconds"]["idle"] == 13.0
    assert sum(found["shares"].values()) == pytest.approx(100.0, abs=0.01)
    assert found["shares"]["compute"] == 25.0
    assert list(found["seconds"]) == ["read", "compute", "odd", "idle"]
    json.dumps(found)


def test_more_seconds_than_there_were_show_as_more_than_100():
    found = account_json({"compute": 30.0}, wall_s=10.0, lanes=2)
    assert found["seconds"]["idle"] == 0.0
    assert sum(found["shares"].values()) == pytest.approx(150.0)


def test_no_time_at_all():
    assert account_json({}, wall_s=0.0, lanes=1)["shares"] == {"idle": 0.0}


def test_merge_adds_and_drops_idle():
    assert merge_seconds([{"read": 1.0, "idle": 9.0}, {"read": 2.0, "write": 1.0}]) == {
        "read": 3.0,
        "write": 1.0,
    }


def test_threads_lose_nothing():
    account = Account()

    def work() -> None:
        for _ in range(200):
            account.add("compute", 0.5)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert account.seconds["compute"] == 8 * 200 * 0.5
