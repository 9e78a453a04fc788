"""Units are checked beside each other, as many as memory allows; the first that is wrong counts."""

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest

from tilepipe.errors import VerifyError
from tilepipe.infer import checks
from tilepipe.steps import Count
from tilepipe.tiling import Grid


def level_of(*, lead=(3,), unit_px=10, dtype=np.uint8):
    return SimpleNamespace(
        grid=Grid((100, 55), unit_px), lead=lead, unit_px=unit_px, dtype=np.dtype(dtype)
    )


@pytest.mark.parametrize(
    ("level", "most"),
    [
        (level_of(), 4),
        (level_of(lead=(), dtype=np.int32), 4),
        (level_of(lead=(40,), dtype=np.float32), 3),
        (level_of(lead=(400,), dtype=np.float32), 1),
    ],
)
def test_as_many_at_once_as_memory_allows_and_every_unit_once(monkeypatch, level, most):
    monkeypatch.setattr(checks, "cores", lambda: 8)
    monkeypatch.setattr(checks, "_AT_ONCE_BYTES", 5 * 40 * 4 * 10 * 10 * 3)
    lock, seen, running, peak = threading.Lock(), [], [0], [0]

    def check(unit):
        with lock:
            running[0] += 1
            peak[0] = max(peak[0], running[0])
        time.sleep(0.002)
        with lock:
            running[0] -= 1
            seen.append((unit.iy, unit.ix))

    told = []
    checks._check_units(level, check, Count(lambda *facts: told.append(facts), "it", 5500))
    assert sorted(seen) == [(iy, ix) for iy in range(10) for ix in range(6)]
    assert peak[0] == most
    assert told[-1] == ("it", 5500, 5500)


def test_the_first_that_is_wrong_is_told_and_the_rest_is_left(monkeypatch):
    monkeypatch.setattr(checks, "cores", lambda: 8)
    seen = []

    def check(unit):
        seen.append(unit.ix)
        if (unit.iy, unit.ix) == (1, 0):
            time.sleep(0.1)  # the second that is wrong is found earlier
        if (unit.iy, unit.ix) in ((1, 0), (1, 1)):
            raise VerifyError(f"unit ({unit.iy}, {unit.ix})")

    told = []
    count = Count(lambda *facts: told.append(facts), "it", 5500)
    with pytest.raises(VerifyError, match=r"unit \(1, 0\)"):
        checks._check_units(level_of(), check, count)
    assert told[-1][1] == 550
    assert len(seen) < 20
