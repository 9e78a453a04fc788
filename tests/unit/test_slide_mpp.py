"""Pixel sizes: from each format's own place, and never from a print resolution."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile

from tilepipe.slide import open_slide

IMAGE = np.zeros((40, 60, 3), np.uint8)


def write(path, description=None, **options):
    tifffile.imwrite(
        path, IMAGE, photometric="rgb", tile=(16, 16), description=description, metadata=None,
        **options,
    )  # fmt: skip
    with open_slide(path) as slide:
        return slide


def test_aperio(tmp_path):
    text = "Aperio Image Library v11\n60x40 |AppMag = 20|MPP = 0.4990|Left = 25.69"
    slide = write(tmp_path / "a.svs", text)
    assert (slide.format, slide.mpp, slide.mpp_source) == ("svs", (0.499, 0.499), "Aperio MPP")


@pytest.mark.parametrize(
    ("value", "mpp"), [("0,2525", 0.2525), ("1,01", 1.01), (".25", 0.25), ("0.25,", 0.25)]
)
def test_aperio_with_a_decimal_comma(tmp_path, value, mpp):
    slide = write(tmp_path / "a.svs", f"Aperio Image Library v11\n60x40 |MPP = {value}|Left = 2,5")
    assert (slide.mpp, slide.mpp_source) == ((mpp, mpp), "Aperio MPP")


@pytest.mark.parametrize("value", ["0", "-1", "nan", "1e999", "."])
def test_aperio_nonsense(tmp_path, value):
    text = f"Aperio Image Library v11\n60x40 |MPP = {value}|"
    slide = write(tmp_path / "a.svs", text)
    assert slide.mpp is None
    assert slide.mpp_source.startswith("unknown")


def test_ome_with_units(tmp_path):
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(
        path,
        IMAGE,
        photometric="rgb",
        metadata={
            "axes": "YXS",
            "PhysicalSizeX": 250,
            "PhysicalSizeXUnit": "nm",
            "PhysicalSizeY": 0.0005,
            "PhysicalSizeYUnit": "mm",
        },
    )
    with open_slide(path) as slide:
        assert slide.mpp == pytest.approx((0.5, 0.25))
        assert slide.mpp_source == "OME PhysicalSize"


def test_ome_in_an_unknown_unit(tmp_path):
    path = tmp_path / "a.ome.tif"
    metadata = {"axes": "YXS", "PhysicalSizeX": 2, "PhysicalSizeXUnit": "pixel"}
    tifffile.imwrite(path, IMAGE, photometric="rgb", metadata=metadata)
    with open_slide(path) as slide:
        assert slide.mpp is None
        assert "unknown unit" in slide.mpp_source


def test_philips(tmp_path):
    spacing = '<Attribute Name="DICOM_PIXEL_SPACING">"0.000{}" "0.000{}"</Attribute>'
    text = (
        '<?xml version="1.0" encoding="UTF-8"?>\n<DataObject ObjectType="DPUfsImport">'
        + spacing.format(25, 25)
        + spacing.format(5, 5)
        + "</DataObject>"
    )
    slide = write(tmp_path / "a.tif", text, software="Philips DP v1.0")
    assert slide.format == "philips"
    assert slide.mpp == pytest.approx((0.25, 0.25))
    assert slide.mpp_source == "DICOM_PIXEL_SPACING"


def test_imagej(tmp_path):
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, IMAGE[..., 0], imagej=True, resolution=(4, 2), metadata={"unit": "um"})
    with open_slide(path) as slide:
        assert slide.mpp == (0.5, 0.25)
        assert slide.mpp_source == "ImageJ unit and resolution tags"


@pytest.mark.parametrize(
    "resolution, unit, mpp",
    [
        ((20_000, 40_000), "CENTIMETER", (0.25, 0.5)),
        ((50_800, 50_800), "INCH", (0.5, 0.5)),
        ((72, 72), "INCH", None),
        ((96, 96), "INCH", None),
        ((300, 300), "INCH", None),
        ((1, 1), "NONE", None),
        ((10_000_000, 10_000_000), "CENTIMETER", None),
    ],
)
def test_resolution_tags(tmp_path, resolution, unit, mpp):
    slide = write(tmp_path / "a.tif", resolution=resolution, resolutionunit=unit)
    if mpp is None:
        assert slide.mpp is None
        assert slide.mpp_source.startswith("unknown")
        assert "--slide-mpp" in slide.mpp_source
    else:
        assert slide.mpp == pytest.approx(mpp)
        assert slide.mpp_source == "TIFF resolution tags"


def test_given_wins(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", IMAGE, photometric="rgb")
    with open_slide(tmp_path / "a.tif", mpp=0.3) as slide:
        assert (slide.mpp, slide.mpp_source) == ((0.3, 0.3), "given")


@pytest.mark.parametrize(
    "name, mpp, source",
    [
        ("wsi/CMU-1-Small-Region.svs", 0.499, "Aperio MPP"),
        ("wsi/test3-DAPI-2-(387).ndpi", 0.22817505, "NDPI resolution tags"),
        ("wsi/HE_example.tif", 0.50007992, "OME PhysicalSize"),
        ("wsi/CropBreastSlide.tiff", None, "unknown: the resolution tags say 264.6 µm"),
    ],
)
def test_real_slides(data, name, mpp, source):
    with open_slide(data / name) as slide:
        assert slide.mpp_source.startswith(source)
        assert slide.mpp == (None if mpp is None else pytest.approx((mpp, mpp)))


def test_a_resolution_without_a_unit_is_no_pixel_size(tmp_path):
    options = {"resolution": (40000, 40000)}
    assert write(tmp_path / "cm.tif", resolutionunit="CENTIMETER", **options).mpp == (0.25, 0.25)
    none = write(tmp_path / "none.tif", resolutionunit="NONE", **options)
    assert none.mpp is None
    assert "--slide-mpp" in none.mpp_source
