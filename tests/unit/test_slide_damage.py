"""Damage is an error that names file, level, tile and box, or a filled tile that is recorded."""

from __future__ import annotations

import re
import struct

import numpy as np
import pytest
import tifffile

from tilepipe.errors import DamageError, SlideError
from tilepipe.slide import DamagedTile, open_slide
from tilepipe.slide.segments import PagePixels, SegmentError
from tilepipe.store import create_store
from tilepipe.tiling import Box


def texture(shape):
    y, x = np.mgrid[: shape[0], : shape[1]]
    planes = [127 + 100 * np.sin(y / 9) * np.cos(x / (5 + k)) for k in range(shape[2])]
    noise = np.random.default_rng(0).normal(0, 6, shape)
    return np.clip(np.stack(planes, -1) + noise, 0, 255).astype(np.uint8)


def write(path, **layout):
    image = texture((128, 192, 3))
    tifffile.imwrite(path, image, tile=(64, 64), photometric="rgb", **layout)
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        return page.asarray(), page.dataoffsets, page.databytecounts


def spoil(path, offset, new):
    data = bytearray(path.read_bytes())
    data[offset : offset + len(new)] = new
    path.write_bytes(data)


def half_missing(path, offset, count):
    spoil(path, offset + count // 2, bytes(count - count // 2))


def entropy_byte(path, offset, count):
    # A marker in the middle of the scan: what a flipped byte after 0xFF does.
    spoil(path, offset + count * 2 // 3, b"\xff\x01\xff\xd5")


def no_header(path, offset, count):
    spoil(path, offset, b"\0\0")


@pytest.mark.parametrize("harm", [half_missing, entropy_byte, no_header])
def test_damaged_jpeg_tile_is_named(tmp_path, harm):
    path = tmp_path / "slide.tif"
    image, offsets, counts = write(path, compression="jpeg")
    harm(path, offsets[4], counts[4])
    with open_slide(path) as slide:
        np.testing.assert_array_equal(
            slide.read(Box(0, 0, 64, 192)), np.moveaxis(image[:64], -1, 0)
        )
        wanted = re.escape(f"{path}: level 0, tile 4 (y 64:128, x 64:128) cannot be decoded")
        for _ in range(2):  # also the second time
            with pytest.raises(DamageError, match=wanted):
                slide.read(Box(0, 0, 128, 128))


def test_fill_keeps_the_rest_and_records_the_tile(tmp_path):
    path = tmp_path / "slide.tif"
    image, offsets, counts = write(path, compression="jpeg")
    half_missing(path, offsets[4], counts[4])
    half_missing(path, offsets[5], counts[5])
    with open_slide(path, on_damage="fill") as slide:
        got = np.moveaxis(slide.read(Box(0, 0, 128, 192)), 0, -1)
        slide.read(Box(100, 100, 120, 120))
        assert [(tile.level, tile.index, tile.box) for tile in slide.damage] == [
            (0, 4, Box(64, 64, 128, 128)),
            (0, 5, Box(64, 128, 128, 192)),
        ]
        assert slide.damage[0].box == Box(64, 64, 128, 128)
    wanted = image.copy()
    wanted[64:, 64:] = 255
    np.testing.assert_array_equal(got, wanted)


def test_grey_is_filled_with_black(tmp_path):
    path = tmp_path / "a.tif"
    image = texture((64, 128, 3))[..., 0]
    tifffile.imwrite(path, image, tile=(64, 64), compression="zlib")
    with tifffile.TiffFile(path) as tiff:
        offset = tiff.pages[0].dataoffsets[1]
    spoil(path, offset, b"\xff" * 40)
    with open_slide(path, on_damage="fill") as slide:
        got = slide.read(Box(0, 0, 64, 128))[0]
        np.testing.assert_array_equal(got[:, :64], image[:, :64])
        assert not got[:, 64:].any()
        assert len(slide.damage) == 1
        assert isinstance(slide.damage[0], DamagedTile)
        assert slide.damage[0].reason.startswith("cannot be decoded")


@pytest.mark.parametrize("compression", ["zlib", "lzma", "zstd", "packbits", "webp", "jpeg2000"])
def test_damage_of_other_codecs(tmp_path, compression):
    path = tmp_path / "a.tif"
    _, offsets, counts = write(path, compression=compression)
    spoil(path, offsets[1], b"\xa5" * (counts[1] // 2))
    spoil(path, offsets[1] + counts[1] // 2, b"\0" * (counts[1] - counts[1] // 2))
    with (
        open_slide(path) as slide,
        pytest.raises(DamageError, match=r"level 0, tile 1 \(y 0:64, x 64:128\)"),
    ):
        slide.read(Box(0, 0, 64, 192))


def test_a_file_cut_off_is_refused_when_opened(tmp_path):
    path = tmp_path / "a.tif"
    _, offsets, counts = write(path, compression="jpeg")
    data = path.read_bytes()
    end = offsets[-1] + counts[-1]
    assert end == len(data)  # tifffile puts the pixels last
    path.write_bytes(data[: offsets[3] + 10])
    with pytest.raises(DamageError, match=r"tile 3 \(y 64:128.* cut off, 3 of 6 are missing"):
        open_slide(path)
    with open_slide(path, on_damage="fill") as slide:
        slide.read(Box(0, 0, 128, 192))
        assert [tile.index for tile in slide.damage] == [3, 4, 5]


def set_entry(path, code, index, value):
    with tifffile.TiffFile(path) as tiff:
        tag = tiff.pages[0].tags[code]
        width = {3: 2, 4: 4, 16: 8}[int(tag.dtype)]
        at = tag.valueoffset + index * width
        order = tiff.byteorder
    spoil(path, at, struct.pack(order + {2: "H", 4: "I", 8: "Q"}[width], value))


def test_sparse_tiles_are_not_damage(tmp_path):
    path = tmp_path / "a.tif"
    image, _, _ = write(path, compression="zlib")
    set_entry(path, 324, 2, 0)
    set_entry(path, 325, 2, 0)
    with open_slide(path) as slide:
        got = np.moveaxis(slide.read(Box(0, 0, 128, 192)), 0, -1)
    np.testing.assert_array_equal(got, tifffile.imread(path))
    assert not got[:64, 128:].any()
    np.testing.assert_array_equal(got[64:], image[64:])


@pytest.mark.parametrize("no_data", ["0", "1"])
def test_sparse_bits_are_what_the_file_calls_no_data(tmp_path, no_data):
    path = tmp_path / "a.tif"
    bits = texture((64, 128, 3))[..., 0] > 99
    tifffile.imwrite(path, bits, tile=(64, 64), extratags=[(42113, 2, None, no_data, True)])
    set_entry(path, 324, 1, 0)
    set_entry(path, 325, 1, 0)
    with open_slide(path) as slide:
        got = slide.read(Box(0, 0, 64, 128))[0]
    np.testing.assert_array_equal(got[:, :64], bits[:, :64])
    assert (got[:, 64:] == int(no_data)).all()


@pytest.mark.parametrize(
    ("dtype", "no_data", "read"),
    [
        ("int8", "7", 7),
        ("int16", "32767", 32767),
        ("int16", "300", 300),
        ("int16", "40000", 32767),
        ("uint16", "65535.0", 65535),
        ("uint8", "-9999", 0),
        ("uint8", "1.5", 2),
        ("uint8", "nan", 0),
        ("uint8", "none", 0),
        ("float32", "0,5", 0.5),
        ("float32", "-1.7976931348623157e+308", -np.inf),
        ("float32", "nan", np.nan),
    ],
)
def test_sparse_tiles_are_what_the_file_calls_no_data(tmp_path, dtype, no_data, read):
    """As GDAL reads these very files; the library takes 32767 of int16 for 0."""
    path = tmp_path / "a.tif"
    image = np.ones((64, 128), dtype)
    tifffile.imwrite(path, image, tile=(64, 64), extratags=[(42113, 2, None, no_data, True)])
    set_entry(path, 324, 1, 0)
    set_entry(path, 325, 1, 0)
    with open_slide(path) as slide:
        got = slide.read(Box(0, 0, 64, 128))[0]
    assert (got[:, :64] == 1).all()
    np.testing.assert_array_equal(got[:, 64:], np.full((64, 64), read, got.dtype))


def test_an_offset_without_bytes_is_damage(tmp_path):
    path = tmp_path / "a.tif"
    write(path, compression="zlib")
    set_entry(path, 325, 2, 0)
    with open_slide(path) as slide, pytest.raises(DamageError, match=r"tile 2 .* has 0 bytes"):
        slide.read(Box(0, 0, 64, 192))


def test_raw_strip_shorter_than_its_rows(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, texture((64, 64, 3)), rowsperstrip=16, photometric="rgb")
    set_entry(path, 279, 2, 100)
    with pytest.raises(DamageError, match=r"tile 2 \(y 32:48, x 0:64\) has 100 bytes, its rows"):
        open_slide(path)
    with open_slide(path, on_damage="fill") as slide:
        assert (slide.read(Box(0, 0, 64, 64))[:, 32:48] == 255).all()
        assert [tile.index for tile in slide.damage] == [2]


def test_jpeg_of_another_size_than_its_tile(tmp_path):
    path, other = tmp_path / "a.tif", tmp_path / "b.tif"
    _, offsets, counts = write(path, compression="jpeg")
    tifffile.imwrite(
        other, texture((32, 32, 3)), tile=(32, 32), photometric="rgb", compression="jpeg"
    )
    with tifffile.TiffFile(other) as tiff:
        start, count = tiff.pages[0].dataoffsets[0], tiff.pages[0].databytecounts[0]
    assert count < counts[0]
    small = other.read_bytes()[start : start + count]
    spoil(path, offsets[0], small)
    with open_slide(path) as slide, pytest.raises(DamageError, match="JPEG of 32 x 32 px"):
        slide.read(Box(0, 0, 10, 10))


def test_damage_of_a_turned_image_is_named_where_it_is_shown(tmp_path):
    path = tmp_path / "a.tif"
    image = texture((64, 192, 3))
    tifffile.imwrite(
        path,
        image,
        tile=(64, 64),
        photometric="rgb",
        compression="zlib",
        extratags=[(274, 3, 1, 6, True)],
    )
    with tifffile.TiffFile(path) as tiff:
        offset, count = tiff.pages[0].dataoffsets[0], tiff.pages[0].databytecounts[0]
    spoil(path, offset, bytes(count))
    with open_slide(path, on_damage="fill") as slide:
        assert slide.levels[0].shape == (192, 64)
        got = np.moveaxis(slide.read(Box(0, 0, 192, 64)), 0, -1)
        assert slide.damage[0].box == Box(0, 0, 64, 64)
        assert (got[:64] == 255).all()
        np.testing.assert_array_equal(got[64:], np.rot90(image, -1)[64:])


def test_lanes_that_wait_for_one_damaged_tile_name_one_place(tmp_path, monkeypatch):
    """They are handed one error by the cache; each turned its box once more."""
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, texture((64, 192, 3)), tile=(64, 64), photometric="rgb",
                     compression="zlib", extratags=[(274, 3, 1, 3, True)])  # fmt: skip
    shared = SegmentError(0, Box(0, 0, 64, 64), "is damaged")

    def decode(pixels, index):
        raise shared

    monkeypatch.setattr(PagePixels, "_decode", decode)
    with open_slide(path) as slide:
        for _ in range(2):
            with pytest.raises(DamageError, match=re.escape("tile 0 (y 0:64, x 128:192)")):
                slide.read(Box(0, 128, 64, 192))


def test_real_slide_with_half_a_tile(data, tmp_path):
    source = data / "wsi" / "CMU-1-Small-Region.svs"
    path = tmp_path / "half.svs"
    path.write_bytes(source.read_bytes())
    with tifffile.TiffFile(source) as tiff:
        page = tiff.pages[0]
        offset, count = page.dataoffsets[57], page.databytecounts[57]
    half_missing(path, offset, count)
    with open_slide(path) as slide, pytest.raises(DamageError, match=r"level 0, tile 57 \("):
        slide.read(Box.of_shape(slide.levels[0].shape))
    with open_slide(path, on_damage="fill") as slide:
        slide.read(Box.of_shape(slide.levels[0].shape))
        assert [tile.index for tile in slide.damage] == [57]


def test_damage_error_is_a_slide_error():
    assert issubclass(DamageError, SlideError)
    assert issubclass(DamageError, ValueError)


@pytest.mark.parametrize("left", [1, 2])
def test_a_hyperstack_that_was_cut_off_is_no_image_of_fewer_channels(tmp_path, left):
    image = np.random.default_rng(0).integers(0, 60_000, (3, 64, 80), dtype=np.uint16)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, image, imagej=True, metadata={"axes": "CYX"})
    with tifffile.TiffFile(path) as tiff:
        offset = tiff.pages[0].dataoffsets[0]
    path.write_bytes(path.read_bytes()[: offset + left * image[0].nbytes])
    with pytest.raises(SlideError, match=r"a\.tif: .*tells of 3 planes.*cut off"):
        open_slide(path)


@pytest.mark.parametrize("left_off", [1, 4000], ids=["of the description", "of the pages"])
@pytest.mark.parametrize("bigtiff", [False, True])
def test_pages_that_were_cut_off_are_told_of(tmp_path, bigtiff, left_off):
    """Their list lies behind the pixels: without it, three channels look like one."""
    path = tmp_path / "three.tif"
    pixels = np.zeros((3, 200, 300), np.uint8)
    tifffile.imwrite(path, pixels, photometric="minisblack", ome=True, bigtiff=bigtiff)
    with open_slide(path) as slide:
        assert slide.channels == 3
        assert not any("beyond the end" in note for note in slide.notes)
    path.write_bytes(path.read_bytes()[:-left_off])
    with open_slide(path) as slide:
        assert any("lies beyond the end of the file" in note for note in slide.notes)


@pytest.mark.parametrize("on_damage", ["error", "fill"])
@pytest.mark.parametrize("kind", ["jpeg", "deflate", "zarr"])
def test_a_lack_of_memory_is_no_damage(tmp_path, monkeypatch, kind, on_damage):
    """A tile that is not decoded for it would be white for good, or its file held to be bad."""
    path = tmp_path / "slide"
    if kind == "zarr":
        create_store(str(path), channels=3, dtype="uint8", extent=(64, 64), unit_px=64)
        place = "zarr.Array.__getitem__"
    else:
        write(path, compression=kind)
        place = "tilepipe.slide.segments." + (
            "jpeg.decode_strict" if kind == "jpeg" else "np.asarray"
        )
    with open_slide(path, on_damage=on_damage) as slide:

        def short(*_, **__):
            raise MemoryError("Unable to allocate 12.0 MiB")

        with monkeypatch.context() as patch:
            patch.setattr(place, short)
            with pytest.raises(MemoryError):
                slide.read(Box(0, 0, 64, 64))
        assert not list(slide.damage)
        assert slide.read(Box(0, 0, 64, 64)).shape == (3, 64, 64)


def test_a_tile_that_asks_for_absurd_memory_is_damaged(tmp_path, monkeypatch):
    path = tmp_path / "slide.tif"
    write(path, compression="jpeg")
    monkeypatch.setattr(
        "tilepipe.slide.segments.jpeg.decode_strict", lambda *_, **__: np.empty((1 << 30, 1 << 20))
    )
    with open_slide(path, on_damage="fill") as slide:
        assert (slide.read(Box(0, 0, 64, 64)) == 255).all()
        assert "cannot be decoded: Unable to allocate 8.00 PiB" in slide.damage[0].reason
