"""LERC: what libtiff writes is read as libtiff reads it, masks and all."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import tifffile

from tilepipe.slide import open_slide
from tilepipe.tiling import Box

rasterio = pytest.importorskip("rasterio")

EXTENT = (150, 130)
Y, X = np.mgrid[: EXTENT[0], : EXTENT[1]]


def written(path, image, **options):
    """Write (c, y, x) with GDAL; return what it reads."""
    layout = {"tiled": True, "blockxsize": 64, "blockysize": 64, "compress": "LERC"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(
            path, "w", driver="GTiff", height=EXTENT[0], width=EXTENT[1], count=len(image),
            dtype=image.dtype.name, MAX_Z_ERROR=0, **{**layout, **options},
        ) as file:  # fmt: skip
            file.write(image)
        with rasterio.open(path) as file:
            return file.read()


def same(path, wanted):
    with open_slide(path) as slide:
        np.testing.assert_array_equal(slide.read(Box(0, 0, *EXTENT)), wanted)
        np.testing.assert_array_equal(slide.read(Box(9, 5, 140, 120)), wanted[:, 9:140, 5:120])


@pytest.mark.parametrize("compress", ["LERC", "LERC_DEFLATE", "LERC_ZSTD"])
@pytest.mark.parametrize("interleave", ["PIXEL", "BAND"])
@pytest.mark.parametrize("layout", [{}, {"tiled": False, "blockysize": 7}], ids=["tiles", "strips"])
@pytest.mark.parametrize("count", [1, 3])
def test_what_is_not_valid_is_nan(tmp_path, compress, interleave, layout, count):
    image = np.stack([(Y * 3 + X * k) / 7 for k in range(count)]).astype(np.float32)
    image[:, 20:110, 30:100] = np.nan
    options = {"compress": compress, "interleave": interleave, **layout}
    theirs = written(tmp_path / "a.tif", image, **options)
    np.testing.assert_array_equal(theirs, image)
    same(tmp_path / "a.tif", image)


@pytest.mark.parametrize("count", [2, 3, 64])
def test_bands_with_masks_of_their_own(tmp_path, count):
    image = np.stack([(Y * 3 + X * k) / 7 for k in range(count)]).astype(np.float32)
    for k, band in enumerate(image):
        band[k : k + 70, 30:100] = np.nan
    theirs = written(tmp_path / "a.tif", image, interleave="PIXEL")
    np.testing.assert_array_equal(theirs, image)
    same(tmp_path / "a.tif", image)


@pytest.mark.parametrize("count, photometric", [(2, "MINISBLACK"), (4, "RGB")])
def test_alpha_that_is_the_mask(tmp_path, count, photometric):
    image = np.stack([(Y + X * k) % 256 for k in range(count)]).astype(np.uint8)
    image[-1] = np.where(image[0] > 100, 255, 0)
    options = {"ALPHA": "YES", "photometric": photometric}
    theirs = written(tmp_path / "a.tif", image, **options)
    with open_slide(tmp_path / "a.tif") as slide:
        assert slide.notes == ("alpha dropped",)
    same(tmp_path / "a.tif", theirs[:-1])


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.float32])
@pytest.mark.parametrize("order", ["LITTLE", "BIG"])
@pytest.mark.parametrize("count", [1, 3])
def test_numbers(tmp_path, dtype, order, count):
    image = np.stack([(Y * 2 + X * k) % 256 for k in range(count)]).astype(dtype)
    theirs = written(tmp_path / "a.tif", image, ENDIANNESS=order)
    np.testing.assert_array_equal(theirs, image)
    same(tmp_path / "a.tif", image)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_differences_of_neighbours_are_added_up(tmp_path, dtype):
    """Only tifffile writes them into LERC."""
    image = ((Y * 3 + X * 2) % 256).astype(dtype)
    tifffile.imwrite(tmp_path / "a.tif", image, compression="lerc", predictor=True, tile=(32, 48))
    same(tmp_path / "a.tif", image[None])
