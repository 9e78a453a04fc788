"""Declared sizes of compressed tiles are read from their headers."""

from __future__ import annotations

import imagecodecs
import numpy as np
import pytest
import tifffile

from tilepipe.errors import DamageError
from tilepipe.slide import open_slide
from tilepipe.slide.codestream import declared_shape
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
