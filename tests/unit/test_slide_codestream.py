"""What compressed tiles say of themselves: their size, and whether they are still YCbCr."""

from __future__ import annotations

import imagecodecs
import numpy as np
import pytest
import tifffile

from tilepipe.errors import DamageError
from tilepipe.slide import open_slide
from tilepipe.slide.codestream import declared_shape, ycbcr_to_rgb
from tilepipe.tiling import Box

IMAGE = np.random.default_rng(0).integers(0, 255, (37, 53, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "data",
    [
        imagecodecs.png_encode(IMAGE),
        imagecodecs.jpeg2k_encode(IMAGE, codecformat="jp2"),
        imagecodecs.jpeg2k_encode(IMAGE, codecformat="j2k"),
        imagecodecs.webp_encode(IMAGE, lossless=True),
        imagecodecs.webp_encode(IMAGE, lossless=False, level=70),
    ],
    ids=["png", "jp2", "j2k", "webp lossless", "webp lossy"],
)
def test_sizes(data):
    assert declared_shape(data) == (37, 53)
    for cut in range(40):
        declared_shape(data[:cut])


def test_others():
    assert declared_shape(b"") is None
    assert declared_shape(bytes(300)) is None


@pytest.mark.parametrize("compression, encode", [("png", imagecodecs.png_encode)])
def test_a_tile_that_declares_more_than_it_should(tmp_path, compression, encode):
    path = tmp_path / "a.tif"
    image = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
    tifffile.imwrite(path, image, tile=(64, 64), compression=compression)
    bomb = encode(np.zeros((1000, 1000), np.uint8))
    with tifffile.TiffFile(path) as tiff:
        offset, count = tiff.pages[0].dataoffsets[0], tiff.pages[0].databytecounts[0]
    assert len(bomb) < count
    data = bytearray(path.read_bytes())
    data[offset : offset + len(bomb)] = bomb
    path.write_bytes(data)
    with open_slide(path) as slide, pytest.raises(DamageError, match="an image of 1000 x 1000 px"):
        slide.read(Box(0, 0, 64, 64))


def test_bytes_of_other_compressions_declare_nothing(tmp_path):
    """PackBits writes two pixels of 0x4F and two of 0x51 as a JPEG 2000 stream begins."""
    values = np.arange(250, 90, -5, dtype=np.uint8)
    values[:2] = 0x4F, 0x51
    row = b"".join(b"\xff" + bytes([value]) for value in values)
    with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
        shape = {"shape": (64, 64), "tile": (64, 64), "dtype": np.uint8, "metadata": None}
        writer.write(iter([row * 64]), compression="packbits", **shape)
    image = np.tile(np.repeat(values, 2), (64, 1))
    with open_slide(tmp_path / "a.tif") as slide:
        np.testing.assert_array_equal(slide.read(Box(0, 0, 64, 64))[0], image)


def colors():
    y, x = np.mgrid[:64, :64]
    return np.stack([x * 4, y * 4, x + y], axis=-1).astype(np.uint8)


def luma_and_chroma(rgb):
    red, green, blue = (rgb[..., k].astype(float) for k in range(3))
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    return np.stack([luma, (blue - luma) / 1.772 + 128, (red - luma) / 1.402 + 128], axis=-1)


def aperio(path, stream, *, photometric="rgb", compression=33003):
    with tifffile.TiffWriter(path) as writer:
        writer.write(
            iter([stream]),
            shape=(64, 64, 3),
            dtype=np.uint8,
            tile=(64, 64),
            photometric=photometric,
            subsampling=(1, 1),
            compression=compression,
            description="Aperio Image Library v10\n64x64 J2K/YUV16|MPP = 0.5",
            metadata=None,
        )
    return path


@pytest.mark.parametrize("compression, photometric", [(33003, "rgb"), (34712, "ycbcr")])
def test_luma_and_chroma_of_a_bare_code_stream_become_colours(tmp_path, compression, photometric):
    rgb = colors()
    ycc = np.clip(np.rint(luma_and_chroma(rgb)), 0, 255).astype(np.uint8)
    stream = imagecodecs.jpeg2k_encode(ycc, level=0, codecformat="j2k", mct=False)
    path = aperio(tmp_path / "a.svs", stream, photometric=photometric, compression=compression)
    with open_slide(path) as slide:
        pixels = np.moveaxis(slide.read(Box(0, 0, 64, 64)), 0, -1)
    assert np.abs(pixels.astype(int) - rgb).max() <= 1
    if compression == 33003:
        openslide = pytest.importorskip("openslide")
        theirs = np.asarray(openslide.OpenSlide(path).read_region((0, 0), 0, (64, 64)))[..., :3]
        assert np.abs(pixels.astype(int) - theirs).max() <= 1


@pytest.mark.parametrize(
    "options, compression, photometric",
    [
        ({"mct": True}, 33003, "rgb"),  # the decoder undoes the transform
        ({"mct": False}, 33005, "rgb"),
        ({"mct": False}, 34712, "rgb"),
    ],
)
def test_colours_of_a_code_stream_stay(tmp_path, options, compression, photometric):
    stream = imagecodecs.jpeg2k_encode(colors(), level=0, codecformat="j2k", **options)
    path = aperio(tmp_path / "a.svs", stream, photometric=photometric, compression=compression)
    with open_slide(path) as slide:
        pixels = np.moveaxis(slide.read(Box(0, 0, 64, 64)), 0, -1)
    np.testing.assert_array_equal(pixels, colors())


def test_grey_and_the_limits_of_ycbcr():
    extremes = np.array([[[0, 128, 128], [255, 128, 128], [255, 0, 255], [0, 255, 0]]], np.uint8)
    wanted = [[[0, 0, 0], [255, 255, 255], [255, 208, 28], [0, 48, 225]]]
    np.testing.assert_array_equal(ycbcr_to_rgb(extremes), wanted)


@pytest.mark.parametrize("cut", range(0, 90, 7))
def test_a_stream_cut_off_in_its_header_is_damage(tmp_path, cut):
    stream = imagecodecs.jpeg2k_encode(colors(), level=0, codecformat="j2k", mct=False)
    path = aperio(tmp_path / "a.svs", stream[: cut + 1])
    with open_slide(path) as slide, pytest.raises(DamageError):
        slide.read(Box(0, 0, 64, 64))
