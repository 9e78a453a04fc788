"""A disk that fails at the k-th write, for every k: right in the end, or a clear error to go on
from. Each fault ends in one of the two; none is lost.
"""

import errno
import itertools

import pytest

from tilepipe.errors import TilepipeError

KINDS = ("open", "write", "fsync", "replace")


def count_writes(faults, job, slide, store):
    faults.arm("open", -1, lasting=False, number=errno.EIO)
    job(slide, store)
    return faults.writes


def attempt(faults, job, slide, store, right, looks_done, kind, k, *, lasting, number):
    """Run into one fault, then once more without; return how many faults were injected."""
    faults.arm(kind, k, lasting=lasting, number=number)
    try:
        job(slide, store)
    except TilepipeError as error:
        told = str(error)
        assert str(store) in told
        assert "same command" in told or "--overwrite" in told or "choose another" in told
        assert not looks_done(store) or kind == "replace" or lasting
        injected = faults.disarm()
        job(slide, store)
    else:
        injected = faults.disarm()
    right(store)
    return injected


def campaign(faults, job, slide, folder, right, looks_done, cases):
    injected = 0
    for number, (kind, k, lasting, code) in enumerate(cases):
        found = attempt(
            faults, job, slide, folder / f"{number}.zarr", right, looks_done, kind, k,
            lasting=lasting, number=code,
        )  # fmt: skip
        # fsync is for what must be on the disk; other writes have none to fail.
        assert found >= 1
        injected += found
    return injected


def cases_of(writes, *, every, start=0):
    """Every step of every write once, in turn: a passing fault and a lasting one."""
    whole = itertools.product(range(1, writes + 1), KINDS, (False, True))
    for place, (k, kind, lasting) in enumerate(whole):
        if place % every == start:
            yield kind, k, lasting, errno.ENOSPC if (k + lasting) % 2 else errno.EIO


def test_a_disk_that_fails_now_and_then(faults, job, slide, right, looks_done, tmp_path):
    writes = count_writes(faults, job, slide, tmp_path / "count.zarr")
    cases = list(cases_of(writes, every=23))
    assert {case[0] for case in cases} == set(KINDS)
    injected = campaign(faults, job, slide, tmp_path, right, looks_done, cases)
    assert injected >= 10


@pytest.mark.slow
def test_a_disk_that_fails_at_every_write(faults, job, slide, right, looks_done, tmp_path, capsys):
    writes = count_writes(faults, job, slide, tmp_path / "count.zarr")
    cases = list(cases_of(writes, every=1))
    injected = campaign(faults, job, slide, tmp_path, right, looks_done, cases)
    with capsys.disabled():
        print(f"\n{len(cases)} runs, {injected} faults injected at {writes} writes, none lost")
    assert injected >= 100
