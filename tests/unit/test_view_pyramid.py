"""What is shown while a job writes: only recorded units, coarse levels made up from finer ones."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from tilepipe.spec import default_classes
from tilepipe.store import create_store, reduce_label
from tilepipe.tiling import Box
from tilepipe.view.cache import ByteLRU
from tilepipe.view.objects import find_object
from tilepipe.view.render import Window, compose_rgb, parse_windows, to_gzip
from tilepipe.view.source import Source
from tilepipe.view.units import tracker_of

SIDE, UNIT = 2100, 512
MARK = "f" * 16


@pytest.fixture
def running(tmp_path):
    store = create_store(
        str(tmp_path / "job.zarr"),
        channels=1,
        dtype="uint8",
        extent=(SIDE, SIDE),
        mpp=None,
        channel_names=("grey",),
        channel_colors=(None,),
        rgb=False,
        unit_px=UNIT,
    )
    label = store.create_label("unet", classes=default_classes(4), unit_px=UNIT)
    label.write_record({"state": "running", "fingerprint": MARK})
    rng = np.random.default_rng(0)
    mask = np.kron(rng.integers(1, 4, (66, 66)), np.ones((32, 32)))[:SIDE, :SIDE].astype(np.uint8)
    return store, label, mask


def write(store, label, mask, level, iy, ix, *, record=True):
    target = label.level(level)
    unit = target.grid.unit(iy, ix)
    checksum = target.write_unit(unit, np.ascontiguousarray(mask[unit.box.slices]))
    if record:
        stage = "label-reduce" if level else "segment"
        store.journal("unet", MARK).write(stage, level, unit, checksum=checksum)
    return unit.box


def look(source):
    source._looked = 0
    source.look()
    return source.labels[0].pyramid


def test_units_appear_when_they_are_recorded(running):
    store, label, mask = running
    source = Source(store.location, ByteLRU(64 << 20))
    pyramid = look(source)
    whole = Box(0, 0, SIDE, SIDE)
    assert not pyramid.read(0, whole).any()

    box = write(store, label, mask, 0, 1, 2, record=False)
    assert not look(source).read(0, whole).any(), "written but not recorded"
    before = source.progress(0)
    box = write(store, label, mask, 0, 1, 2)
    wanted = np.zeros_like(mask)
    wanted[box.slices] = mask[box.slices]
    assert np.array_equal(look(source).read(0, whole), wanted)

    told = source.progress(before["seq"])
    assert [one[1:3] for one in told["changed"]] == [["0", 0]]
    assert told["changed"][0][3:] == [box.y0, box.x0, box.y1, box.x1]
    assert told["labels"][0]["done_units"] == [[1, 2]]
    assert not told["complete"]
    assert source.progress(told["seq"])["changed"] == []


def test_coarse_levels_show_what_the_finer_ones_have(running):
    store, label, mask = running
    source = Source(store.location, ByteLRU(64 << 20))
    write(store, label, mask, 0, 0, 0)
    write(store, label, mask, 0, 4, 4)
    pyramid = look(source)
    for level in range(1, label.n_levels):
        shape = label.level(level).shape
        shown = pyramid.read(level, Box(0, 0, *shape))
        step = 1 << level
        wanted = np.zeros_like(mask)
        wanted[:UNIT, :UNIT] = mask[:UNIT, :UNIT]
        wanted[4 * UNIT :, 4 * UNIT :] = mask[4 * UNIT :, 4 * UNIT :]
        assert np.array_equal(shown, wanted[::step, ::step])
    coarse = reduce_label(mask)
    write(store, label, coarse, 1, 0, 0)
    assert np.array_equal(look(source).read(1, Box(0, 0, 512, 512)), coarse[:512, :512])


def test_a_new_label_is_described_again(running):
    store, _, _ = running
    source = Source(store.location, ByteLRU(1 << 20))
    generation = source.generation
    store.create_label("second", classes=default_classes(2), unit_px=UNIT)
    look(source)
    assert source.generation == generation + 1
    assert [one["name"] for one in source.describe()["labels"]] == ["unet", "second"]


def test_what_is_read_while_the_journal_is_looked_at_is_not_kept_as_all_there_is(running):
    store, label, mask = running
    source = Source(store.location, ByteLRU(64 << 20))
    pyramid = look(source)
    whole = Box(0, 0, SIDE, SIDE)
    note = pyramid.tracker._note

    def read_as_well(level, iy, ix):
        note(level, iy, ix)
        pyramid.read(0, whole)

    pyramid.tracker._note = read_as_well
    box = write(store, label, mask, 0, 1, 2)
    assert np.array_equal(look(source).read(0, whole)[box.slices], mask[box.slices])


def test_a_description_is_not_told_as_the_next_while_that_is_made(running, monkeypatch):
    store, _, _ = running
    source = Source(store.location, ByteLRU(1 << 20))
    generation, told = source.generation, []

    def describe_as_well(*given, **named):
        told.append(source.describe())
        return tracker_of(*given, **named)

    monkeypatch.setattr("tilepipe.view.source.tracker_of", describe_as_well)
    store.create_label("second", classes=default_classes(2), unit_px=UNIT)
    look(source)
    assert told
    assert {(one["generation"], len(one["labels"])) for one in told} == {(generation, 1)}
    assert source.generation == generation + 1


def test_a_mask_that_the_same_job_made_anew_is_shown(running):
    store, label, mask = running
    record = label.read_record()
    box = Box(0, 0, UNIT, UNIT)
    label.write_record({**record, "started": "2026-01-01T00:00:00Z"})
    write(store, label, mask, 0, 0, 0)
    source = Source(store.location, ByteLRU(64 << 20))
    assert np.array_equal(look(source).read(0, box), mask[box.slices])

    again = store.create_label("unet", classes=default_classes(4), unit_px=UNIT, overwrite=True)
    again.write_record({**record, "started": "2026-01-01T00:01:00Z"})
    write(store, again, mask % 3 + 1, 0, 0, 0)
    assert np.array_equal(look(source).read(0, box), mask[box.slices] % 3 + 1)


def test_failed_units_are_told(running):
    store, label, _ = running
    source = Source(store.location, ByteLRU(1 << 20))
    label.write_record(
        {
            "state": "units failed",
            "fingerprint": MARK,
            "failed": [
                {"stage": "segment", "level": 0, "unit": [1, 3], "reason": "x"},
                {"stage": "label-reduce", "level": 2, "unit": [0, 0]},
                "nonsense",
                {"unit": ["a", "b"]},
            ],
        }
    )
    look(source)
    assert source.progress(0)["labels"][0]["failed"] == [[1, 3]]


def test_a_block_is_made_once_for_many_threads():
    cache = ByteLRU(1 << 20)
    made = []
    gate = threading.Event()

    def make():
        gate.wait(10)
        made.append(1)
        return np.zeros(10)

    threads = [threading.Thread(target=cache.get, args=("key", make)) for _ in range(8)]
    for thread in threads:
        thread.start()
    gate.set()
    for thread in threads:
        thread.join()
    assert len(made) == 1


def test_the_cache_keeps_to_its_budget_and_survives_errors():
    cache = ByteLRU(1000)
    for index in range(50):
        cache.get(index, lambda: np.zeros(300, dtype=np.uint8))
        assert cache.held_bytes <= 1000
    made = []
    cache.get(49, lambda: made.append(1) or np.zeros(1))
    assert not made, "the latest is still there"
    with pytest.raises(OSError, match="broken"):
        cache.get("bad", lambda: (_ for _ in ()).throw(OSError("broken")))
    assert cache.get("bad", lambda: np.ones(1)).tolist() == [1]


def test_objects_across_regions_are_visited_once(tmp_path):
    store = create_store(
        str(tmp_path / "wide.zarr"),
        channels=1,
        dtype="uint8",
        extent=(100, 4200),
        mpp=None,
        channel_names=("grey",),
        channel_colors=(None,),
        rgb=False,
        unit_px=512,
        with_image=False,
    )
    label = store.create_label("unet", classes=default_classes(3), unit_px=512)
    mask = np.zeros((100, 4200), dtype=np.uint8)
    mask[10:20, 2000:2100] = 1
    mask[50:60, 4090:4110] = 2
    mask[70:80, 5:9] = 1
    for unit in label.level(0).grid:
        label.level(0).write_unit(unit, np.ascontiguousarray(mask[unit.box.slices]))
    pyramid = Source(store.location, ByteLRU(1 << 24)).labels[0].pyramid
    corners, cursor = [], (0, -1)
    while True:
        found = find_object(pyramid, classes=None, cursor=cursor, backwards=False)
        if not found["found"]:
            break
        corners.append(found["box"][:2])
        cursor = tuple(found["cursor"])
    assert corners == [[10, 2000], [70, 5], [50, 4090]]


def test_windows_are_checked():
    assert parse_windows("0:1:2.5:ff8000", channels=1) == (Window(0, 1.0, 2.5, (255, 128, 0)),)
    assert parse_windows("", channels=1) == ()
    for bad in (
        "0",
        "1:0:1:ffffff",
        "0:0:1:ggg",
        "0:nan:1:ffffff",
        "0:0:1:ffffff;",
        "0:1e999:2:ffffff",
    ):
        with pytest.raises(ValueError, match=r"channel|float|window"):
            parse_windows(bad, channels=1)
    with pytest.raises(ValueError, match="more windows than the 1 channels"):
        parse_windows(",".join(["0:0:1:ffffff"] * 2), channels=1)


def test_channels_are_windowed_and_added():
    pixels = np.array([[[0, 100, 200]], [[50, 50, np.nan]]], dtype=np.float32)
    windows = (Window(0, 0, 200, (255, 0, 0)), Window(1, 0, 50, (0, 0, 100)))
    shown = compose_rgb(pixels, windows, rgb=False)
    assert shown.tolist() == [[[0, 0, 100], [128, 0, 100], [255, 0, 0]]]


@pytest.mark.parametrize("dtype", ["int64", "uint64"])
def test_no_object_of_a_wide_number_is_background_or_its_neighbour(dtype):
    import gzip

    top = 2**63 - 1
    ids = np.array([[0, 1, 70_000, 2**32 - 1, 2**32, 2**32 + 1, 2**33, 2**40, top]], dtype=dtype)
    shown = np.frombuffer(gzip.decompress(to_gzip(ids)), dtype="<u4").tolist()
    assert shown[:4] == [0, 1, 70_000, 2**32 - 1]
    assert len(set(shown)) == ids.size


def test_instances_travel_as_four_bytes():
    import gzip

    ids = np.array([[1, 70_000]], dtype=np.int32)
    assert np.frombuffer(gzip.decompress(to_gzip(ids)), dtype="<u4").tolist() == [1, 70_000]
