"""Torn files, a clock that jumps, a slide that shrinks while it is read."""

import os
import random
import shutil
import time
from pathlib import Path

import pytest
import tifffile

from tilepipe.errors import MismatchError, StoreError, TilepipeError, UnitsFailedError


@pytest.fixture
def store(job, slide, reference, tmp_path):
    store = tmp_path / "out.zarr"
    job(slide, store)
    return store


def tear(path, how):
    raw = path.read_bytes()
    if how == "empty":
        path.write_bytes(b"")
    elif how == "half":
        path.write_bytes(raw[: len(raw) // 2])
    elif how == "noise":
        path.write_bytes(random.Random(len(raw)).randbytes(len(raw)))
    elif how == "zeros":
        path.write_bytes(b"\0" * len(raw))


@pytest.mark.parametrize("how", ["empty", "half", "noise", "zeros"])
def test_torn_records_are_not_believed_and_their_units_done_again(store, job, slide, right, how):
    records = sorted((store / "tilepipe" / "journal" / "unet").rglob("*.json"))
    assert len(records) >= 4
    for path in records:
        tear(path, how)
    told = []
    job(slide, store, on_event=lambda event: told.append(getattr(event, "text", "")))
    assert sum("not believed" in text for text in told) == len(records)
    right(store)


@pytest.mark.parametrize("how", ["half", "noise"])
def test_torn_metadata_is_a_clear_error_and_made_anew_on_request(store, job, slide, right, how):
    files = sorted(store.rglob("zarr.json"))
    assert len(files) >= 5
    for path in files:
        shutil.copy2(path, path.with_suffix(".kept"))
        tear(path, how)
        try:
            job(slide, store)
        except TilepipeError as error:
            assert str(store) in str(error)  # noqa: PT017
        shutil.move(path.with_suffix(".kept"), path)
    job(slide, store)
    right(store)


def test_a_torn_shard_of_the_image_stops_what_reads_it_with_its_place(store, job, slide):
    shard = max((store / "0" / "c").rglob("0"), key=lambda path: path.stat().st_size)
    whole = shard.read_bytes()
    tear(shard, "half")
    with pytest.raises(UnitsFailedError, match=r"array 0 cannot be read at .* damaged") as told:
        job(slide, store, name="second")
    assert "same command tries these again" in str(told.value)
    shard.write_bytes(whole)
    job(slide, store, name="second")
    masks = sorted((store / "labels" / "unet").rglob("c/*/*"))
    assert len(masks) == 4
    for path in masks:
        twin = store / "labels" / "second" / path.relative_to(store / "labels" / "unet")
        assert path.read_bytes() == twin.read_bytes()


def test_a_clock_that_jumps(job, slide, right, tmp_path, monkeypatch):
    """NTP, a sleeping laptop, a wrong time zone: a day forth and back at every look of ours."""
    chance, jumps = random.Random(8), []

    class Jumping:
        def __getattr__(self, name):
            return getattr(time, name)

        def time(self):
            jumps.append(chance.choice([-1, 0, 1]) * chance.uniform(0, 90_000))
            return time.time() + jumps[-1]

    import tilepipe.pipeline.mask
    import tilepipe.pipeline.work
    import tilepipe.pipeline.worker
    import tilepipe.store.partial

    for room in (
        tilepipe.pipeline.mask,
        tilepipe.pipeline.work,
        tilepipe.pipeline.worker,
        tilepipe.store.partial,
    ):
        monkeypatch.setattr(room, "time", Jumping())
    store = tmp_path / "out.zarr"
    job(slide, store)
    right(store)
    assert len(jumps) >= 8


def before_read(monkeypatch, path, after, happens):
    """Let something happen to a slide before its pixels are read for the ``after + 1``th time."""
    real, reads = os.pread, []

    def pread(handle, count, offset):
        if Path(f"/proc/self/fd/{handle}").resolve() == path and offset > 4096:
            reads.append(offset)
            if len(reads) == after + 1:
                happens()
        return real(handle, count, offset)

    monkeypatch.setattr(os, "pread", pread)


@pytest.mark.parametrize("after", [0, 1, 3, 5])
def test_a_slide_cut_off_while_it_is_read(job, slide, right, tmp_path, monkeypatch, after):
    copy, store = tmp_path / "slide.tif", tmp_path / "out.zarr"
    shutil.copy2(slide, copy)
    facts = copy.stat()
    whole = copy.read_bytes()
    before_read(monkeypatch, copy, after, lambda: os.truncate(copy, 5000))
    with pytest.raises((UnitsFailedError, StoreError, TilepipeError)) as told:
        job(copy, store)
    assert str(copy) in str(told.value)
    monkeypatch.undo()
    # As it lies there it is another input, or none at all.
    with pytest.raises(TilepipeError) as refused:
        job(copy, store)
    if isinstance(refused.value, MismatchError):
        assert "--overwrite" in str(refused.value)
    assert str(copy) in str(refused.value) or str(store) in str(refused.value)
    # Restored, the job goes on with what was done.
    copy.write_bytes(whole)
    os.utime(copy, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    job(copy, store)
    right(store)


@pytest.mark.parametrize("after", [1, 5])
def test_a_slide_written_over_while_it_is_read(job, slide, right, tmp_path, monkeypatch, after):
    """A copy that is not finished, say: units are of the one file or none, and it is told."""
    copy, store = tmp_path / "slide.tif", tmp_path / "out.zarr"
    shutil.copy2(slide, copy)
    facts = copy.stat()
    whole = copy.read_bytes()

    def write_again():  # the second half, where it lay: same size
        with copy.open("r+b") as stream:
            stream.seek(len(whole) // 2)
            stream.write(whole[len(whole) // 2 :])

    before_read(monkeypatch, copy, after, write_again)
    with pytest.raises(TilepipeError, match="was changed by another program while it was read"):
        job(copy, store)
    monkeypatch.undo()
    os.utime(copy, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    job(copy, store)
    right(store)


def test_a_slide_replaced_before_a_worker_opens_it(job, slide, right, tmp_path, monkeypatch):
    import tilepipe.pipeline.context as room

    copy, store = tmp_path / "slide.tif", tmp_path / "out.zarr"
    shutil.copy2(slide, copy)
    other = tifffile.imread(slide)[::-1]
    opened = room.open_slide

    def replaced(*args, **settings):
        tifffile.imwrite(tmp_path / "new.tif", other, tile=(64, 64), photometric="rgb")
        (tmp_path / "new.tif").replace(copy)
        return opened(*args, **settings)

    monkeypatch.setattr(room, "open_slide", replaced)
    with pytest.raises(TilepipeError, match="is another file than the one that this job was"):
        job(copy, store)
    monkeypatch.undo()
    # A copy with a time of its own is the same input to a worker.
    shutil.copy2(slide, copy)

    def touched(*args, **settings):
        os.utime(copy, (1, 1))
        return opened(*args, **settings)

    monkeypatch.setattr(room, "open_slide", touched)
    job(copy, store)
    right(store)
