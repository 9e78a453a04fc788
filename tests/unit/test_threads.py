"""Work of several threads comes in order, with the first error, and little of it waits."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from tilepipe.threads import several_at_once


def test_results_are_in_order_and_few_items_wait_for_who_takes_them():
    begun, taken = [], 0

    def work(item):
        begun.append(item)
        time.sleep(0.002 * (item % 3))
        return item * item

    for place, result in enumerate(several_at_once(work, range(40), at_once=3, name="t")):
        taken += 1
        time.sleep(0.005)
        assert result == place * place
        assert len(begun) <= taken + 2 * 3
    assert taken == 40


def test_as_many_as_asked_run_at_once():
    meet = threading.Barrier(4, timeout=30)
    results = several_at_once(lambda _: meet.wait(), range(8), at_once=4, name="t")
    assert sorted(results) == sorted([*range(4), *range(4)])


def test_the_first_error_in_order_is_raised_and_the_rest_is_left():
    begun, failed = [], threading.Event()

    def work(item):
        begun.append(item)
        if item == 5:
            assert failed.wait(30)
            raise ValueError("five")
        if item == 6:
            failed.set()
            raise ValueError("six")
        return item

    results, seen = several_at_once(work, range(1000), at_once=2, name="t"), []
    with pytest.raises(ValueError, match="five"):
        for result in results:
            seen.append(result)
    assert seen == [0, 1, 2, 3, 4]
    assert len(begun) < 12


def test_a_process_that_ends_does_not_wait_for_the_rest():
    script = (
        "import threading, time\n"
        "from tilepipe.threads import several_at_once\n"
        "def work(item):\n"
        "    print('begun', flush=True)\n"
        "    time.sleep(0.05)\n"
        "results = several_at_once(work, range(100000), at_once=2, name='t')\n"
        "threading.Thread(target=list, args=[results], daemon=True).start()\n"
        "time.sleep(0.2)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    assert 2 <= done.stdout.count("begun") < 1000
