"""Units held in memory: what is read is what was written, however little is held."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilepipe.errors import StoreError
from tilepipe.store import RecentUnits, create_store, open_store
from tilepipe.tiling import Box

EXTENT = (70, 90)
UNIT = 32


def small_store(folder, recent):
    store = create_store(
        str(folder / "out.zarr"),
        channels=3,
        dtype="uint8",
        extent=EXTENT,
        mpp=None,
        channel_names=("r", "g", "b"),
        channel_colors=(None, None, None),
        rgb=True,
        unit_px=UNIT,
        chunk_px=16,
    )
    store.recent = recent
    return store


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(3).integers(0, 255, (3, *EXTENT), dtype=np.uint8)


@pytest.fixture(scope="module", params=[0, 7000, 1 << 20], ids=["none", "few", "all"])
def level(request, tmp_path_factory, image):
    """A level of 3 x 3 units, none, two or all of which are held."""
    recent = RecentUnits(request.param)
    found = small_store(tmp_path_factory.mktemp("recent"), recent).image(0)
    for unit in found.grid:
        found.write_unit(unit, image[(slice(None), *unit.box.slices)].copy())
    assert recent.held_bytes <= request.param
    return found


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_box_reads_as_written(level, image, data):
    y0, x0 = data.draw(st.integers(0, 69)), data.draw(st.integers(0, 89))
    y1, x1 = data.draw(st.integers(y0 + 1, 70)), data.draw(st.integers(x0 + 1, 90))
    box = Box(y0, x0, y1, x1)
    np.testing.assert_array_equal(level.read(box), image[(slice(None), *box.slices)])


def test_held_units_are_not_read_from_the_disk(tmp_path, image):
    store = small_store(tmp_path, RecentUnits(1 << 20))
    level = store.image(0)
    for unit in level.grid:
        level.write_unit(unit, image[(slice(None), *unit.box.slices)].copy())
    for shard in (tmp_path / "out.zarr" / "0" / "c").rglob("*"):
        if shard.is_file():
            shard.write_bytes(b"damaged")
    whole = Box.of_shape(EXTENT)
    np.testing.assert_array_equal(level.read(whole), image)
    with pytest.raises(StoreError):
        level.checksum(level.grid.unit(0, 0))
    with pytest.raises(StoreError):
        open_store(store.location).image(0).read(whole)


def test_what_is_held_cannot_be_changed_by_a_reader(tmp_path, image):
    level = small_store(tmp_path, RecentUnits(1 << 20)).image(0)
    unit = level.grid.unit(1, 1)
    level.write_unit(unit, image[(slice(None), *unit.box.slices)].copy())
    with pytest.raises(ValueError, match="read-only"):
        level.read(unit.box)[:] = 0


def test_a_unit_written_again_is_held_as_written_last(tmp_path, image):
    level = small_store(tmp_path, RecentUnits(1 << 20)).image(0)
    unit = level.grid.unit(0, 0)
    first = image[(slice(None), *unit.box.slices)].copy()
    level.write_unit(unit, first)
    level.write_unit(unit, 255 - first)
    np.testing.assert_array_equal(level.read(unit.box), 255 - first)


def test_a_write_that_fails_leaves_nothing_held(tmp_path, image, monkeypatch):
    recent = RecentUnits(1 << 20)
    level = small_store(tmp_path, recent).image(0)
    unit = level.grid.unit(0, 0)
    pixels = image[(slice(None), *unit.box.slices)].copy()
    level.write_unit(unit, pixels)
    assert recent.held_bytes == pixels.nbytes

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tilepipe.store.files.LocalFiles.put", full)
    with pytest.raises(StoreError):
        level.write_unit(unit, 255 - pixels)
    assert recent.held_bytes == 0


def test_the_longest_unused_goes_first():
    recent = RecentUnits(300)
    pixels = np.zeros(100, np.uint8)
    for place in range(3):
        recent.put(("0", 0, place), pixels)
    assert recent.get(("0", 0, 0)) is not None
    recent.put(("0", 0, 3), pixels)
    held = [recent.get(("0", 0, place)) is not None for place in range(4)]
    assert held == [True, False, True, True]
    assert recent.held_bytes == 300
    recent.put(("0", 0, 9), np.zeros(301, np.uint8))
    assert recent.get(("0", 0, 9)) is None


def test_a_smaller_room_is_made_at_once():
    recent = RecentUnits(300)
    for place in range(3):
        recent.put(("0", 0, place), np.zeros(100, np.uint8))
    recent.resize(150)
    assert [recent.get(("0", 0, place)) is not None for place in range(3)] == [False, False, True]
    assert recent.held_bytes == 100
    recent.resize(0)
    assert recent.held_bytes == 0
    recent.put(("0", 0, 5), np.zeros(100, np.uint8))
    assert recent.get(("0", 0, 5)) is None
