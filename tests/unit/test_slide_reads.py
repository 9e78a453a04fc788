"""Region reads: every layout gives tifffile's pixels, each tile decoded once, memory bounded."""

from __future__ import annotations

import threading
import tracemalloc
import warnings

import numpy as np
import pytest
import tifffile

from tilepipe.errors import DamageError, SlideError
from tilepipe.slide import Slide, open_slide
from tilepipe.slide.cache import SegmentCache
from tilepipe.slide.tiff_open import open_tiff
from tilepipe.tiling import Box


def texture(shape, dtype=np.uint8, seed=0):
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return rng.normal(size=shape).astype(dtype)
    return rng.integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def whole(slide):
    return slide.read(Box.of_shape(slide.levels[0].shape))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize(
    "layout",
    [
        {"tile": (32, 48)},
        {"tile": (32, 48), "compression": "zlib", "predictor": True},
        {"tile": (16, 16), "compression": "lzw", "byteorder": ">"},
        {"rowsperstrip": 7},
        {"rowsperstrip": 7, "byteorder": ">"},
        {"rowsperstrip": 7, "compression": "zstd"},
        {"rowsperstrip": 1000},
        {"tile": (32, 48), "bigtiff": True, "compression": "zlib"},
    ],
    ids=str,
)
def test_grey_layouts(tmp_path, layout, dtype):
    image = texture((101, 67), dtype)
    tifffile.imwrite(tmp_path / "a.tif", image, **layout)
    with open_slide(tmp_path / "a.tif") as slide:
        assert isinstance(slide, Slide)
        assert slide.dtype == dtype
        assert slide.dtype.isnative
        assert (slide.channels, slide.rgb) == (1, False)
        np.testing.assert_array_equal(whole(slide)[0], image)
        np.testing.assert_array_equal(slide.read(Box(33, 5, 80, 66))[0], image[33:80, 5:66])


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("layout", [{"tile": (32, 32)}, {"rowsperstrip": 5}], ids=str)
@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("samples", [3, 4])
def test_colour_layouts(tmp_path, planar, layout, compression, samples):
    image = texture((70, 45, samples))
    stored = image if planar == "contig" else np.moveaxis(image, -1, 0)
    tifffile.imwrite(
        tmp_path / "a.tif",
        stored,
        photometric="rgb",
        planarconfig=planar,
        compression=compression,
        extrasamples=["unassalpha"] if samples == 4 else None,
        metadata=None,
        **layout,
    )
    with open_slide(tmp_path / "a.tif") as slide:
        assert (slide.channels, slide.rgb) == (3, True)
        assert slide.channel_names == ("red", "green", "blue")
        assert ("alpha dropped" in slide.notes) == (samples == 4)
        box = Box(3, 2, 69, 44)
        np.testing.assert_array_equal(slide.read(box), np.moveaxis(image[3:69, 2:44, :3], -1, 0))


def test_channels_of_ome_tiff(tmp_path):
    image = texture((4, 50, 40), np.uint16)
    tifffile.imwrite(
        tmp_path / "a.ome.tif",
        image,
        metadata={"axes": "CYX", "Channel": {"Name": ["DAPI", "CD3", "CD8", "PanCK"]}},
        tile=(16, 32),
        photometric="minisblack",
    )
    with open_slide(tmp_path / "a.ome.tif") as slide:
        assert slide.format == "ome"
        assert slide.channels == 4
        assert not slide.rgb
        assert slide.channel_names == ("DAPI", "CD3", "CD8", "PanCK")
        np.testing.assert_array_equal(whole(slide), image)


def test_channels_of_imagej_hyperstack_without_pages_of_their_own(tmp_path):
    image = texture((3, 50, 40), np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", image, imagej=True, metadata={"axes": "CYX"})
    with open_slide(tmp_path / "a.tif") as slide:
        assert (slide.format, slide.channels) == ("imagej", 3)
        np.testing.assert_array_equal(whole(slide), image)
        np.testing.assert_array_equal(slide.read(Box(7, 9, 30, 40)), image[:, 7:30, 9:40])


@pytest.mark.parametrize(
    "photometric, subsampling",
    [("rgb", None), ("ycbcr", (1, 1)), ("ycbcr", (2, 1)), ("ycbcr", (2, 2)), ("minisblack", None)],
)
def test_strict_jpeg_gives_the_pixels_of_tifffile(tmp_path, photometric, subsampling):
    y, x = np.mgrid[:140, :130]
    grey = (127 + 90 * np.sin(y / 9) * np.cos(x / 7)).astype(np.uint8)
    image = np.stack([grey, 255 - grey, grey // 2], -1)
    if photometric == "minisblack":
        image = grey
    tifffile.imwrite(
        tmp_path / "a.tif",
        image,
        tile=(48, 32),
        photometric=photometric,
        compression="jpeg",
        subsampling=subsampling,
    )
    wanted = tifffile.imread(tmp_path / "a.tif")
    with open_slide(tmp_path / "a.tif") as slide:
        got = np.moveaxis(whole(slide), 0, -1)
        np.testing.assert_array_equal(got.squeeze(), wanted)


def test_each_tile_is_decoded_once_in_reading_order(tmp_path):
    image = texture((512, 640, 3))
    tifffile.imwrite(tmp_path / "a.tif", image, tile=(64, 64), compression="zlib")
    with open_slide(tmp_path / "a.tif") as slide:
        for box in Box.of_shape((512, 640)).split((100, 100)):
            slide.read(box)
        assert slide.n_decodes == (512 // 64) * (640 // 64)


def test_raw_strips_are_not_decoded(tmp_path):
    image = texture((300, 40_000), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", image, rowsperstrip=300)
    with open_slide(tmp_path / "a.tif") as slide:
        narrow, wide = Box(17, 39_000, 290, 39_100), Box(5, 1, 6, 40_000)
        np.testing.assert_array_equal(slide.read(narrow)[0], image[narrow.slices])
        np.testing.assert_array_equal(slide.read(wide)[0], image[wide.slices])
        assert slide.n_decodes == 0


def test_threads_share_one_decode(tmp_path):
    image = texture((256, 256), np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", image, tile=(256, 256), compression="zlib")
    with open_slide(tmp_path / "a.tif") as slide:
        results = []
        threads = [
            threading.Thread(target=lambda: results.append(whole(slide)[0])) for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert slide.n_decodes == 1
        assert all(np.array_equal(result, image) for result in results)
        assert len(results) == 8


def test_cache_stays_under_its_limit():
    cache = SegmentCache(10_000)
    for key in range(20):
        cache.get(key, lambda: np.zeros(3000, np.uint8))
        assert cache.held_bytes <= 10_000
    cache.get("huge", lambda: np.zeros(50_000, np.uint8))
    assert cache.held_bytes <= 10_000
    loads = cache.loads
    cache.get(19, lambda: np.zeros(3000, np.uint8))
    assert cache.loads == loads


def test_tiny_tiles_take_no_more_memory_than_the_cache_may():
    limit = 2 << 20
    cache = SegmentCache(limit)
    tracemalloc.start()
    for key in range(20_000):
        cache.get((0, 0, key), lambda: np.zeros((1, 8, 8, 1), np.uint8)[0])
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 1.2 * limit


def test_cache_forgets_a_failed_load():
    cache = SegmentCache(1000)

    def fail():
        raise ValueError("broken")

    for _ in range(2):
        with pytest.raises(ValueError, match="broken"):
            cache.get(1, fail)
    assert cache.get(1, lambda: np.ones(3)).sum() == 3


def test_small_cache_gives_the_same_pixels(tmp_path):
    image = texture((130, 130, 3))
    tifffile.imwrite(tmp_path / "a.tif", image, tile=(32, 32), compression="zlib")
    with open_tiff(
        str(tmp_path / "a.tif"), mpp=None, max_pixels=10**6, on_damage="error", cache_bytes=4000
    ) as slide:
        np.testing.assert_array_equal(np.moveaxis(whole(slide), 0, -1), image)


def test_boxes_outside_and_levels_that_do_not_exist(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", texture((20, 30)))
    slide = open_slide(tmp_path / "a.tif")
    assert slide.read(Box(4, 4, 4, 9)).shape == (1, 0, 5)
    with pytest.raises(SlideError, match="box y 0:21, x 0:30 leaves level 0 of 20 x 30 px"):
        slide.read(Box(0, 0, 21, 30))
    with pytest.raises(SlideError, match="leaves level 0"):
        slide.read(Box(-1, 0, 5, 5))
    with pytest.raises(SlideError, match="no level 1; levels 0 to 0 exist"):
        slide.read(Box(0, 0, 1, 1), level=1)
    slide.close()
    slide.close()
    with pytest.raises(SlideError, match="was closed"):
        slide.read(Box(0, 0, 1, 1))


def test_levels_of_a_pyramid(tmp_path):
    image = texture((200, 300, 3))
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        writer.write(image, tile=(64, 64), subifds=2, photometric="rgb")
        writer.write(image[::2, ::2], tile=(64, 64), subfiletype=1, photometric="rgb")
        writer.write(image[::4, ::4], tile=(64, 64), subfiletype=1, photometric="rgb")
    with open_slide(tmp_path / "a.tif") as slide:
        assert [level.shape for level in slide.levels] == [(200, 300), (100, 150), (50, 75)]
        assert slide.levels[2].downsample == (4.0, 4.0)
        assert slide.levels[0].tile == (64, 64)
        assert slide.levels[0].compression == "none"
        got = slide.read(Box(3, 4, 50, 70), level=2)
        np.testing.assert_array_equal(got, np.moveaxis(image[::4, ::4][3:50, 4:70], -1, 0))


@pytest.mark.parametrize("photometric", ["MINISBLACK", "MINISWHITE"])
@pytest.mark.parametrize("interleave", ["PIXEL", "BAND"])
def test_three_greys_in_a_jpeg_are_no_colours(tmp_path, photometric, interleave):
    rasterio = pytest.importorskip("rasterio")
    y, x = np.mgrid[:64, :64]
    image = np.stack([x * 4, y * 4, x + y]).astype(np.uint8)
    options = {"driver": "GTiff", "width": 64, "height": 64, "count": 3, "dtype": "uint8"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(
            tmp_path / "a.tif",
            "w",
            compress="JPEG",
            JPEG_QUALITY=100,
            photometric=photometric,
            interleave=interleave,
            **options,
        ) as file:
            file.write(image)
        with rasterio.open(tmp_path / "a.tif") as file:
            theirs = file.read()
    with open_slide(tmp_path / "a.tif") as slide:
        pixels = whole(slide)
        assert not slide.rgb
    assert np.abs(pixels.astype(int) - theirs).max() <= 1
    assert np.abs(pixels.astype(int) - image).max() <= 3


@pytest.mark.parametrize("compression", ["lzw", "packbits", "zlib", "zstd"])
@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("predictor", [False, True])
def test_a_last_strip_may_have_all_its_rows(tmp_path, compression, planar, predictor):
    """GDAL writes it so where it fills what was never written; decoders had too little room."""
    path = tmp_path / "a.tif"
    image = texture((64, 90, 3))
    options = {"compression": compression, "predictor": predictor, "rowsperstrip": 16}
    stored = image if planar == "contig" else np.moveaxis(image, -1, 0)
    tifffile.imwrite(path, stored, photometric="rgb", planarconfig=planar, **options)
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tiff.pages[0].tags["ImageLength"].overwrite(57)
    with open_slide(path) as slide:
        assert slide.levels[0].shape == (57, 90)
        got = slide.read(Box(0, 0, 57, 90))
        last = slide.read(Box(50, 3, 56, 80))
    wanted = np.moveaxis(image[:57], -1, 0)
    np.testing.assert_array_equal(got, wanted)
    np.testing.assert_array_equal(last, wanted[:, 50:56, 3:80])


@pytest.mark.parametrize(
    ("count", "options"), [(4, {"photometric": "RGB", "alpha": "YES"}), (4, {}), (2, {})]
)
@pytest.mark.parametrize("harm", [bytes(600), b"\xff\xd9", b"\x55\xff\x01\xff\xd5"])
def test_damage_of_two_and_four_samples_in_a_jpeg_is_told(tmp_path, count, options, harm):
    """Grey and alpha, colours and infrared: the decoder that knows their colours says nothing."""
    rasterio = pytest.importorskip("rasterio")
    path = tmp_path / "a.tif"
    image = np.moveaxis(texture((61, 121, count)) // 4 + 60, -1, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(
            path, "w", driver="GTiff", width=121, height=61, count=count, dtype="uint8",
            compress="JPEG", tiled=True, blockxsize=64, blockysize=64, interleave="pixel",
            **options,
        ) as file:  # fmt: skip
            file.write(image)
        with rasterio.open(path) as file:
            theirs = file.read()
    with open_slide(path) as slide:
        np.testing.assert_array_equal(whole(slide), theirs[: slide.channels])
    with tifffile.TiffFile(path) as tiff:
        at = tiff.pages[0].dataoffsets[1] + tiff.pages[0].databytecounts[1] // 2
    data = bytearray(path.read_bytes())
    data[at : at + len(harm)] = harm
    path.write_bytes(data)
    with open_slide(path) as slide:
        slide.read(Box(0, 0, 61, 64))
        with pytest.raises(DamageError, match=r"tile 1 .* cannot be decoded"):
            whole(slide)
