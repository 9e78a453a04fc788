"""Any box of any layout equals the slice of the whole image; levels, planes and turns included."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from tilepipe.errors import SlideError
from tilepipe.slide import open_slide
from tilepipe.slide.pixels import Orientation
from tilepipe.tiling import Box

CODECS = [None, "zlib", "lzw", "zstd", "packbits", "lzma"]


@st.composite
def layouts(draw):
    tiled = draw(st.booleans())
    codec = draw(st.sampled_from(CODECS))
    options = {"compression": codec, "byteorder": draw(st.sampled_from("<>"))}
    if codec in ("zlib", "lzw", "zstd"):
        options["predictor"] = draw(st.booleans())
    if tiled:
        sides = st.sampled_from([16, 32, 48, 128])
        options["tile"] = (draw(sides), draw(sides))
    else:
        options["rowsperstrip"] = draw(st.integers(1, 90))
    return options


@st.composite
def boxes(draw, shape):
    y0, y1 = sorted(draw(st.tuples(*[st.integers(0, shape[0])] * 2)))
    x0, x1 = sorted(draw(st.tuples(*[st.integers(0, shape[1])] * 2)))
    return Box(y0, x0, y1, x1)


@settings(max_examples=150, deadline=None)
@given(st.data(), layouts())
def test_box_is_a_slice(data, layout):
    shape = data.draw(st.tuples(st.integers(1, 130), st.integers(1, 130)))
    samples = data.draw(st.sampled_from([1, 3, 4]))
    dtype = data.draw(st.sampled_from([np.uint8, np.uint16, np.float32]))
    planar = data.draw(st.sampled_from(["contig", "separate"])) if samples > 1 else None
    value = data.draw(st.integers(1, 8))
    rng = np.random.default_rng(0)
    image = (rng.random((*shape, samples)) * 250).astype(dtype)
    stored = np.moveaxis(image, -1, 0) if planar == "separate" else image
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tif"
        tifffile.imwrite(
            path,
            stored[..., 0] if samples == 1 else stored,
            photometric="minisblack" if samples == 1 else "rgb",
            planarconfig=planar,
            extrasamples=["unassalpha"] if samples == 4 else None,
            metadata=None,
            extratags=[(274, 3, 1, value, True)],
            **layout,
        )
        kept = np.moveaxis(image[..., :3] if samples == 4 else image, -1, 0)
        shown = Orientation(value).turn(kept)
        with open_slide(path) as slide:
            assert slide.levels[0].shape == shown.shape[1:]
            for _ in range(4):
                box = data.draw(boxes(slide.levels[0].shape))
                got = slide.read(box)
                assert got.dtype == dtype
                assert got.flags.c_contiguous
                np.testing.assert_array_equal(got, shown[(slice(None), *box.slices)])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_jpeg_box_is_a_slice_of_what_tifffile_decodes(data):
    shape = data.draw(st.tuples(st.integers(1, 100), st.integers(1, 100)))
    photometric = data.draw(st.sampled_from(["minisblack", "rgb", "ycbcr"]))
    tile = data.draw(st.sampled_from([(16, 16), (32, 48), None]))
    y, x = np.mgrid[: shape[0], : shape[1]]
    grey = (127 + 100 * np.sin(y / 5 + x / 7)).astype(np.uint8)
    image = grey if photometric == "minisblack" else np.stack([grey, grey // 2, 255 - grey], -1)
    layout = {"tile": tile} if tile else {"rowsperstrip": data.draw(st.sampled_from([16, 48, 96]))}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tif"
        tifffile.imwrite(path, image, photometric=photometric, compression="jpeg", **layout)
        wanted = tifffile.imread(path).reshape(*shape, -1)
        with open_slide(path) as slide:
            box = data.draw(boxes(shape))
            np.testing.assert_array_equal(np.moveaxis(slide.read(box), 0, -1), wanted[box.slices])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_bytes_in_the_header_end_in_pixels_or_a_slide_error(data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tif"
        image = np.arange(60 * 50, dtype=np.uint16).reshape(60, 50)
        tifffile.imwrite(path, image, tile=(16, 16), compression="zlib", metadata=None)
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 6))):
            content[data.draw(st.integers(0, min(400, len(content) - 1)))] = data.draw(
                st.integers(0, 255)
            )
        path.write_bytes(content)
        said = str(path)
        try:
            with open_slide(path, max_pixels=10**7) as slide:
                y, x = slide.levels[0].shape
                slide.read(Box(0, 0, min(y, 100), min(x, 100)))
        except SlideError as error:
            said = str(error)
        assert said.startswith(str(path))
