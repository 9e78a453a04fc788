import os
import struct

import google_crc32c
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from numcodecs import zstd
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, ShardingCodec, ZstdCodec
from zarr.storage import MemoryStore

from tilepipe.errors import StoreError
from tilepipe.store.files import LocalFiles
from tilepipe.store.layout import create_array
from tilepipe.store.level import Level
from tilepipe.store.shard import ShardFormat
from tilepipe.tiling import Box, Grid


def made(path, *, lead, extent, dtype, unit_px, chunk_px, is_label):
    files = LocalFiles(str(path))
    axes = ("c", "y", "x")[-2 - len(lead) :]
    create_array(
        files, "a", version="0.5", axes=axes, shape=(*lead, *extent), dtype=np.dtype(dtype),
        unit_px=unit_px, chunk_px=chunk_px, is_label=is_label,
    )  # fmt: skip
    return files, Level(
        files, "a", index=0, downsample=1, axes=axes, is_label=is_label, unit_px=unit_px,
        writable=True,
    )  # fmt: skip


any_array = given(
    data=st.data(),
    extent=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    layout=st.sampled_from([(16, 16), (32, 16), (48, 16), (40, 40)]),
    kind=st.sampled_from(
        [("uint8", False), ("uint16", False), ("float32", False), ("uint8", True), ("int32", True)]
    ),
)


@any_array
def test_zarr_reads_what_was_packed(tmp_path_factory, data, extent, layout, kind):
    (unit_px, chunk_px), (dtype, is_label) = layout, kind
    lead = () if is_label else (data.draw(st.integers(1, 3)),)
    path = tmp_path_factory.mktemp("shard")
    _, level = made(
        path, lead=lead, extent=extent, dtype=dtype, unit_px=unit_px, chunk_px=chunk_px,
        is_label=is_label,
    )  # fmt: skip
    assert level._packs is not None
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    pixels = rng.integers(0, 200, (*lead, *extent)).astype(dtype)
    pixels[..., : extent[0] // 2, :] = 0  # chunks and whole units of zeros
    for unit in level.grid:
        level.write_unit(unit, pixels[(..., *unit.box.slices)])
    stored = zarr.open_array(path / "a", mode="r")[:]
    np.testing.assert_array_equal(stored, pixels)
    shards = {place for place in (path / "a/c").rglob("*") if place.is_file()}
    filled = [u for u in Grid(extent, unit_px) if pixels[(..., *u.box.slices)].any()]
    assert len(shards) == len(filled)


def test_the_index_names_each_chunk_and_leaves_out_those_of_zeros(tmp_path):
    files, level = made(
        tmp_path, lead=(), extent=(32, 32), dtype="uint8", unit_px=32, chunk_px=16, is_label=True
    )
    pixels = np.zeros((32, 32), np.uint8)
    pixels[3, 20] = 7  # the second chunk alone
    level.write_unit(level.grid.unit(0, 0), pixels)
    raw = files.get("a/c/0/0")
    places = struct.unpack("<8Q", raw[-68:-4])
    absent = 2**64 - 1
    assert places == (absent, absent, 0, len(raw) - 68, absent, absent, absent, absent)
    np.testing.assert_array_equal(zarr.open_array(tmp_path / "a", mode="r")[:], pixels)


def test_minus_zero_is_kept_bit_for_bit(tmp_path):
    _, level = made(
        tmp_path, lead=(1,), extent=(32, 32), dtype="float32", unit_px=32, chunk_px=16,
        is_label=False,
    )  # fmt: skip
    pixels = np.full((1, 32, 32), -0.0, np.float32)
    unit = level.grid.unit(0, 0)
    assert level.write_unit(unit, pixels) == level.checksum(unit)
    assert np.signbit(zarr.open_array(tmp_path / "a", mode="r")[:]).all()


def test_what_zarr_packs_has_the_same_chunks(tmp_path):
    files, level = made(
        tmp_path, lead=(3,), extent=(64, 64), dtype="uint8", unit_px=64, chunk_px=32, is_label=False
    )
    pixels = np.random.default_rng(0).integers(0, 255, (3, 64, 64), dtype=np.uint8)
    level.write_unit(level.grid.unit(0, 0), pixels)
    ours = files.get("a/c/0/0/0")
    zarr.open_array(tmp_path / "a", mode="r+")[:] = pixels
    theirs = files.get("a/c/0/0/0")
    assert len(ours) == len(theirs)
    found = {}
    for name, raw in (("ours", ours), ("theirs", theirs)):
        numbers = struct.unpack("<8Q", raw[-68:-4])
        pairs = zip(numbers[::2], numbers[1::2], strict=True)
        found[name] = [raw[offset : offset + count] for offset, count in pairs]
    assert found["ours"] == found["theirs"]


def sharded(**changes):
    options = {
        "shape": (3, 64, 64), "dtype": "uint16", "fill_value": 0, "config": None,
        "serializer": ShardingCodec(
            chunk_shape=changes.pop("chunk_shape", (3, 32, 32)),
            codecs=changes.pop("codecs", [BytesCodec(endian="little"), ZstdCodec()]),
            index_location=changes.pop("index_location", "end"),
            index_codecs=changes.pop("index_codecs", [BytesCodec(), Crc32cCodec()]),
        ),
        "chunks": changes.pop("shards", (3, 64, 64)), "compressors": None, "filters": None,
    }  # fmt: skip
    return zarr.create_array(MemoryStore(), name="a", **(options | changes))


LITTLE = BytesCodec(endian="little")


@pytest.mark.parametrize(
    "codecs",
    [
        [LITTLE, ZstdCodec(level=1, checksum=True)],
        [LITTLE, BloscCodec(typesize=2)],
        [LITTLE, BloscCodec(typesize=2, shuffle="noshuffle"), Crc32cCodec()],
    ],
)
def test_layouts_it_knows(codecs):
    array = sharded(codecs=codecs)
    packer = ShardFormat.for_array(array)
    pixels = np.random.default_rng(0).integers(0, 999, (3, 64, 64)).astype(np.uint16)
    raw = b"".join(packer.pack(pixels))
    array.store._store_dict["a/c/0/0/0"] = zarr.core.buffer.cpu.Buffer.from_bytes(raw)
    np.testing.assert_array_equal(array[:], pixels)


@pytest.mark.parametrize(
    "changes",
    [
        {"index_location": "start"},
        {"index_codecs": [BytesCodec()]},
        {"codecs": [BytesCodec(endian="big"), ZstdCodec()]},
        {"codecs": [LITTLE, GzipCodec()]},
        {"codecs": [LITTLE]},
        {"fill_value": 1},
        {"dtype": "float32", "fill_value": -0.0},
        {"chunk_shape": (1, 32, 32)},
        {"shape": (6, 64, 64)},
    ],
    ids=str,
)
def test_layouts_it_leaves_to_zarr(changes):
    assert ShardFormat.for_array(sharded(**changes)) is None


def test_arrays_without_shards_are_left_to_zarr():
    for options in ({"zarr_format": 2}, {"zarr_format": 3}):
        array = zarr.create_array(
            MemoryStore(), name="a", shape=(64, 64), dtype="uint8", chunks=(32, 32), **options
        )
        assert ShardFormat.for_array(array) is None


@any_array
def test_what_zarr_wrote_is_read(tmp_path_factory, data, extent, layout, kind):
    (unit_px, chunk_px), (dtype, is_label) = layout, kind
    lead = () if is_label else (data.draw(st.integers(1, 3)),)
    path = tmp_path_factory.mktemp("shard")
    _, level = made(
        path, lead=lead, extent=extent, dtype=dtype, unit_px=unit_px, chunk_px=chunk_px,
        is_label=is_label,
    )  # fmt: skip
    pixels = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 200, (*lead, *extent))
    pixels[..., extent[0] // 2 :, : extent[1] // 2] = 0  # chunks and whole shards of zeros
    stored = zarr.open_array(path / "a", mode="r+")
    stored[:] = pixels.astype(dtype)
    spans = [sorted(data.draw(st.tuples(*[st.integers(0, side)] * 2))) for side in extent]
    (y0, y1), (x0, x1) = spans
    box = Box(min(y0, extent[0] - 1), min(x0, extent[1] - 1), max(y1, y0 + 1), max(x1, x0 + 1))
    box = box.intersect(Box.of_shape(extent))
    found = level.read(box)
    assert found.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(found, stored[(..., *box.slices)])


KINDS = [("uint8", True), ("uint8", False), ("uint16", False)]


@given(kind=st.sampled_from(KINDS), data=st.data())
def test_damaged_shards_are_an_error_or_give_the_same_pixels(tmp_path_factory, kind, data):
    dtype, is_label = kind
    path = tmp_path_factory.mktemp("shard")
    files, level = made(
        path, lead=() if is_label else (2,), extent=(32, 32), dtype=dtype, unit_px=32, chunk_px=16,
        is_label=is_label,
    )  # fmt: skip
    pixels = np.random.default_rng(1).integers(0, 3, (*level.lead, 32, 32)).astype(dtype)
    level.write_unit(level.grid.unit(0, 0), pixels)
    key = "a/c/0/0" if is_label else "a/c/0/0/0"
    raw = bytearray(files.get(key))
    if data.draw(st.booleans()):
        raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
    else:
        place = data.draw(st.integers(0, len(raw) - 1))
        raw[place] ^= data.draw(st.integers(1, 255))
    files.put(key, bytes(raw))
    found, told = pixels, ""
    try:
        found = level.read(Box(0, 0, 32, 32))
    except StoreError as error:
        told = str(error)
    assert not told or f"array a cannot be read at {Box(0, 0, 32, 32)}" in told
    np.testing.assert_array_equal(found, pixels)


def test_an_index_that_points_outside_is_told(tmp_path):
    files, level = made(
        tmp_path, lead=(), extent=(16, 16), dtype="uint8", unit_px=16, chunk_px=16, is_label=True
    )
    level.write_unit(level.grid.unit(0, 0), np.ones((16, 16), np.uint8))
    raw = files.get("a/c/0/0")
    for offset, length in [(0, len(raw) + 1), (2**63, 9), (len(raw), 1), (2**64 - 1, 4)]:
        index = struct.pack("<2Q", offset, length)
        crc = struct.pack("<I", google_crc32c.value(index))
        files.put("a/c/0/0", raw[:-20] + index + crc)
        with pytest.raises(StoreError, match="lies behind its end"):
            level.read(Box(0, 0, 16, 16))


def test_a_chunk_that_says_it_is_larger_is_not_decoded(tmp_path):
    files, level = made(
        tmp_path, lead=(1,), extent=(16, 16), dtype="uint8", unit_px=16, chunk_px=16, is_label=False
    )
    level.write_unit(level.grid.unit(0, 0), np.ones((1, 16, 16), np.uint8))
    raw = files.get("a/c/0/0/0")
    for change in ((4, 1 << 30), (12, 1 << 30), (4, 8)):
        chunk = bytearray(raw[: -20 - 4])
        struct.pack_into("<I", chunk, *change)
        body = bytes(chunk) + struct.pack("<I", google_crc32c.value(bytes(chunk)))
        files.put("a/c/0/0/0", body + raw[-20:])
        with pytest.raises(StoreError, match="says that it is one"):
            level.read(Box(0, 0, 16, 16))


def test_a_local_shard_is_read_without_zarr(tmp_path, monkeypatch):
    _, level = made(
        tmp_path, lead=(), extent=(32, 32), dtype="uint8", unit_px=16, chunk_px=16, is_label=True
    )
    unit = level.grid.unit(0, 1)
    level.write_unit(unit, np.full((16, 16), 3, np.uint8))
    monkeypatch.setattr(type(level._array), "__getitem__", None)
    assert level.read(Box(0, 0, 32, 32)).sum() == 3 * 256


def test_what_is_short_or_no_file_is_told(tmp_path):
    files, level = made(
        tmp_path, lead=(), extent=(16, 16), dtype="uint8", unit_px=16, chunk_px=16, is_label=True
    )
    whole = Box(0, 0, 16, 16)
    level.write_unit(level.grid.unit(0, 0), np.arange(256, dtype=np.uint8).reshape(16, 16))
    raw = files.get("a/c/0/0")
    out = np.empty((16, 16), np.uint8)

    def cut_off(offset, length):  # by somebody, after its size was asked for
        return raw[: len(raw) // 2][offset : offset + length]

    with pytest.raises(ValueError, match="it is cut off"):
        level._unpacks.unpack(cut_off, len(raw), whole, out)
    short = zstd.compress(bytes(255), 3)
    index = struct.pack("<2Q", 0, len(short))
    files.put("a/c/0/0", short + index + struct.pack("<I", google_crc32c.value(index)))
    with pytest.raises(StoreError, match="a chunk of 256 bytes decodes to 255"):
        level.read(whole)
    shard = tmp_path / "a/c/0/0"
    shard.write_bytes(b"")
    with pytest.raises(StoreError, match="c/0/0 is an empty file"):
        level.read(whole)
    shard.unlink()
    os.mkfifo(shard)  # opening one waits for a writer
    with pytest.raises(StoreError, match="c/0/0 is not a plain file"):
        level.read(whole)
