"""One at a time at a place that several machines write, and what becomes of a dead one's lease."""

import json
import subprocess
import sys
import threading
import time

import pytest

from tilepipe.errors import StoreError
from tilepipe.store import lease
from tilepipe.store.files import LocalFiles
from tilepipe.store.lease import Patience, leased

QUICK = Patience(look_s=0.01, stale_s=0.4)


@pytest.fixture
def place(tmp_path):
    return str(tmp_path / "out.zarr")


@pytest.fixture(autouse=True)
def renewed_often(monkeypatch):
    monkeypatch.setattr(lease, "RENEWED_S", 0.05)


def left_behind(place, token="of the dead"):
    files = LocalFiles(f"{place}.preparing")
    files.put("lease.json", json.dumps({"token": token, "host": "node7", "pid": 42}).encode())
    return files


def in_turns(place, count, *, stay_s):
    """Return the most that held it at once, of ``count`` threads, and how many did in all."""
    inside, most, done, lock = 0, 0, 0, threading.Lock()

    def work():
        nonlocal inside, most, done
        with leased(place, patience=QUICK):
            with lock:
                inside += 1
                most = max(most, inside)
            time.sleep(stay_s)
            with lock:
                inside -= 1
                done += 1

    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return most, done


def test_one_at_a_time_and_nothing_stays(place, tmp_path):
    assert in_turns(place, 12, stay_s=0.005) == (1, 12)
    assert not list(tmp_path.iterdir())


def test_who_is_alive_is_waited_for_however_long(place):
    """Longer than a lease may be old: it is renewed."""
    assert in_turns(place, 3, stay_s=3 * QUICK.stale_s) == (1, 3)


def test_a_dead_ones_lease_is_taken_over_by_one(place, tmp_path):
    left_behind(place)
    assert in_turns(place, 8, stay_s=0.02) == (1, 8)
    assert not list(tmp_path.iterdir())


HOLDER = """
import sys, time
from tilepipe.store.lease import leased
with leased(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_process_of_this_machine_that_was_killed_is_not_waited_for(place, tmp_path):
    """A part that is killed while it prepares, and given again by its batch system."""
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, place], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    assert not lease._is_of_the_dead(LocalFiles(f"{place}.preparing").get("lease.json"))
    holder.kill()
    holder.wait()
    holder.stdout.close()
    started_s = time.monotonic()
    with leased(place):
        assert time.monotonic() - started_s < lease.STALE_S / 6
    assert not list(tmp_path.iterdir())


def test_who_has_it_is_told_once(place):
    left_behind(place)
    told = []
    with leased(place, on_wait=told.append, patience=QUICK):
        assert told == ["process 42 of node7"]


def test_one_that_cannot_be_taken_over_is_an_error_and_not_a_wait_for_ever(place):
    """Whoever wanted to take it over died, too."""
    files = left_behind(place)
    over = []
    real = files.claim

    def claim(key, value):
        over.append(key)
        return real(key, value)

    files.claim = claim
    raw = files.get("lease.json")
    lease._take_over(files, raw + b"another by now", "me")
    right = next(key for key in over if key.startswith("over-"))
    assert files.get(right) is None, "the right is given back"
    lease._take_over(files, raw, "me")
    files.put("lease.json", raw)
    files.claim(over[-1], b"")
    with (
        pytest.raises(StoreError, match="left there by process 42 of node7; remove it"),
        leased(place, patience=QUICK),
    ):
        pytest.fail("two may be in it")


def test_what_is_no_lease_is_taken_over_too(place):
    LocalFiles(f"{place}.preparing").put("lease.json", b"\x00[" * 50)
    assert in_turns(place, 2, stay_s=0) == (1, 2)


def test_a_claim_whose_answer_was_lost_counts(place, monkeypatch):
    """The client sends it again, and is told that something is there: its own."""
    real = LocalFiles.claim

    def claim(self, key, value):
        real(self, key, value)
        return real(self, key, value)

    monkeypatch.setattr(LocalFiles, "claim", claim)
    assert in_turns(place, 3, stay_s=0.01) == (1, 3)


def test_a_lease_that_another_took_is_left_to_it(place):
    """A machine that slept too long must not end the work of the one that took over."""
    with leased(place, patience=QUICK) as check:
        check()
        files = left_behind(place, token="of the next")
        time.sleep(0.2)
        assert b"of the next" in files.get("lease.json")
        with pytest.raises(StoreError, match="another process took over there"):
            check()
    assert b"of the next" in files.get("lease.json")


def test_no_room_for_a_lease_is_an_error_at_once(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match=r"cannot write lease\.json"), leased(f"{tmp_path}/file/x"):
        pytest.fail("it is not held")
