"""Tissue masks: glass is found, tissue is never thrown away, fluorescence is left alone."""

from __future__ import annotations

import io
import threading

import numpy as np
import pytest
import tifffile
from PIL import Image

from tilepipe.errors import SlideError
from tilepipe.slide import TissueMask, open_slide, tissue_mask
from tilepipe.tiling import Box


def bright_field(path, *, side=512, spot=None, **options):
    rng = np.random.default_rng(0)
    image = np.clip(rng.normal(242, 2, (side, side, 3)), 0, 255).astype(np.uint8)
    spot = spot or Box(125, 175, 275, 375)
    stained = np.array([200, 150, 190]) + rng.normal(0, 8, (*spot.shape, 3))
    image[spot.slices] = stained.astype(np.uint8)
    tifffile.imwrite(path, image, tile=(64, 64), photometric="rgb", **options)
    return path, spot


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr("tilepipe.slide.tissue._WANTED_PX", 256)


def test_spot_is_tissue_and_glass_is_not(tmp_path):
    path, spot = bright_field(tmp_path / "a.tif")
    with open_slide(path) as slide:
        mask = tissue_mask(slide)
    assert mask is not None
    assert mask.downsample == (2.0, 2.0)
    assert mask.mask.shape == (256, 256)
    share = spot.area / 512**2
    assert share < mask.share < share * 1.1
    for box in spot.split((16, 16)):
        assert mask.any(box)
    assert not mask.any(Box(0, 0, 100, 512))
    assert not mask.any(Box(300, 0, 512, 512))
    assert mask.any(Box(0, 0, 512, 512))
    assert mask.any(Box(124, 174, 125, 175))  # one px of the mask around it counts


def test_odd_sides_and_small_boxes(tmp_path, monkeypatch):
    monkeypatch.setattr("tilepipe.slide.tissue._BOX_PX", 100)
    path, spot = bright_field(tmp_path / "a.tif", side=525, spot=Box(100, 125, 225, 200))
    with open_slide(path) as slide:
        mask = tissue_mask(slide)
    assert mask is not None
    assert mask.mask.shape == (263, 263)
    assert mask.any(spot)
    assert not mask.any(Box(250, 0, 525, 525))


def test_large_slides_are_sampled(tmp_path, monkeypatch):
    monkeypatch.setattr("tilepipe.slide.tissue._WANTED_PX", 60)
    path, spot = bright_field(tmp_path / "a.tif")
    with open_slide(path) as slide:
        mask = tissue_mask(slide)
    assert mask is not None
    assert mask.downsample == (8.0, 8.0)
    assert mask.mask.shape == (64, 64)
    assert all(mask.any(box) for box in spot.split((16, 16)))
    assert not mask.any(Box(0, 0, 100, 512))
    assert not mask.any(Box(300, 0, 512, 512))


def test_nothing_to_tell_tissue_from(tmp_path):
    rng = np.random.default_rng(0)
    dark = rng.integers(0, 60, (300, 300, 3), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "dark.tif", dark, photometric="rgb")
    tifffile.imwrite(tmp_path / "grey.tif", dark[..., 0])
    for name in ("dark.tif", "grey.tif"):
        with open_slide(tmp_path / name) as slide:
            assert tissue_mask(slide) is None


def test_only_glass(tmp_path):
    path, _ = bright_field(tmp_path / "a.tif", spot=Box(0, 0, 0, 0))
    with open_slide(path) as slide:
        mask = tissue_mask(slide)
    assert mask is not None
    assert mask.share == 0


@pytest.mark.parametrize("glass", [(244, 244, 244), (240, 236, 230)], ids=["clear", "warm"])
def test_pale_tissue_beside_strong_stain_stays_and_dust_does_not(tmp_path, glass):
    """Otsu parts the strong stain from all else; fat and mucus would be taken for glass."""
    rng = np.random.default_rng(0)
    image = np.empty((1500, 1500, 3), np.float32)
    image[:] = glass
    image[200:700, 200:700] = (190, 90, 150)
    pale = np.s_[800:1300, 300:900]
    image[pale] = np.array(glass) * (1, 0.93, 0.97)
    for y, x in rng.integers((0, 190), (299, 299), (60, 2)) * 5:
        image[y : y + 5, x : x + 5] = np.array(glass) * (1, 0.935, 0.97)
    image += rng.normal(0, 1, (1500, 1500, 1)) + rng.normal(0, 0.5, image.shape)
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.clip(image, 0, 255).astype(np.uint8), tile=(256, 256),
                     photometric="rgb")  # fmt: skip
    with open_slide(path) as slide:
        mask = tissue_mask(slide)
    assert mask is not None
    assert mask.downsample == (5.0, 5.0)
    assert mask.mask[160:260, 60:180].all()
    assert mask.mask[40:140, 40:140].all()
    assert not mask.mask[:, 185:].any()


def test_mask_image(tmp_path):
    drawn = np.zeros((50, 100), np.uint8)
    drawn[10:20, 30:40] = 255
    Image.fromarray(drawn).save(tmp_path / "mask.png")
    mask = TissueMask.from_image(tmp_path / "mask.png", (500, 1000))
    assert mask.downsample == (10.0, 10.0)
    assert mask.any(Box(150, 350, 151, 351))
    assert not mask.any(Box(300, 500, 400, 600))
    with pytest.raises(SlideError, match="another aspect"):
        TissueMask.from_image(tmp_path / "mask.png", (500, 500))
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(SlideError, match="not a mask image"):
        TissueMask.from_image(tmp_path / "bad.png", (500, 500))
    with pytest.raises(SlideError, match="not a mask image"):
        TissueMask.from_image(tmp_path / "none.png", (500, 500))


@pytest.mark.parametrize("kind", ["uint8", "palette", "rgb"])
def test_a_mask_that_pillow_refuses_is_read_as_a_slide(tmp_path, monkeypatch, kind):
    """Pillow takes a file of more than 179 million px for an attack; no px of it may be lost."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    monkeypatch.setattr("tilepipe.slide.tissue._KEPT_PX", 64)
    monkeypatch.setattr("tilepipe.slide.tissue._BOX_PX", 32)
    drawn = np.random.default_rng(0).random((300, 203)) > 0.995
    pixels, more = drawn.astype(np.uint8) * 9, {}
    if kind == "palette":
        more = {"photometric": "palette", "colormap": np.full((3, 256), 65535, np.uint16)}
    elif kind == "rgb":
        pixels = np.stack([pixels * 0, pixels * 0, pixels], axis=-1)
        more = {"photometric": "rgb"}
    tifffile.imwrite(tmp_path / "m.tif", pixels, tile=(64, 64), compression="deflate", **more)
    mask = TissueMask.from_image(tmp_path / "m.tif", (600, 406))
    assert mask.downsample == (10.0, 10.0)
    expected = [
        [drawn[y : y + 5, x : x + 5].any() for x in range(0, 203, 5)] for y in range(0, 300, 5)
    ]
    np.testing.assert_array_equal(mask.mask, expected)


@pytest.mark.parametrize("dtype", [bool, np.uint8])
def test_a_tiff_that_is_to_be_shown_white_where_it_is_0_is_not_inverted(tmp_path, dtype):
    """So tifffile writes bilevel masks and ImageJ its own; Pillow reads them inside out."""
    drawn = np.zeros((50, 100), bool)
    drawn[10:20, 30:40] = True
    pixels = drawn if dtype is bool else drawn.astype(np.uint8) * 255
    tifffile.imwrite(tmp_path / "m.tif", pixels, photometric="miniswhite")
    mask = TissueMask.from_image(tmp_path / "m.tif", (500, 1000))
    np.testing.assert_array_equal(mask.mask, drawn)
    assert mask.note == "mask image m.tif: tissue on 2% of the slide"


def test_any_channel_of_a_mask_counts_and_what_a_tiff_lacks_is_said(tmp_path):
    channels = np.zeros((2, 50, 100), np.uint8)
    channels[1, 10:20, 30:40] = 1
    path = tmp_path / "m.ome.tif"
    tifffile.imwrite(path, channels, photometric="minisblack", metadata={"axes": "CYX"})
    mask = TissueMask.from_image(path, (500, 1000))
    np.testing.assert_array_equal(mask.mask, channels[1] > 0)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(SlideError, match=r"not a mask image: .*m.ome.tif"):
        TissueMask.from_image(path, (500, 1000))


def test_a_large_picture_is_read_without_a_warning_and_a_larger_one_is_told_what_to_be(
    tmp_path, monkeypatch
):
    Image.fromarray(np.zeros((50, 100), np.uint8)).save(tmp_path / "m.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    assert not TissueMask.from_image(tmp_path / "m.png", (500, 1000)).mask.any()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(SlideError, match="save it as a TIFF"):
        TissueMask.from_image(tmp_path / "m.png", (500, 1000))


def test_real_slides(data):
    with open_slide(data / "wsi" / "CMU-1-Small-Region.svs") as slide:
        mask = tissue_mask(slide)
        assert mask is not None
        assert 0.2 < mask.share < 0.6
    with open_slide(data / "wsi" / "test3-DAPI-2-(387).ndpi") as slide:
        assert tissue_mask(slide) is None


def test_a_kept_mask_is_the_mask_and_anything_else_is_refused():
    mask = TissueMask(np.random.default_rng(0).random((31, 50)) > 0.5, (8.0, 7.5), "why")
    raw = mask.to_png()
    again = TissueMask.from_png(raw)
    np.testing.assert_array_equal(again.mask, mask.mask)
    assert (again.downsample, again.note) == (mask.downsample, mask.note)
    for downsample in ((0.0, 1.0), (float("nan"), 1.0), (1.0, float("inf")), (-1.0, 1.0)):
        with pytest.raises(SlideError, match="downsample"):
            TissueMask.from_png(TissueMask(mask.mask, downsample, "").to_png())
    plain = io.BytesIO()
    Image.fromarray(mask.mask).save(plain, "PNG")
    for wrong in (b"", raw[:40], raw[:-30], b"GIF89a", plain.getvalue()):
        with pytest.raises(SlideError, match="not a tissue mask"):
            TissueMask.from_png(wrong)


SHOWN = np.zeros((50, 100), np.uint8)
SHOWN[10:20, 30:40] = 1


def _palette():
    image = Image.fromarray(SHOWN, mode="P")
    image.putpalette([255, 255, 255] + [0] * 765)  # index 0 is white, 1 black
    return image


def _bands(mode, *, color):
    """Only the last colour of the shape is not 0; alpha is full everywhere."""
    count = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.zeros((50, 100, count), np.uint8)
    pixels[..., color] = SHOWN
    if mode.endswith("A"):
        pixels[..., -1] = 255
    return Image.fromarray(pixels, mode=mode)


@pytest.mark.parametrize(
    "image, name",
    [
        (_palette(), "a.png"),
        (Image.fromarray(SHOWN), "a.png"),
        (Image.fromarray(SHOWN.astype(bool)), "a.png"),
        (Image.fromarray(SHOWN.astype(np.uint16)), "a.png"),
        (Image.fromarray(SHOWN.astype(np.uint16)), "a.tif"),
        (Image.fromarray(SHOWN.astype(np.int32)), "a.tif"),
        (Image.fromarray(np.where(SHOWN, np.float32(0.2), np.float32(0))), "a.tif"),
        (Image.fromarray(np.where(SHOWN, np.float32(-3), np.float32(np.nan))), "a.tif"),
        (_bands("RGB", color=2), "a.png"),
        (_bands("RGBA", color=1), "a.png"),
        (_bands("LA", color=0), "a.png"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.mode,
)
def test_what_is_not_0_is_tissue_in_every_kind_of_mask(tmp_path, image, name):
    image.save(tmp_path / name)
    mask = TissueMask.from_image(tmp_path / name, (500, 1000))
    np.testing.assert_array_equal(mask.mask, SHOWN > 0)


def test_boxes_are_read_several_at_once_and_the_mask_is_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("tilepipe.slide.tissue._BOX_PX", 64)
    path, _ = bright_field(tmp_path / "a.tif")
    masks = []
    for number in (1, 3):
        monkeypatch.setattr("tilepipe.slide.tissue.cores", lambda number=number: number)
        meet = threading.Barrier(number, timeout=30)
        with open_slide(path) as slide:
            image = Meeting(slide, meet, together=63)
            masks.append(tissue_mask(image))
        assert image.boxes == 64
    np.testing.assert_array_equal(masks[0].mask, masks[1].mask)


class Meeting:
    """A slide whose first ``together`` reads go on only when as many threads as meet read."""

    def __init__(self, slide, meet, *, together):
        self.rgb, self.dtype, self.levels = slide.rgb, slide.dtype, slide.levels
        self.boxes = 0
        self._slide, self._meet, self._together = slide, meet, together
        self._lock = threading.Lock()

    def read(self, box, *, level=0):
        with self._lock:
            self.boxes += 1
            meets = self.boxes <= self._together
        if meets:
            self._meet.wait()
        return self._slide.read(box, level=level)


def test_a_box_that_cannot_be_read_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("tilepipe.slide.tissue._BOX_PX", 64)
    path, _ = bright_field(tmp_path / "a.tif")
    with open_slide(path) as slide:

        class Broken(Meeting):
            def read(self, box, *, level=0):
                if box.y0 == 256:
                    raise SlideError(f"cannot read {box.x0}")
                return slide.read(box, level=level)

        with pytest.raises(SlideError, match=r"cannot read 0$"):
            tissue_mask(Broken(slide, None, together=0))
