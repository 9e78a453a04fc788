"""Locks on an output: one writer at a time, and nothing is left of them."""

import tempfile
import threading
import time

import pytest

from tilepipe.errors import StoreError
from tilepipe.pipeline.output import exclusive, running


@pytest.fixture
def lock_files(tmp_path, monkeypatch):
    """Return a function that lists the lock files there are."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return lambda: sorted(path.name for path in tmp_path.glob("tilepipe-*/*"))


def test_the_last_lock_takes_its_file_along(lock_files):
    for number in range(20):
        store = f"slide{number}.zarr"
        with exclusive(store, "the image"), running(store) as sole:
            assert sole
            with running(store) as other:
                assert not other
            assert len(lock_files()) == 2
    assert lock_files() == []


def test_a_lock_that_fails_leaves_the_others_alone(lock_files):
    with exclusive("slide.zarr", "the image"):
        for _ in range(2):
            with (
                pytest.raises(StoreError, match="another tilepipe"),
                exclusive("slide.zarr", "the image"),
            ):
                pass
        assert len(lock_files()) == 1
    assert lock_files() == []


def test_one_at_a_time_whoever_takes_the_file_away(lock_files):
    inside: list[int] = []
    holders: list[int] = []
    wrong: list[str] = []

    def prepare(number):
        for _ in range(60):
            with exclusive("slide.zarr", "preparation", wait=True):
                inside.append(number)
                time.sleep(0)
                if inside != [number]:
                    wrong.append(f"{inside} at once")
                inside.remove(number)

    def write(number):
        for _ in range(60):
            with exclusive("slide.zarr", "start", wait=True):
                held = running("slide.zarr")
                sole = held.__enter__()
                holders.append(number)
                if sole and holders != [number]:
                    wrong.append(f"{number} of {holders} is told that it is alone")
            time.sleep(0)
            holders.remove(number)
            held.__exit__(None, None, None)

    threads = [threading.Thread(target=do, args=(n,)) for n in range(6) for do in (prepare, write)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    with running("slide.zarr"):  # the last two may have left it to each other
        pass
    assert lock_files() == []
