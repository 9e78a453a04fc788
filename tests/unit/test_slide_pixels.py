"""What samples mean: dtypes kept or exactly widened, palettes, alpha, orientation."""

from __future__ import annotations

import warnings

import imagecodecs
import numpy as np
import pytest
import tifffile

from tilepipe.errors import SlideError
from tilepipe.slide import open_slide
from tilepipe.slide.pixels import Orientation
from tilepipe.tiling import Box


def read(path):
    with open_slide(path) as slide:
        return slide.read(Box.of_shape(slide.levels[0].shape)), slide


@pytest.mark.parametrize(
    "dtype, becomes",
    [
        (np.uint8, np.uint8),
        (np.uint16, np.uint16),
        (np.float32, np.float32),
        (np.int8, np.float32),
        (np.int16, np.float32),
        (np.float16, np.float32),
        (np.bool_, np.uint8),
    ],
)
def test_every_value_survives(tmp_path, dtype, becomes):
    if np.dtype(dtype).kind == "b":
        image = np.random.default_rng(0).random((40, 50)) > 0.5
    elif np.dtype(dtype).kind == "f":
        image = np.random.default_rng(0).normal(size=(40, 50)).astype(dtype)
    else:
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
        image = np.linspace(low, high, 2000).astype(dtype).reshape(40, 50)
    tifffile.imwrite(tmp_path / "a.tif", image)
    pixels, slide = read(tmp_path / "a.tif")
    assert slide.dtype == pixels.dtype == becomes
    np.testing.assert_array_equal(pixels[0], image)
    assert bool(slide.notes) == (dtype != becomes)
    unknown = dtype in (np.int8, np.int16, np.bool_)
    assert any(note.startswith("warning:") for note in slide.notes) == unknown


@pytest.mark.parametrize("on_damage", ["error", "fill"])
def test_colours_of_one_bit_a_sample(tmp_path, on_damage):
    image = np.random.default_rng(0).random((3, 40, 50)) > 0.5
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="rgb", planarconfig="separate")
    with open_slide(tmp_path / "a.tif", on_damage=on_damage) as slide:
        assert slide.rgb
        np.testing.assert_array_equal(slide.read(Box(0, 0, 40, 50)), image)


@pytest.mark.parametrize(
    "dtype", [np.uint32, np.int32, np.uint64, np.int64, np.float64, np.complex64, np.complex128]
)
def test_values_that_would_not_survive(tmp_path, dtype):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((4, 4), dtype))
    with pytest.raises(SlideError, match=f"{np.dtype(dtype)} samples cannot be stored exactly"):
        open_slide(tmp_path / "a.tif")


@pytest.mark.parametrize("photometric, what", [("separated", "CMYK inks"), ("cielab", "CIE")])
def test_colours_that_are_not_light(tmp_path, photometric, what):
    image = np.zeros((8, 8, 4 if photometric == "separated" else 3), np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", image, photometric=photometric)
    with pytest.raises(SlideError, match=what):
        open_slide(tmp_path / "a.tif")


def test_raw_ycbcr(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((8, 8, 3), np.uint8), photometric="ycbcr")
    with pytest.raises(SlideError, match="raw YCbCr"):
        open_slide(tmp_path / "a.tif")


def test_luma_and_chroma_in_planes(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        writer.write(
            (imagecodecs.jpeg_encode(np.zeros((16, 16), np.uint8)) for _ in range(3)),
            shape=(3, 16, 16),
            dtype=np.uint8,
            tile=(16, 16),
            photometric="ycbcr",
            planarconfig="separate",
            compression="jpeg",
            subsampling=(1, 1),
            metadata=None,
        )
    with pytest.raises(SlideError, match="raw YCbCr"):
        open_slide(tmp_path / "a.tif")


@pytest.mark.parametrize("order, read", [("LITTLE", True), ("BIG", False)])
@pytest.mark.parametrize("ids", [False, True])
def test_numbers_of_24_bits_are_read_or_refused(tmp_path, order, read, ids):
    rasterio = pytest.importorskip("rasterio")
    image = np.random.default_rng(0).integers(0, 1 << 24, (1, 20, 30), dtype=np.uint32)
    options = {"driver": "GTiff", "width": 30, "height": 20, "count": 1, "dtype": "uint32"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        path = tmp_path / "a.tif"
        with rasterio.open(path, "w", nbits=24, ENDIANNESS=order, **options) as file:
            file.write(image)
    if read:
        with open_slide(path, ids=ids) as slide:
            np.testing.assert_array_equal(slide.read(Box(0, 0, 20, 30)), image)
    else:
        with pytest.raises(SlideError, match="24-bit samples in big-endian order"):
            open_slide(path, ids=ids)


@pytest.mark.parametrize("bits, dtype", [(4, np.uint8), (12, np.uint16)])
def test_samples_narrower_than_their_numbers_are_told(tmp_path, bits, dtype):
    image = np.arange(64, dtype=dtype).reshape(8, 8) % (1 << bits)
    tifffile.imwrite(tmp_path / "a.tif", image, bitspersample=bits)
    pixels, slide = read(tmp_path / "a.tif")
    np.testing.assert_array_equal(pixels[0], image)
    assert f"{bits}-bit samples are stored as they are" in slide.notes[0]


def test_palette_gives_its_colours(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (30, 20), dtype=np.uint8)
    colors = np.random.default_rng(1).integers(0, 256, (3, 256)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="palette", colormap=colors * 257)
    pixels, slide = read(tmp_path / "a.tif")
    assert (slide.rgb, slide.channels, slide.dtype) == (True, 3, np.uint8)
    np.testing.assert_array_equal(pixels, colors[:, image])


def test_grey_with_alpha_and_with_an_unknown_sample(tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (30, 20, 2), dtype=np.uint8)
    for kind, channels in [("unassalpha", 1), ("assocalpha", 1), ("unspecified", 2)]:
        tifffile.imwrite(
            tmp_path / "a.tif",
            image,
            photometric="minisblack",
            planarconfig="contig",
            extrasamples=[kind],
            metadata=None,
        )
        pixels, slide = read(tmp_path / "a.tif")
        assert slide.channels == channels
        assert not slide.rgb
        np.testing.assert_array_equal(pixels, np.moveaxis(image[..., :channels], -1, 0))


def test_white_is_zero_keeps_the_values(tmp_path):
    image = np.arange(64, dtype=np.uint8).reshape(8, 8)
    tifffile.imwrite(tmp_path / "a.tif", image, photometric="miniswhite")
    pixels, slide = read(tmp_path / "a.tif")
    np.testing.assert_array_equal(pixels[0], image)
    assert "white is zero in this file; values kept as stored" in slide.notes


TURNS = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a.swapaxes(0, 1), 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("value", range(1, 9))
def test_orientation(tmp_path, value):
    image = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    tifffile.imwrite(
        tmp_path / "a.tif",
        image,
        tile=(16, 32),
        photometric="rgb",
        resolution=(20_000, 10_000),
        resolutionunit="CENTIMETER",
        extratags=[(274, 3, 1, value, True)],
    )
    shown = TURNS[value](image)
    with open_slide(tmp_path / "a.tif") as slide:
        assert slide.levels[0].shape == shown.shape[:2]
        assert slide.levels[0].tile == ((32, 16) if value >= 5 else (16, 32))
        assert slide.mpp == ((0.5, 1.0) if value >= 5 else (1.0, 0.5))
        for box in [Box.of_shape(shown.shape[:2]), Box(3, 7, 41, 20), Box(0, 49, 50, 50)]:
            got = np.moveaxis(slide.read(box), 0, -1)
            np.testing.assert_array_equal(got, shown[box.slices])


@pytest.mark.parametrize("value", range(1, 9))
def test_boxes_turn_there_and_back(value):
    orientation = Orientation(value)
    shape = (50, 70)
    for box in Box.of_shape(shape).split((13, 17)):
        stored = orientation.stored_box(box, shape)
        assert orientation.shown_box(stored, shape) == box
        assert stored.area == box.area


def test_real_orientations_show_one_picture(data):
    folder = data / "tiff_variants" / "pillow"
    first, _ = read(folder / "g4_orientation_1.tif")
    for value in range(2, 9):
        other, _ = read(folder / f"g4_orientation_{value}.tif")
        assert other.shape == first.shape
        # Scanned again for each file: a few pixels in a thousand differ, a wrong turn 95.
        assert (other != first).mean() < 0.005
