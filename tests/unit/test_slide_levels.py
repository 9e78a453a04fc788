"""Levels: only the same image made smaller counts, whatever order the file has."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile

from tilepipe.slide import open_slide
from tilepipe.tiling import Box

GREY = np.random.default_rng(0).integers(0, 255, (240, 320), dtype=np.uint8)


def write(path, pages):
    with tifffile.TiffWriter(path) as writer:
        for number, page in enumerate(pages):
            writer.write(
                page, tile=(64, 64), subfiletype=1 if number else 0, metadata=None,
                photometric="minisblack" if page.ndim == 2 else "rgb",
            )  # fmt: skip


def shapes(path):
    with open_slide(path) as slide:
        for number, level in enumerate(slide.levels):
            assert slide.read(Box.of_shape(level.shape), level=number).shape[1:] == level.shape
        return [level.shape for level in slide.levels], slide.notes


def test_overviews_in_any_order(tmp_path):
    write(tmp_path / "a.tif", [GREY, GREY[::8, ::8], GREY[::2, ::2], GREY[::4, ::4]])
    found, notes = shapes(tmp_path / "a.tif")
    assert found == [(240, 320), (120, 160), (60, 80), (30, 40)]
    assert notes == ()


def test_ratios_that_are_not_two(tmp_path):
    sides = [(240, 320), (61, 81), (15, 20), (7, 9)]
    write(tmp_path / "a.tif", [GREY[:y, :x] for y, x in sides])
    found, _ = shapes(tmp_path / "a.tif")
    assert found == sides
    with open_slide(tmp_path / "a.tif") as slide:
        assert slide.levels[1].downsample == pytest.approx((240 / 61, 320 / 81))


def test_another_aspect_is_no_overview(tmp_path):
    write(tmp_path / "a.tif", [GREY, GREY[:120, :100], GREY[::4, ::4]])
    found, notes = shapes(tmp_path / "a.tif")
    assert found == [(240, 320), (60, 80)]
    assert any("another aspect" in note for note in notes)


@pytest.mark.parametrize("turn", [np.asarray, np.transpose])
def test_a_pixel_of_the_shorter_side_is_rounding(tmp_path, turn):
    """Halved and rounded up, a side of 97 px is 49, 25, …; the longer one tells nothing of it."""
    long = np.random.default_rng(0).integers(0, 255, (1030, 97), dtype=np.uint8)
    pages = [np.ascontiguousarray(turn(long[:: 2**k, :: 2**k])) for k in range(4)]
    write(tmp_path / "a.tif", pages)
    assert shapes(tmp_path / "a.tif") == ([page.shape for page in pages], ())


def test_another_kind_of_pixels_is_no_overview(tmp_path):
    other = GREY[::2, ::2].astype(np.uint16)
    write(tmp_path / "a.tif", [GREY, other, np.stack([GREY[::4, ::4]] * 3, -1)])
    found, _ = shapes(tmp_path / "a.tif")
    assert found == [(240, 320)]


def test_an_overview_that_is_damaged_in_structure_is_left_out(tmp_path):
    write(tmp_path / "a.tif", [GREY, GREY[::2, ::2]])
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+b") as tiff:
        tiff.pages[1].tags["Compression"].overwrite(51234)
    found, notes = shapes(tmp_path / "a.tif")
    assert found == [(240, 320)]
    assert any("ignored" in note for note in notes)


def test_real_file_whose_pages_are_sorted_oddly(data):
    path = data / "geotiff" / "rio-cogeo" / "image_sorted.tif"
    with open_slide(path) as slide:
        assert [level.shape for level in slide.levels] == [
            (512,) * 2,
            (256,) * 2,
            (128,) * 2,
            (64,) * 2,
        ]
        full = slide.read(Box(0, 0, 512, 512))
        for number, step in ((1, 2), (2, 4), (3, 8)):
            side = 512 // step
            np.testing.assert_array_equal(
                slide.read(Box(0, 0, side, side), level=number), full[:, ::step, ::step]
            )


@pytest.mark.parametrize(
    "name, sides",
    [
        ("wsi/openslide_fixtures/boxes.tiff", [(250, 300), (125, 150), (62, 75), (31, 37)]),
        ("wsi/test3-DAPI-2-(387).ndpi", [(4864, 3968), (2432, 1984), (1216, 992), (608, 496)]),
        ("geotiff/rio-tiler/cog_dateline.tif", [(2355, 2325), (589, 581), (295, 291), (147, 145)]),
    ],
)
def test_real_pyramids(data, name, sides):
    with open_slide(data / name) as slide:
        assert [level.shape for level in slide.levels] == sides


@pytest.mark.parametrize("axes, order", [("CYX", (0, 1, 2)), ("YXC", (1, 2, 0))])
def test_channels_that_are_samples_of_one_page(tmp_path, axes, order):
    pixels = np.random.default_rng(0).integers(0, 255, (5, 240, 320), dtype=np.uint8)
    tifffile.imwrite(
        tmp_path / "a.tif", np.ascontiguousarray(pixels.transpose(order)), tile=(128, 128),
        photometric="minisblack", planarconfig="separate" if axes == "CYX" else "contig",
        metadata={"axes": axes},
    )  # fmt: skip
    with open_slide(tmp_path / "a.tif") as slide:
        assert slide.channels == 5
        np.testing.assert_array_equal(slide.read(Box(0, 0, 240, 320)), pixels)


@pytest.mark.parametrize("as_subifd", [False, True])
def test_a_thumbnail_or_mask_before_the_image(tmp_path, as_subifd):
    image = np.random.default_rng(0).integers(0, 255, (160, 200, 3), dtype=np.uint8)
    options = {"photometric": "rgb", "metadata": None}
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        writer.write(image[::4, ::4].copy(), subfiletype=1, subifds=int(as_subifd), **options)
        writer.write(image, subfiletype=0, **options)
    with tifffile.TiffWriter(tmp_path / "b.tif") as writer:
        writer.write(image[..., 0] > 128, subfiletype=4, metadata=None)
        writer.write(image, **options)
    for name, sides in (("a.tif", [(160, 200), (40, 50)]), ("b.tif", [(160, 200)])):
        with open_slide(tmp_path / name) as slide:
            assert [level.shape for level in slide.levels] == sides
            assert slide.rgb
            np.testing.assert_array_equal(
                slide.read(Box(0, 0, 160, 200)), np.moveaxis(image, -1, 0)
            )
            assert slide.notes == ("the file begins with a smaller copy or a mask of its image",)
