"""The queue before a device: order, no gap between units, and what one unit's failure leaves."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from tilepipe.infer.account import Account
from tilepipe.infer.backends import BatchResult
from tilepipe.infer.device import DeviceQueue, UnitJob
from tilepipe.infer.maps import Maps
from tilepipe.tiling import Box, Tile

BOX = Box(0, 0, 1, 1)
TILE = Tile(core=BOX, padded=BOX)


@dataclass
class Fake:
    """A back-end whose results are its inputs; it remembers what was under way."""

    depth: int = 2
    name: str = "fake"
    precision: str = "fp32"
    result_device: str = "cpu"
    under_way: list[int] = field(default_factory=list)
    before_submit: list[list[int]] = field(default_factory=list)
    submitted: list[int] = field(default_factory=list)
    fails_at: tuple[int, ...] = ()
    closed: bool = False
    done: threading.Event | None = None
    """Nothing is computed before it is set; None: all at once."""

    def submit(self, tiles, account):
        assert not self.closed
        self.before_submit.append(list(self.under_way))
        value = int(tiles[0][0, 0, 0])
        self.under_way.append(value)
        self.submitted.append(value)
        assert len(self.under_way) <= self.depth
        return value

    def is_done(self, ticket, *, within_s):
        assert ticket == self.under_way[0]
        if ticket in self.fails_at:
            raise RuntimeError("told when it is collected")
        return self.done is None or self.done.wait(within_s)

    def collect(self, ticket, account):
        assert self.under_way.pop(0) == ticket
        if ticket in self.fails_at:
            raise RuntimeError(f"{ticket}: " + ("out of memory" if ticket >= 90 else "broken"))
        return BatchResult(torch.full((1, 1, 1), ticket, dtype=torch.uint8), finite=True)

    def close(self):
        self.closed = True


def nothing() -> None:
    pass


def job(backend, values, into, give_back=nothing):
    """A unit of one batch for each value; its result is how many came."""

    def put(tiles, result):
        into.append(int(result.values[0, 0, 0]))

    batches = (([TILE], [np.full((1, 1, 1), value, np.uint8)]) for value in values)
    return UnitJob(
        backend=backend,
        batches=batches,
        put=put,
        result=lambda: Maps(BOX, np.array([[len(into)]]), None),
        give_back=give_back,
        account=Account(),
    )


def run(units):
    """Queue all units, or what makes them, before the first begins; each one's count or error."""
    queue = DeviceQueue()
    go = threading.Event()
    first = queue.call(go.wait, 20)
    outcomes = [queue.submit(unit if callable(unit) else lambda unit=unit: unit) for unit in units]
    go.set()
    assert first.result()
    errors = [outcome.exception(timeout=20) for outcome in outcomes]
    queue.close()
    return [error or int(outcomes[n].result().ids[0, 0]) for n, error in enumerate(errors)]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_unit_follows_while_the_last_batches_of_the_one_before_are_under_way(depth):
    fake, into = Fake(depth=depth), [[], []]
    done = run([job(fake, (1, 2, 3), into[0]), job(fake, (11, 12, 13), into[1])])
    assert into == [[1, 2, 3], [11, 12, 13]]
    assert done == [3, 3]
    # All but the first find the others there: nothing was drained between the units.
    assert [len(before) for before in fake.before_submit] == [min(n, depth - 1) for n in range(6)]


def test_a_unit_that_comes_while_one_is_computed_does_not_wait_for_it():
    fake, into = Fake(depth=3, done=threading.Event()), [[], []]
    queue, second = DeviceQueue(), threading.Event()
    submit = fake.submit

    def watched(tiles, account):
        ticket = submit(tiles, account)
        if ticket == 11:
            second.set()
        return ticket

    fake.submit = watched
    units = [queue.submit(lambda: job(fake, (1,), into[0]))]
    deadline_s = time.monotonic() + 20
    while not fake.under_way and time.monotonic() < deadline_s:
        time.sleep(0.01)
    units.append(queue.submit(lambda: job(fake, (11,), into[1])))
    # Both are under way before the first is done: no stream of the device is idle.
    assert second.wait(20)
    assert fake.under_way == [1, 11]
    fake.done.set()
    assert [unit.result(20).ids[0, 0] for unit in units] == [1, 1]
    assert into == [[1], [11]]
    queue.close()


def test_a_unit_of_another_backend_waits_until_nothing_is_under_way():
    one, two, into = Fake(), Fake(), [[], []]

    def other():
        assert len(one.under_way) == 1  # made early: what takes long to build is built meanwhile
        return job(two, (11,), into[1])

    queue = DeviceQueue()
    go = threading.Event()
    queue.call(go.wait, 20)
    first = queue.submit(lambda: job(one, (1, 2), into[0]))
    second = queue.submit(other)
    submit = two.submit

    def watched(tiles, account):
        assert not one.under_way
        return submit(tiles, account)

    two.submit = watched
    go.set()
    assert first.result(20).ids[0, 0] == 2
    assert second.result(20).ids[0, 0] == 1
    queue.close()


def test_what_else_needs_the_device_has_it_alone():
    fake, into = Fake(depth=3), []
    queue = DeviceQueue()
    go = threading.Event()
    queue.call(go.wait, 20)
    unit = queue.submit(lambda: job(fake, (1, 2), into))
    alone = queue.call(lambda: list(fake.under_way))
    after = queue.submit(lambda: job(fake, (3,), []))
    go.set()
    assert alone.result(20) == []
    assert unit.result(20).ids[0, 0] == 2
    assert after.result(20).ids[0, 0] == 1
    queue.close()


@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_one_units_failure_is_not_the_others(fails_at):
    fake, into = Fake(fails_at=(fails_at,)), [[], []]
    done = run([job(fake, (1, 2, 3), into[0]), job(fake, (11, 12, 13), into[1])])
    assert str(done[0]) == f"{fails_at}: broken"
    assert done[1] == 3
    assert into == [list(range(1, fails_at)), [11, 12, 13]]
    assert not fake.under_way
    # Nothing more of it is begun.
    assert (3 in fake.submitted) == (fails_at > 1)


def test_the_first_of_a_units_failures_is_told():
    fake, into = Fake(depth=3, fails_at=(1, 2)), []
    done = run([job(fake, (1, 2, 3, 4), into)])
    assert str(done[0]) == "1: broken"
    assert into == []


def test_a_unit_that_cannot_be_made_or_closed_tells_its_own_lane():
    fake, into = Fake(), [[], []]

    def unmade():
        raise ValueError("no such back-end")

    def unclosed():
        raise ArithmeticError("not finite")

    queue = DeviceQueue()
    bad = queue.submit(unmade)
    last = job(fake, (1,), into[0])
    odd = queue.submit(lambda: replace(last, result=unclosed))
    good = queue.submit(lambda: job(fake, (11,), into[1]))
    with pytest.raises(ValueError, match="no such back-end"):
        bad.result(20)
    with pytest.raises(ArithmeticError, match="not finite"):
        odd.result(20)
    assert good.result(20).ids[0, 0] == 1
    queue.close()


@pytest.mark.parametrize("fails_at", [91, 92, 93])
def test_memory_is_given_back_when_nothing_is_under_way_and_nobody_goes_on(fails_at):
    fake, into, given = Fake(depth=3, fails_at=(fails_at,)), [[], []], []

    def give_back():
        given.append(list(fake.under_way))
        fake.close()

    def other():
        return job(Fake(depth=3) if fake.closed else fake, (11, 12, 13, 14), into[1], give_back)

    done = run([job(fake, (91, 92, 93), into[0], give_back), other])
    assert given == [[]]
    assert str(done[0]) == f"{fails_at}: out of memory"
    if fails_at == 91:  # before the other began
        assert done[1] == 4
    else:  # it was on the same back-end: it is told the same, and may be run anew
        assert done[1] is done[0]
