"""What cannot be opened ends in one clear SlideError that names the file."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import tifffile

from tilepipe.errors import SlideError
from tilepipe.slide import open_slide, tiff_open
from tilepipe.slide.openslide_input import is_installed, open_with_openslide
from tilepipe.tiling import Box


def refuse(path, match, **options):
    with pytest.raises(SlideError, match=match) as caught:
        open_slide(path, **options)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


def test_things_that_are_not_slides(tmp_path):
    refuse(tmp_path / "none.tif", "cannot be read: No such file")
    refuse(tmp_path, "a folder without Zarr metadata")
    for name, content, what in [
        ("empty.tif", b"", "an empty file"),
        ("a.png", b"\x89PNG\r\n\x1a\n" + bytes(50), "a PNG image"),
        ("a.jpg", b"\xff\xd8\xff\xe0" + bytes(50), "a JPEG image"),
        ("a.txt", b"hello", "not a TIFF"),
        ("a.zip", b"PK\x03\x04" + bytes(50), "a ZIP archive"),
    ]:
        (tmp_path / name).write_bytes(content)
        refuse(tmp_path / name, f"is {what}; want a TIFF")
    refuse("s3://bucket/slide.tif", "local disks.*OME-Zarr on S3 can be segmented where it is")


def test_a_pipe_is_refused_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    # In a process of its own: what waits for a pipe cannot be ended from within.
    code = "import sys; from tilepipe.slide import open_slide; open_slide(sys.argv[1])"
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "pipe")],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    assert "pipe: is a pipe; slides are read from files" in result.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.zeros((4, 4), np.uint8))
    path.chmod(0)
    refuse(path, "cannot be read: Permission denied")


@pytest.mark.parametrize("mpp", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_pixel_sizes(tmp_path, mpp):
    refuse(tmp_path / "a.tif", "is not a pixel size", mpp=mpp)


@pytest.mark.parametrize("keep", [3, 8, 20, 60])
def test_headers_cut_off(tmp_path, keep):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.zeros((64, 64), np.uint8), tile=(16, 16))
    path.write_bytes(path.read_bytes()[:keep])
    refuse(path, ".")


def test_declared_size(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.zeros((100, 50), np.uint8))
    refuse(
        path, r"declares 100 x 50 px = 5000 pixels, more than the limit of 4999", max_pixels=4999
    )
    open_slide(path, max_pixels=5000).close()


def patched(path, **values):
    """Overwrite tags of the first page."""
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        for name, value in values.items():
            tiff.pages[0].tags[name].overwrite(value)


def test_more_rows_than_strips(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.zeros((100, 50), np.uint8), rowsperstrip=10)
    patched(path, ImageLength=60_000)
    refuse(path, "needs 6000 strips, the file lists 10 offsets")


def test_one_strip_that_would_fill_the_memory(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.zeros((100, 50), np.uint8), rowsperstrip=100, compression="zlib")
    patched(path, ImageLength=60_000, ImageWidth=60_000, RowsPerStrip=60_000)
    refuse(
        path, r"strips of 60000 x 60000 px \(y, x\) decode to 3433 MiB each, more than the limit"
    )


def test_raw_strips_are_limited_by_the_file(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.zeros((100, 50), np.uint8), rowsperstrip=100)
    patched(path, ImageLength=60_000, ImageWidth=60_000, RowsPerStrip=60_000)
    refuse(path, "has 5000 bytes, its rows need 3600000000")
    slide = open_slide(path, on_damage="fill")
    assert not slide.read(Box(0, 0, 10, 10)).any()
    assert len(slide.damage) == 1


@pytest.mark.parametrize("bigtiff", [False, True])
@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_pages_in_a_circle(tmp_path, bigtiff, byteorder):
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path, bigtiff=bigtiff, byteorder=byteorder) as writer:
        for _ in range(3):
            writer.write(np.zeros((20, 20), np.uint8), contiguous=False, metadata=None)
    open_slide(path).close()
    with tifffile.TiffFile(path) as tiff:
        last, second = tiff.pages[2], tiff.pages[1]
        size = 8 if bigtiff else 4
        at = last.offset + (8 + 20 * len(last.tags) if bigtiff else 2 + 12 * len(last.tags))
        target = second.offset
    data = bytearray(path.read_bytes())
    data[at : at + size] = target.to_bytes(size, "little" if byteorder == "<" else "big")
    path.write_bytes(data)
    refuse(path, "page 3 points back to an earlier one")


def test_too_many_channels(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(
        path, np.zeros((4, 4, 1025), np.uint8), photometric="minisblack", planarconfig="contig"
    )
    refuse(path, "declares 1025 channels, more than 1024")


def test_no_data_at_all(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.zeros((32, 32), np.uint8), tile=(16, 16))
    patched(path, TileOffsets=(0, 0, 0, 0), TileByteCounts=(0, 0, 0, 0))
    refuse(path, "none of its 4 tiles holds any data")


@pytest.mark.parametrize(
    "shape, axes, match",
    [
        ((5, 40, 30), "ZYX", r"a stack of focal planes \(axes ZYX, shape \(5, 40, 30\)\)"),
        ((5, 40, 30), "TYX", "a time series"),
        ((2, 3, 40, 30), "ZCYX", "a stack of focal planes"),
    ],
)
@pytest.mark.parametrize("kind", ["ome", "imagej"])
def test_stacks(tmp_path, shape, axes, match, kind):
    path = tmp_path / "a.ome.tif"
    image = np.zeros(shape, np.uint8)
    tifffile.imwrite(
        path,
        image,
        photometric="minisblack",
        metadata={"axes": axes},
        ome=kind == "ome",
        imagej=kind == "imagej",
    )
    refuse(path, match)


def test_unnamed_axis(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((5, 40, 30), np.uint8), photometric="minisblack")
    refuse(tmp_path / "a.tif", "an array with an unnamed axis")


@pytest.mark.parametrize(
    "axes, size", [("YXC", (30, 40, 5)), ("XYC", (30, 40, 5)), ("XY", (30, 40))]
)
def test_pages_that_hold_no_image(tmp_path, axes, size):
    """One row of all channels in each page: five of them were taken for an image of 40 x 5 px."""
    tifffile.imwrite(tmp_path / "a.tif", np.zeros(size, np.uint8), photometric="minisblack",
                     metadata={"axes": axes})  # fmt: skip
    refuse(tmp_path / "a.tif", "write it with y and x in each page")


def test_pages_of_one_size(tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (3, 20, 20), dtype=np.uint8)
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        for image in images:
            writer.write(image, contiguous=False, metadata=None)
    with open_slide(tmp_path / "a.tif") as slide:
        assert "3 pages of equal size; the first one is used" in slide.notes
        np.testing.assert_array_equal(slide.read(Box(0, 0, 20, 20))[0], images[0])


def test_several_images(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        writer.write(np.full((20, 20), 7, np.uint8), metadata=None)
        writer.write(np.zeros((33, 50, 3), np.uint8), photometric="rgb", metadata=None)
    with open_slide(tmp_path / "a.tif") as slide:
        assert "2 images in the file; the first one is used" in slide.notes
        assert slide.levels[0].shape == (20, 20)
        assert len(slide.levels) == 1


def test_descriptors_are_given_back(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.zeros((40, 40), np.float64))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        refuse(path, "float64")
    tifffile.imwrite(path, np.zeros((40, 40), np.uint8))
    for _ in range(5):
        open_slide(path).close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_importing_slides_is_light():
    code = (
        "import sys, tilepipe.slide; "
        "print([n for n in ('torch', 'dask', 'zarr', 'openslide') if n in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"


@pytest.mark.skipif(not is_installed(), reason="needs the extra wsi")
def test_openslide_and_tifffile_agree(data):
    path = str(data / "wsi" / "CMU-1-Small-Region.svs")
    with (
        open_with_openslide(path, mpp=None, max_pixels=2**40) as other,
        open_slide(path) as slide,
    ):
        assert other.format == "openslide"
        assert other.mpp == slide.mpp == (0.499, 0.499)
        assert other.levels[0].shape == slide.levels[0].shape
        box = Box(500, 700, 900, 1300)
        np.testing.assert_array_equal(other.read(box), slide.read(box))
        assert other.fingerprint() == slide.fingerprint()


@pytest.mark.skipif(not is_installed(), reason="needs the extra wsi")
def test_what_openslide_cannot_read_either(tmp_path):
    (tmp_path / "a.svs").write_bytes(b"II*\0" + bytes(100))
    with pytest.raises(SlideError, match="OpenSlide cannot read it"):
        open_with_openslide(str(tmp_path / "a.svs"), mpp=None, max_pixels=2**40)


@pytest.mark.parametrize("harm", ["other pixels", "damage"])
def test_a_slide_that_is_written_over_while_it_is_opened_is_told(tmp_path, monkeypatch, harm):
    """Where its tiles lie was read before, its pixels would be read afterwards."""
    path = tmp_path / "a.tif"
    image = np.arange(64 * 64, dtype=np.uint8).reshape(64, 64)
    compression = "zlib" if harm == "damage" else None
    tifffile.imwrite(path, image, tile=(32, 32), compression=compression)
    meaning = tiff_open.read_meaning

    def written(*args, **settings):
        with path.open("r+b") as file:
            file.seek(path.stat().st_size - 20)
            file.write(bytes(20))
        os.utime(path, (1, 1))  # clocks of files tick in milliseconds
        return meaning(*args, **settings)

    monkeypatch.setattr(tiff_open, "read_meaning", written)
    with (
        open_slide(path) as slide,
        pytest.raises(SlideError, match="was changed by another program while it was read"),
    ):
        slide.read(Box(0, 0, 64, 64))


@pytest.mark.skipif(not is_installed(), reason="needs the extra wsi")
def test_openslide_reads_an_overview_where_it_is(tmp_path):
    """It divides by one number for both sides; the corner was off by several px far out."""
    y, x = np.mgrid[:200, :3000]
    half = np.stack([x % 256, y, (x // 256) * 20], -1).astype(np.uint8)
    options = {"tile": (256, 256), "photometric": "rgb", "metadata": None}
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        writer.write(np.zeros((401, 6001, 3), np.uint8), **options)
        writer.write(half, subfiletype=1, **options)
    with open_with_openslide(str(tmp_path / "a.tif"), mpp=None, max_pixels=2**40) as slide:
        for box in (Box(0, 0, 50, 100), Box(100, 2830, 190, 2990)):
            got = slide.read(box, level=1).astype(float)
            wanted = np.moveaxis(half[box.slices], -1, 0)
            assert np.abs(got - wanted)[:, 1:-1, 1:-1].max() <= 1
