import os
import shutil
from collections import Counter

import numpy as np
import pytest
from zarr.storage import LocalStore

from tilepipe.errors import MismatchError, StoreError
from tilepipe.spec import default_classes
from tilepipe.store import Level, LocalFiles, checksum_of, create_store, open_store
from tilepipe.tiling import Box
from tilepipe.tiling.grid import Unit


def texture(shape, dtype, seed=0):
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return rng.normal(size=shape).astype(dtype)
    return rng.integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def make(
    path, *, channels=3, dtype="uint8", extent=(300, 210), version="0.5", unit_px=128, **options
):
    return create_store(
        str(path),
        channels=channels,
        dtype=dtype,
        extent=extent,
        mpp=(0.5, 0.5),
        rgb=channels == 3,
        ome_zarr=version,
        unit_px=unit_px,
        chunk_px=64,
        **options,
    )


def write_all(level, pixels):
    return {(u.iy, u.ix): level.write_unit(u, pixels[(..., *u.box.slices)]) for u in level.grid}


@pytest.mark.parametrize("version", ["0.5", "0.4"])
@pytest.mark.parametrize(
    "channels, dtype, extent, unit_px",
    [
        (3, "uint8", (300, 210), 128),
        (1, "uint16", (300, 210), 96),
        (2, "float32", (77, 1), 64),
        (1, "uint8", (1, 1), 512),
        (1, "uint8", (130, 129), 1021),
    ],
)
def test_what_is_written_is_read(tmp_path, version, channels, dtype, extent, unit_px):
    store = make(
        tmp_path / "a.zarr",
        channels=channels,
        dtype=dtype,
        extent=extent,
        version=version,
        unit_px=unit_px,
    )
    pixels = texture((channels, *extent), dtype)
    sums = write_all(store.image(0), pixels)
    level = open_store(store.location).image(0)
    assert level.shape == extent
    assert level.dtype == np.dtype(dtype)
    assert level.unit_px == unit_px
    np.testing.assert_array_equal(level.read(Box.of_shape(extent)), pixels)
    inner = Box(extent[0] // 3, extent[1] // 3, extent[0] // 3 + 1, extent[1])
    np.testing.assert_array_equal(level.read(inner), pixels[(..., *inner.slices)])
    for unit in level.grid:
        piece = pixels[(..., *unit.box.slices)]
        assert sums[unit.iy, unit.ix] == level.checksum(unit) == checksum_of(piece)


@pytest.mark.parametrize("version", ["0.5", "0.4"])
def test_writing_a_unit_reads_nothing_and_writes_each_file_once(tmp_path, version, monkeypatch):
    store = make(tmp_path / "a.zarr", version=version)
    level, pixels = store.image(0), texture((3, 300, 210), "uint8")
    write_all(level, pixels)
    gets, puts = Counter(), Counter()
    old_get, old_put = LocalStore.get, LocalFiles.put

    async def get(self, key, *args, **kwargs):
        gets[key] += 1
        return await old_get(self, key, *args, **kwargs)

    def put(self, key, *args, **kwargs):
        puts[key] += 1
        assert kwargs == {"durable": True}
        return old_put(self, key, *args, **kwargs)

    monkeypatch.setattr(LocalStore, "get", get)
    monkeypatch.setattr(LocalFiles, "put", put)
    again = texture((3, 300, 210), "uint8", seed=1)
    write_all(level, again)
    assert not gets
    assert set(puts.values()) == {1}
    # 3 x 2 units of 128 px; in 0.4 each is up to 2 x 2 chunks of 64 px, 5 x 4 in all.
    assert len(puts) == (6 if version == "0.5" else 20)
    np.testing.assert_array_equal(level.read(Box.of_shape((300, 210))), again)


def test_a_damaged_old_shard_is_no_obstacle_to_writing(tmp_path):
    store = make(tmp_path / "a.zarr")
    level, pixels = store.image(0), texture((3, 300, 210), "uint8")
    write_all(level, pixels)
    shard = tmp_path / "a.zarr/0/c/0/1/1"
    shard.write_bytes(shard.read_bytes()[:100])
    write_all(level, pixels)
    np.testing.assert_array_equal(level.read(Box.of_shape((300, 210))), pixels)


def _flip(raw):
    middle = len(raw) // 3
    return raw[:middle] + bytes([raw[middle] ^ 4]) + raw[middle + 1 :]


@pytest.mark.parametrize("is_label", [False, True])
@pytest.mark.parametrize(
    "damage",
    [
        _flip,
        lambda raw: raw[: len(raw) // 2],
        lambda raw: raw[:-1],
        lambda raw: b"",
        lambda _: b"x",
    ],
    ids=["bit", "half", "last byte", "empty", "one byte"],
)
def test_damage_is_an_error_that_names_store_array_and_box(tmp_path, damage, is_label):
    store = make(tmp_path / "a.zarr")
    if is_label:
        label = store.create_label("m", classes=default_classes(9), unit_px=128)
        level, shard = label.level(0), tmp_path / "a.zarr/labels/m/0/c/1/0"
        write_all(level, texture((300, 210), "uint8"))
    else:
        level, shard = store.image(0), tmp_path / "a.zarr/0/c/0/1/0"
        write_all(level, texture((3, 300, 210), "uint8"))
    shard.write_bytes(damage(shard.read_bytes()))
    key = "labels/m/0" if is_label else "0"
    with pytest.raises(StoreError, match=f"a.zarr: array {key} cannot be read at y 128:256, x 0:"):
        level.checksum(level.grid.unit(1, 0))
    level.checksum(level.grid.unit(0, 0))  # the others are not touched by it


def test_a_damaged_chunk_of_version_04(tmp_path):
    store = make(tmp_path / "a.zarr", version="0.4")
    label = store.create_label("m", classes=default_classes(9), unit_px=128)
    write_all(label.level(0), texture((300, 210), "uint8"))
    chunk = tmp_path / "a.zarr/labels/m/0/2/0"
    chunk.write_bytes(_flip(chunk.read_bytes()))
    with pytest.raises(StoreError, match="labels/m/0 cannot be read at y 128:256"):
        label.level(0).checksum(label.level(0).grid.unit(1, 0))


def test_a_missing_shard_is_caught_by_the_checksum(tmp_path):
    store = make(tmp_path / "a.zarr")
    level = store.image(0)
    sums = write_all(level, texture((3, 300, 210), "uint8"))
    (tmp_path / "a.zarr/0/c/0/1/0").unlink()
    assert level.checksum(level.grid.unit(1, 0)) != sums[1, 0]


def test_background_is_not_stored_and_reads_back_the_same(tmp_path):
    store = make(tmp_path / "a.zarr")
    level = store.create_label("m", classes=default_classes(2), unit_px=128).level(0)
    unit = level.grid.unit(0, 0)
    level.write_unit(unit, np.ones((128, 128), np.uint8))
    assert (tmp_path / "a.zarr/labels/m/0/c/0/0").exists()
    summed = level.write_unit(unit, np.zeros((128, 128), np.uint8))
    assert not (tmp_path / "a.zarr/labels/m/0/c/0/0").exists()
    assert level.checksum(unit) == summed


def test_what_does_not_fit_is_refused(tmp_path):
    store = make(tmp_path / "a.zarr")
    level = store.image(0)
    unit = level.grid.unit(0, 0)
    for pixels in (
        np.zeros((3, 128, 127), np.uint8),
        np.zeros((3, 128, 128), np.uint16),
        np.zeros((128, 128), np.uint8),
    ):
        with pytest.raises(StoreError, match=r"takes \(3, 128, 128\) uint8, got"):
            level.write_unit(unit, pixels)
    with pytest.raises(StoreError, match="is not a unit of array 0"):
        level.write_unit(Unit(0, 0, Box(0, 0, 64, 64)), np.zeros((3, 64, 64), np.uint8))
    with pytest.raises(StoreError, match="writable=True"):
        open_store(store.location).image(0).write_unit(unit, np.zeros((3, 128, 128), np.uint8))
    for box in (Box(0, 0, 301, 10), Box(-1, 0, 4, 4), Box(5, 5, 5, 9)):
        with pytest.raises(StoreError, match=r"of array 0, which is 300 x 210 px"):
            level.read(box)


def test_a_missing_array_is_named(tmp_path):
    store = make(tmp_path / "a.zarr", extent=(600, 600))
    (tmp_path / "a.zarr/1/zarr.json").unlink()
    with pytest.raises(StoreError, match="array 1"):
        open_store(store.location).image(1)


def test_a_link_out_of_the_store_is_refused(tmp_path):
    store = make(tmp_path / "a.zarr")
    elsewhere = tmp_path / "elsewhere"
    (tmp_path / "a.zarr/0").rename(elsewhere)
    (tmp_path / "a.zarr/0").symlink_to(elsewhere)
    with pytest.raises(StoreError, match="leaves the store"):
        open_store(store.location, writable=True).image(0)


@pytest.mark.parametrize("folder", ["0", "0/c"])
def test_writing_through_a_link_is_refused(tmp_path, folder):
    store = make(tmp_path / "a.zarr")
    level = store.image(0)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "c").mkdir()
    link = tmp_path / "a.zarr" / folder
    if folder == "0":
        link.rename(tmp_path / "kept")
    link.symlink_to(elsewhere)
    unit = level.grid.unit(0, 0)
    with pytest.raises(StoreError):
        level.write_unit(unit, texture((3, 128, 128), "uint8"))
    assert not [name for _, _, names in os.walk(elsewhere) for name in names]


def test_a_full_disk_says_what_to_do(tmp_path, monkeypatch):
    store = make(tmp_path / "a.zarr")
    level = store.image(0)

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreError, match="the disk is full; free some space") as caught:
        level.write_unit(level.grid.unit(0, 0), texture((3, 128, 128), "uint8"))
    assert caught.value.errno == 28
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("version", ["0.5", "0.4"])
def test_units_without_a_file_are_listed(tmp_path, version):
    store = make(tmp_path / "a.zarr", version=version)
    level = store.image(0)
    assert list(level.not_stored()) == list(level.grid)
    pixels = texture((3, 300, 210), "uint8")
    pixels[:, :128, 128:] = 0
    write_all(level, pixels)
    zero, *_ = level.not_stored()
    assert (zero.iy, zero.ix) == (0, 1)
    assert level.checksum_of_zeros(zero) == level.checksum(zero)
    # A unit of version 0.4 is several files; each of them counts.
    file = tmp_path / "a.zarr" / ("0/c/0/1/0" if version == "0.5" else "0/0/3/1")
    file.unlink()
    assert [(unit.iy, unit.ix) for unit in level.not_stored()] == [(0, 1), (1, 0)]


@pytest.mark.parametrize("version", ["0.5", "0.4"])
def test_a_unit_of_minus_zeros_is_stored(tmp_path, version):
    store = make(tmp_path / "a.zarr", version=version, channels=1, dtype="float32")
    level = store.image(0)
    checksums = write_all(level, np.full((1, 300, 210), -0.0, np.float32))
    assert not list(level.not_stored())
    assert {(unit.iy, unit.ix): level.checksum(unit) for unit in level.grid} == checksums


@pytest.mark.parametrize("version", ["0.5", "0.4"])
@pytest.mark.parametrize("is_label", [True, False])
def test_what_is_begun_anew_while_it_is_read_is_told(tmp_path, version, is_label):
    path = tmp_path / "a.zarr"
    store = make(path, version=version)

    def begun() -> Level:
        if not is_label:
            return store.image(0)
        label = store.create_label("m", classes=default_classes(2), unit_px=128, overwrite=True)
        return label.level(0)

    level = begun()
    write_all(level, texture((*level.lead, *level.shape), "uint8"))
    level.read(Box(0, 0, 9, 9))
    os.utime(level._folder / ("zarr.json" if version == "0.5" else ".zarray"), ns=(1, 1))
    with pytest.raises(MismatchError, match=r"begun anew by another process, or taken away, while"):
        level.read(Box(0, 0, 9, 9))
    store = make(path, version=version, overwrite=True)
    begun().read(Box(0, 0, 9, 9))


@pytest.mark.parametrize("version", ["0.5", "0.4"])
@pytest.mark.parametrize("is_label", [True, False])
def test_of_what_is_taken_away_no_chunk_goes_before_that_is_seen(
    tmp_path, version, is_label, monkeypatch
):
    store = make(tmp_path / "a.zarr", version=version)
    label = store.create_label("m", classes=default_classes(2), unit_px=128)
    level = label.level(0) if is_label else store.image(0)
    write_all(level, texture((*level.lead, *level.shape), "uint8"))
    remove, seen = shutil.rmtree, []

    def rmtree(folder, *args, **options):
        whole = any(file.stat().st_size > 2000 for file in level._folder.rglob("*"))
        with pytest.raises(MismatchError):
            level.read(Box.of_shape(level.shape))
        seen.append(whole)
        monkeypatch.undo()
        remove(folder, *args, **options)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    if is_label:
        store.files.delete_tree("labels/m")
    else:
        store.files.delete_tree("", keep=("zarr.json", ".zattrs", ".zgroup"))
    assert seen == [True]
