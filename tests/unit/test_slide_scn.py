"""Leica SCN, Philips, QPTIFF: the image among its photographs, overviews, channels."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile

from tilepipe.slide import open_slide
from tilepipe.tiling import Box

SCN = """<?xml version="1.0"?>
<scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01"><collection name="c">
<image name="macro"><pixels sizeX="40" sizeY="60"><dimension sizeX="40" sizeY="60" r="0" ifd="0"/>
</pixels><view sizeX="400000" sizeY="600000" offsetX="0" offsetY="0"/></image>
<image name="tissue"><pixels sizeX="300" sizeY="200">
<dimension sizeX="300" sizeY="200" r="0" ifd="1"/><dimension sizeX="150" sizeY="100" r="1" ifd="2"/>
</pixels><view sizeX="150000" sizeY="100000" offsetX="0" offsetY="0"/></image>
</collection></scn>"""


def test_scn_uses_the_tissue_not_the_macro(tmp_path):
    tissue = np.random.default_rng(0).integers(0, 255, (200, 300, 3), dtype=np.uint8)
    options = {"photometric": "rgb", "tile": (64, 64), "metadata": None}
    with tifffile.TiffWriter(tmp_path / "a.scn", bigtiff=True) as writer:
        writer.write(np.zeros((60, 40, 3), np.uint8), description=SCN, **options)
        writer.write(tissue, **options)
        writer.write(tissue[::2, ::2], **options)
    with open_slide(tmp_path / "a.scn") as slide:
        assert slide.format == "scn"
        assert [level.shape for level in slide.levels] == [(200, 300), (100, 150)]
        assert slide.mpp == pytest.approx((0.5, 0.5))
        assert slide.mpp_source == "SCN view size"
        np.testing.assert_array_equal(slide.read(Box(0, 0, 200, 300)), np.moveaxis(tissue, -1, 0))


def philips(path):
    """Write an image (192, 320, 3) and two overviews padded to whole tiles; return it."""
    # Philips rounds the sides of every level up to whole tiles.
    rep = (
        '<DataObject ObjectType="PixelDataRepresentation">'
        '<Attribute Name="DICOM_PIXEL_SPACING">"{0}" "{0}"</Attribute></DataObject>'
    )
    text = (
        '<?xml version="1.0" encoding="UTF-8" ?>\n<DataObject ObjectType="DPUfsImport"><Attribute>'
        "<Array>"
        + rep.format("0.00025")
        + rep.format("0.0005")
        + rep.format("0.001")
        + "</Array></Attribute></DataObject>"
    )
    image = np.random.default_rng(0).integers(0, 255, (192, 320, 3), dtype=np.uint8)
    options = {
        "photometric": "rgb",
        "tile": (64, 64),
        "metadata": None,
        "software": "Philips DP v1.0",
    }
    half = np.zeros((128, 192, 3), np.uint8)
    half[:96, :160] = image[::2, ::2]
    quarter = np.zeros((64, 128, 3), np.uint8)
    quarter[:48, :80] = image[::4, ::4]
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        writer.write(image, description=text, **options)
        writer.write(half, subfiletype=1, **options)
        writer.write(quarter, subfiletype=1, **options)
    return image


def test_philips_cuts_the_padding_of_overviews(tmp_path):
    image = philips(tmp_path / "a.tiff")
    with open_slide(tmp_path / "a.tiff") as slide:
        assert slide.format == "philips"
        assert slide.mpp == pytest.approx((0.25, 0.25))
        assert [level.shape for level in slide.levels] == [(192, 320), (96, 160), (48, 80)]
        np.testing.assert_array_equal(
            slide.read(Box(0, 0, 96, 160), level=1), np.moveaxis(image[::2, ::2], -1, 0)
        )
        np.testing.assert_array_equal(
            slide.read(Box(5, 6, 48, 80), level=2), np.moveaxis(image[::4, ::4][5:, 6:], -1, 0)
        )


def test_glass_that_philips_left_out_is_white(tmp_path):
    path = tmp_path / "a.tiff"
    image = philips(path)
    with tifffile.TiffFile(path) as tiff:
        tags = [tiff.pages[0].tags[code] for code in (324, 325)]
        places = [(tag.valueoffset, tag.valuebytecount // tag.count) for tag in tags]
    with path.open("r+b") as file:
        for offset, size in places:
            file.seek(offset + 3 * size)
            file.write(bytes(size))
    image[:64, 192:256] = 255
    with open_slide(path, on_damage="fill") as slide:
        np.testing.assert_array_equal(slide.read(Box(0, 0, 192, 320)), np.moveaxis(image, -1, 0))
        assert not list(slide.damage)


QPI = """<?xml version="1.0" encoding="utf-16"?><PerkinElmer-QPI-ImageDescription>
<ImageType>{kind}</ImageType>{stain}</PerkinElmer-QPI-ImageDescription>"""
STAINS = (
    "<Name>DAPI</Name><Color>0,0,255</Color>",
    "<Name>Opal 520</Name><Biomarker>CD3</Biomarker><Color>0,255,16</Color>",
    "<Name>Sample AF</Name>",
)


@pytest.mark.parametrize("stains", [STAINS, ("<Name>DAPI", *STAINS[1:])])
def test_channels_of_qptiff_have_the_names_of_their_stains(tmp_path, stains):
    image = np.random.default_rng(0).integers(0, 60_000, (3, 200, 300), dtype=np.uint16)
    options = {"tile": (64, 64), "metadata": None, "software": "PerkinElmer-QPI"}
    with tifffile.TiffWriter(tmp_path / "a.qptiff") as writer:
        for step, kind in ((1, "FullResolution"), (2, "ReducedResolution")):
            for plane, stain in zip(image, stains, strict=True):
                text = QPI.format(kind=kind, stain=stain)
                writer.write(
                    plane[::step, ::step].copy(), description=text, subfiletype=step - 1,
                    photometric="minisblack", **options,
                )  # fmt: skip
            if step == 1:
                thumbnail = np.zeros((20, 30, 3), np.uint8)
                writer.write(thumbnail, photometric="rgb", metadata=None)
    with open_slide(tmp_path / "a.qptiff") as slide:
        assert (slide.format, len(slide.levels)) == ("qptiff", 2)
        np.testing.assert_array_equal(slide.read(Box(0, 0, 200, 300)), image)
        if stains is STAINS:
            assert slide.channel_names == ("DAPI", "CD3", "Sample AF")
            assert slide.channel_colors == ("0000FF", "00FF10", None)
        else:
            assert slide.channel_names == ("channel 0", "channel 1", "channel 2")
