"""OME-TIFF, PNG, OME-Zarr 0.4, figures, the report and notebook results equal the arrays."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
from click.testing import CliRunner
from PIL import Image

from tilepipe.cli.main import main
from tilepipe.errors import ExportError, VerifyError
from tilepipe.export import (
    Result,
    copy_store,
    facts,
    render_view,
    write_ome_tiff,
    write_png,
)
from tilepipe.export.detail import busiest
from tilepipe.export.report import write_report
from tilepipe.export.sink import whole_path
from tilepipe.infer import verify
from tilepipe.slide import open_slide
from tilepipe.spec import LabelClass
from tilepipe.store import create_store, open_store, overlap, reduce_image, reduce_label
from tilepipe.tiling import Box
from tilepipe.view.source import open_sources

SIDES = (1100, 1290)
CLASSES = (
    LabelClass(name="background", color=(0, 0, 0, 0)),
    LabelClass(name="nucleus", color=(10, 200, 30, 255)),
    LabelClass(name="<b>vessel</b>", color=(250, 20, 40, 255)),
)


def write_pyramid(levels, reduce, pixels):
    for level in levels:
        for unit in level.grid:
            level.write_unit(unit, np.ascontiguousarray(pixels[(..., *unit.box.slices)]))
        pixels = reduce(pixels)


def build(path, *, channels=3, dtype="uint8", rgb=True, mpp=(0.5, 0.25), level=0, with_image=True):
    rng = np.random.default_rng(0)
    image = rng.integers(0, np.iinfo(dtype).max, (channels, *SIDES), dtype=dtype)
    store = create_store(
        str(path),
        channels=channels,
        dtype=dtype,
        extent=SIDES,
        mpp=mpp,
        channel_names=() if rgb else tuple(f"c{k}" for k in range(channels)),
        channel_colors=(),
        rgb=rgb,
        unit_px=1024,
        with_image=with_image,
    )
    if with_image:
        write_pyramid([store.image(k) for k in range(store.n_levels)], reduce_image, image)
    label = store.create_label("unet", classes=CLASSES, level=level, unit_px=1024)
    mask = np.zeros(label.level(0).shape, dtype=np.uint8)
    mask[100:300, 50:250] = 1
    mask[500:540, 500:641] = 2
    mask[310:320, 60:70] = 1
    write_pyramid([label.level(k) for k in range(label.n_levels)], reduce_label, mask)
    return store, image, mask


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return build(tmp_path_factory.mktemp("export") / "slide.zarr")


@pytest.mark.parametrize("compression", ["deflate", "lzw", "none"])
def test_ome_tiff_of_a_mask(made, tmp_path, compression):
    store, _, _ = made
    path = tmp_path / "mask.ome.tif"
    assert write_ome_tiff(path, store, label="unet", compression=compression) == 3
    label = store.label("unet")
    with tifffile.TiffFile(path) as tiff:
        assert tiff.is_bigtiff
        assert tiff.is_ome
        (series,) = tiff.series
        assert (series.axes, len(series.levels)) == ("YX", 3)
        for index, level in enumerate(series.levels):
            whole = label.level(index).read(Box.of_shape(label.level(index).shape))
            assert np.array_equal(level.asarray(), whole)
        page = tiff.pages[0]
        assert page.is_tiled
        assert page.colormap[:, 1].tolist() == [10 * 257, 200 * 257, 30 * 257]
        pixels = tifffile.xml2dict(tiff.ome_metadata)["OME"]["Image"]["Pixels"]
        assert (pixels["PhysicalSizeX"], pixels["PhysicalSizeY"]) == (0.25, 0.5)
        assert pixels["PhysicalSizeXUnit"] == "µm"


def test_ome_tiff_of_an_rgb_image(made, tmp_path):
    store, image, _ = made
    path = tmp_path / "image.ome.tif"
    write_ome_tiff(path, store)
    with tifffile.TiffFile(path) as tiff:
        assert tiff.series[0].axes == "YXS"
        assert np.array_equal(tiff.asarray(), np.moveaxis(image, 0, -1))
        coarse = store.image(1).read(Box.of_shape(store.image(1).shape))
        assert np.array_equal(tiff.series[0].levels[1].asarray(), np.moveaxis(coarse, 0, -1))


def test_ome_tiff_of_channels(tmp_path):
    store, image, _ = build(tmp_path / "two.zarr", channels=2, dtype="uint16", rgb=False)
    path = tmp_path / "two.ome.tif"
    write_ome_tiff(path, store)
    with tifffile.TiffFile(path) as tiff:
        assert tiff.series[0].axes == "CYX"
        assert [level.shape for level in tiff.series[0].levels] == [
            (2, *store.image(k).shape) for k in range(3)
        ]
        assert np.array_equal(tiff.asarray(), image)
        assert '"c1"' in tiff.ome_metadata
    with pytest.raises(ExportError, match="JPEG is for 8-bit RGB"):
        write_ome_tiff(tmp_path / "no.ome.tif", store, compression="jpeg")


@pytest.mark.parametrize(("channels", "dtype"), [(3, "uint8"), (3, "uint16"), (2, "uint16")])
def test_a_picture_is_drawn_in_bands(tmp_path, monkeypatch, channels, dtype):
    rgb = channels == 3
    store, _, _ = build(tmp_path / "slide.zarr", channels=channels, dtype=dtype, rgb=rgb)
    label = store.label("unet")
    # The store's own metadata are read with a large buffer, of whatever picture.
    monkeypatch.setattr("tilepipe.export.image.channel_colors", lambda _: ("ff0000", "00ff00"))
    at_once = [render_view(store, label, outline=outline) for outline in (False, True)]
    monkeypatch.setattr("tilepipe.export.image._DRAWN_PX", 1 << 15)
    tracemalloc.start()
    try:
        in_bands = [render_view(store, label, outline=outline) for outline in (False, True)]
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert all(map(np.array_equal, at_once, in_bands))
    # Of floats alone, colours at once would take 36 bytes per px.
    assert most < 34 * SIDES[0] * SIDES[1]


def test_the_last_px_of_a_jpeg_are_not_darker(tmp_path):
    store = create_store(
        str(tmp_path / "glass.zarr"), channels=3, dtype="uint8", extent=(201, 301), mpp=None,
        channel_names=(), channel_colors=(), rgb=True, unit_px=512,
    )  # fmt: skip
    glass = np.full((3, 201, 301), 240, dtype=np.uint8)
    write_pyramid([store.image(0)], reduce_image, glass)
    write_ome_tiff(tmp_path / "glass.ome.tif", store, compression="jpeg")
    written = tifffile.imread(tmp_path / "glass.ome.tif")
    assert written.shape == (201, 301, 3)
    assert abs(written.astype(int) - 240).max() <= 1


def test_names_that_xml_has_no_characters_for(tmp_path):
    store = create_store(
        str(tmp_path / "b\udcffd\x02.zarr"),
        channels=2, dtype="uint16", extent=(20, 30), mpp=None, channel_names=("a\x01<", "µ & b"),
        channel_colors=(), rgb=False, unit_px=64,
    )  # fmt: skip
    write_ome_tiff(tmp_path / "out.ome.tif", store)
    with tifffile.TiffFile(tmp_path / "out.ome.tif") as tiff:
        (series,) = tiff.series
        assert (series.kind, series.name) == ("ome", "b\\udcffd\\x02")
        pixels = tifffile.xml2dict(tiff.ome_metadata)["OME"]["Image"]["Pixels"]
        assert [one["Name"] for one in pixels["Channel"]] == ["a\\x01<", "µ & b"]


def test_classes_that_another_program_did_not_name(tmp_path):
    path = tmp_path / "theirs.zarr"
    store = create_store(
        str(path), channels=3, dtype="uint8", extent=(60, 80), mpp=None, channel_names=(),
        channel_colors=(), rgb=True, unit_px=64,
    )  # fmt: skip
    label = store.create_label("m", classes=CLASSES, unit_px=64)
    mask = np.zeros((60, 80), np.uint8)
    mask[10:20, 10:30], mask[40:50, 5] = 1, 77
    write_pyramid([label.level(0)], reduce_label, mask)
    attributes = json.loads((path / "labels" / "m" / "zarr.json").read_text())
    del attributes["attributes"]["tilepipe"]
    attributes["attributes"]["ome"]["image-label"] = {"version": "0.5"}
    (path / "labels" / "m" / "zarr.json").write_text(json.dumps(attributes))

    theirs = open_store(str(path))
    known = facts(theirs, "m")
    assert [(one["value"], one["name"], one["px"]) for one in known["classes"]] == [
        (0, "background", 4590), (1, "class 1", 200), (77, "class 77", 10),
    ]  # fmt: skip
    write_report(tmp_path / "report.html", theirs)
    assert "class 77" in (tmp_path / "report.html").read_text()
    features = Result(path, "m").to_geojson()["features"]
    told = [one["properties"]["classification"] for one in features]
    assert [one["name"] for one in told] == ["class 1", "class 77"]
    drawn = render_view(theirs, theirs.label("m"), show="mask")
    write_ome_tiff(tmp_path / "m.ome.tif", theirs, label="m")
    with tifffile.TiffFile(tmp_path / "m.ome.tif") as tiff:
        palette = tiff.pages[0].colormap // 257
    for (y, x), one in zip(((10, 10), (40, 5)), told, strict=True):
        assert drawn[y, x].tolist() == palette[:, mask[y, x]].tolist() == one["color"]
    (source,) = open_sources([str(path)], cache_bytes=1 << 20)
    assert source.pixel(40, 5)["labels"][0]["class"] == "class 77"
    (shown,) = source.describe()["labels"]
    assert [shown["classes"][k]["color"] for k in (1, 77)] == [one["color"] for one in told]


def test_openslide_reads_the_pyramid_of_one_channel(tmp_path):
    openslide = pytest.importorskip("openslide")
    store, image, _ = build(tmp_path / "grey.zarr", channels=1, rgb=False)
    path = tmp_path / "grey.ome.tif"
    write_ome_tiff(path, store)
    with openslide.OpenSlide(str(path)) as slide:
        assert slide.level_count == 3
        for k in range(3):
            level = store.image(k)
            assert slide.level_dimensions[k] == level.shape[::-1]
            read = np.asarray(slide.read_region((0, 0), k, level.shape[::-1]))[..., 0]
            assert np.array_equal(read, level.read(Box.of_shape(level.shape))[0])
    with tifffile.TiffFile(path) as tiff:
        (series,) = tiff.series
        assert len(series.levels) == 3
        assert np.array_equal(series.asarray().reshape(SIDES), image[0])


def test_openslide_reads_the_pyramid(made, tmp_path):
    openslide = pytest.importorskip("openslide")
    store, image, _ = made
    for label in (None, "unet"):
        path = tmp_path / f"{label}.ome.tif"
        write_ome_tiff(path, store, label=label)
        with openslide.OpenSlide(str(path)) as slide:
            assert slide.level_dimensions == tuple(
                store.image(k).shape[::-1] for k in range(store.n_levels)
            )
            assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.25)
            assert float(slide.properties["openslide.mpp-y"]) == pytest.approx(0.5)
            if label is None:
                read = np.asarray(slide.read_region((1200, 1000), 0, (90, 100)))[..., :3]
                assert np.array_equal(read, np.moveaxis(image[:, 1000:1100, 1200:1290], 0, -1))
            else:
                read = np.asarray(slide.read_region((50, 100), 0, (2, 2)))
                assert read[0, 0, :3].tolist() == [10, 200, 30]


def test_pictures(made, tmp_path):
    store, image, mask = made
    label = store.label("unet")
    region = Box(90, 40, 190, 140)
    plain = render_view(store, label, region=region, show="image")
    assert np.array_equal(plain, np.moveaxis(image[:, 90:190, 40:140], 0, -1))
    full = render_view(store, label, region=region, opacity=1.0)
    inside = mask[90:190, 40:140] == 1
    assert (full[inside] == (10, 200, 30)).all()
    assert np.array_equal(full[~inside], plain[~inside])
    only = render_view(store, label, region=region, show="mask")
    assert (only[~inside] == 0).all()
    edge = render_view(store, label, region=region, opacity=1.0, outline=True)
    assert edge[10, 10].tolist() == [10, 200, 30]
    assert edge[50, 50].tolist() == plain[50, 50].tolist()
    small = render_view(store, label, longest_px=400)
    assert small.shape[:2] == store.image(2).shape
    write_png(tmp_path / "view.png", small)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "view.png")), small)
    with pytest.raises(ExportError, match="not inside the slide of 1100 x 1290 px"):
        render_view(store, label, region=Box(0, 0, 2000, 10))


def test_a_mask_of_a_coarser_level_is_drawn_in_place(tmp_path):
    store, _, _ = build(tmp_path / "coarse.zarr", level=1)
    full = render_view(
        store, store.label("unet"), region=Box(190, 90, 290, 190), opacity=1.0, longest_px=100
    )
    assert full[9, 50].tolist() != [10, 200, 30]
    assert full[10, 10].tolist() == [10, 200, 30]
    assert full[10, 9].tolist() != [10, 200, 30]
    assert facts(store, "unet")["classes"][1]["area_um2"] == (40_000 + 100) * 4 * 0.125


def test_a_store_of_labels_only(tmp_path):
    store, _, _ = build(tmp_path / "labels.zarr", with_image=False)
    result = Result(store, "unet")
    assert Image.open(io.BytesIO(result.overview())).size[0] <= 1024
    write_report(tmp_path / "report.html", store)
    with pytest.raises(ExportError, match="use --show mask"):
        render_view(store, None, show="image")


def test_ome_zarr_04_has_the_same_pixels(made, tmp_path):
    store, _, _ = made
    path = tmp_path / "slide-0.4.zarr"
    copy_store(store, str(path))
    copy = open_store(str(path))
    assert (copy.version, copy.mpp, copy.labels) == ("0.4", store.mpp, store.labels)
    for index in range(store.n_levels):
        box = Box.of_shape(store.image(index).shape)
        assert np.array_equal(copy.image(index).read(box), store.image(index).read(box))
        ids = store.label("unet").level(index).read(box)
        assert np.array_equal(copy.label("unet").level(index).read(box), ids)
    assert copy.label("unet").classes == CLASSES
    assert (path / ".zattrs").exists()


def test_figures(made):
    store, _, mask = made
    known = facts(store, "unet")
    assert [one["px"] for one in known["classes"]] == np.bincount(mask.reshape(-1)).tolist()
    assert [one["objects"] for one in known["classes"]] == [0, 2, 1]
    nucleus = known["classes"][1]
    assert nucleus["area_um2"] == pytest.approx((40_000 + 100) * 0.125)
    assert nucleus["mean_object_px"] == 20_050
    assert nucleus["largest_object_px"] == 40_000
    assert sum(nucleus["size_histogram"]) == 2
    assert nucleus["size_histogram"][6] == 1, "100 px lie in 64-127"
    assert sum(one["share"] for one in known["classes"]) == pytest.approx(1)
    assert json.loads(json.dumps(known)) == known
    quick = facts(store, "unet", objects=False)
    assert [one["px"] for one in quick["classes"]] == [None, None, None]


def test_the_report(made, tmp_path):
    store, _, _ = made
    label = open_store(store.location, writable=True).label("unet")
    label.write_record(
        {
            "state": "done",
            "plan": {"mode": "exact", "core_px": 512},
            "verified": {"passed": True, "flips": 0, "notes": ["none <at all>"]},
            "account": {"wall_s": 2.5, "lanes": 2, "shares": {"compute": 80.5, "idle": 19.5}},
        }
    )
    path = tmp_path / "report.html"
    (known,) = write_report(path, store)
    page = path.read_text()
    rows = re.findall(r'<tr data-value="(\d+)" data-px="(\d+)">', page)
    assert [int(px) for _, px in rows] == [one["px"] for one in known["classes"]]
    assert "40,100" in page
    assert "&lt;b&gt;vessel&lt;/b&gt;" in page
    assert "<b>vessel" not in page
    assert "none &lt;at all&gt;" in page
    assert 'compute <b data-inspect="account.shares.compute">80.5 %</b>' in page
    assert not re.search(r'(src|href)="(?!data:)', page), "self-contained"
    with pytest.raises(ExportError, match="exists already"):
        write_report(path, store)
    label.write_record({})


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("place", [(100, 300), (0, 0), (560, 460)])
def test_the_busiest_place_is_inside_the_slide(place, scale):
    mask = np.zeros((599, 499), dtype=np.uint8)
    y, x = place
    mask[y : y + 80 : 2, x : x + 120 : 2] = 1

    class Label:
        def whole_levels(self):
            read = SimpleNamespace(
                shape=mask.shape, downsample=scale, read=lambda box: mask[box.slices]
            )
            return [read]

    extent = (599 * scale - scale + 1, 499 * scale - scale + 1)
    box = busiest(Label(), extent, side_px=100 * scale)
    assert box.shape == (100 * scale, 100 * scale)
    assert Box.of_shape(extent).contains(box)
    inside = mask[box.y0 // scale : box.y1 // scale, box.x0 // scale : box.x1 // scale]
    most = max(
        np.count_nonzero(mask[a : a + 100, b : b + 100])
        for a in range(0, 500, 10)
        for b in range(0, 400, 10)
    )
    assert np.count_nonzero(inside) >= 0.97 * most
    assert busiest(Label(), extent, side_px=4096) == Box.of_shape(extent)


def test_a_result_in_a_notebook(made, tmp_path):
    store, _, mask = made
    result = Result(store.location, "unet")
    labels = result.labels
    assert labels.shape == SIDES
    for key in [
        np.s_[0:1000, 0:1000],
        np.s_[120, 60],
        np.s_[-1],
        np.s_[..., 7],
        np.s_[90:400:7, ::-3],
        np.s_[5:5, :],
        np.s_[1000:5000, -3:],
        np.s_[:, 55],
    ]:
        assert np.array_equal(labels[key], mask[key]), key
    assert np.array_equal(np.asarray(labels), mask)
    for key in (5000, np.s_[0, 0, 0], np.s_[0, -2000]):
        with pytest.raises(IndexError):
            labels[key]
    for key in ([1, 2], (np.array([1, 2]), ...), None, True, mask > 0, 1.5):
        with pytest.raises(IndexError, match="use integers and slices"):
            labels[key]
    assert result.overview()._repr_png_()[:4] == b"\x89PNG"
    assert result._repr_png_()[:4] == b"\x89PNG"
    assert result.classes == ("background", "nucleus", "<b>vessel</b>")
    pytest.importorskip("rasterio")
    assert len(result.to_geojson()["features"]) == 3
    assert result.to_geojson(tmp_path / "m.geojson") == 3
    assert result.facts()["objects"] == 3


def test_objects_of_a_coarser_level_stay_on_the_slide(tmp_path):
    store, _, mask = build(tmp_path / "coarse.zarr", level=2)
    label = store.label("unet")
    mask[:] = 1
    write_pyramid([label.level(k) for k in range(label.n_levels)], reduce_label, mask)
    scale, (height, width) = label.level(0).downsample, SIDES
    assert mask.shape[1] * scale > width  # the last px lies half outside
    result = Result(store, "unet")
    (found,) = result.to_geojson()["features"]
    corners = np.array(found["geometry"]["coordinates"][0])
    assert (corners.min(0).tolist(), corners.max(0).tolist()) == ([0, 0], [width, height])
    table = tmp_path / "table.csv"
    told = CliRunner().invoke(
        main, ["export", str(tmp_path / "coarse.zarr"), "--to", "csv", "-o", str(table)]
    )
    assert told.exit_code == 0, told.output
    (row,) = csv.DictReader(table.read_text().splitlines())
    assert (row["y1_px"], row["x1_px"]) == (str(height), str(width))
    assert float(row["centroid_x_px"]) <= width


@pytest.mark.parametrize(
    "target", ["made.zarr", "./made.zarr", "../{}/made.zarr", "link.zarr", "made.zarr/in.zarr", "."]
)
def test_a_store_is_not_copied_over_or_into_itself(tmp_path, monkeypatch, target):
    build(tmp_path / "made.zarr")
    (tmp_path / "link.zarr").symlink_to(tmp_path / "made.zarr")
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ExportError, match="onto itself"):
        copy_store(open_store("made.zarr"), target.format(tmp_path.name), overwrite=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_copy_beside_the_store_is_no_copy_onto_it(tmp_path):
    store, _, _ = build(tmp_path / "made.zarr", with_image=False)
    assert copy_store(store, str(tmp_path / "made.zarr.copy"))


@pytest.mark.parametrize(
    "one, other, expected",
    [
        ("s3://b/a.zarr", "s3://b/a.zarr/", True),
        ("s3://b/a.zarr", "s3://b/a.zarr/c.zarr", True),
        ("s3://b/a.zarr", "s3://b/a.zarr2", False),
        ("s3://b/a.zarr", "a.zarr", False),
        ("file:///x/a.zarr", "/x/y/../a.zarr", True),
    ],
)
def test_overlap(one, other, expected):
    assert overlap(one, other) is overlap(other, one) is expected


@pytest.mark.parametrize("state", ["done", "running"])
def test_a_copy_says_that_it_is_one(tmp_path, state):
    store, _, _ = build(tmp_path / "made.zarr")
    own = {"state": state, "fingerprint": "f", "verified": {"passed": True}, "settings": {}}
    store.write_record({**own, "notes": ["kept"]})
    store.label("unet").write_record({**own, "class_px": {"nucleus": 3}})
    copy_store(store, str(tmp_path / "copy.zarr"))
    copy = open_store(str(tmp_path / "copy.zarr"))
    expected = "exported" if state == "done" else "exported while running"
    told = {"state": expected, "exported_from": store.location, "settings": {}}
    assert copy.read_record() == {**told, "notes": ["kept"]}
    assert copy.label("unet").read_record() == {**told, "class_px": {"nucleus": 3}}
    with pytest.raises(VerifyError, match=f"exported from .*tilepipe verify {store.location}"):
        verify(copy.location)


@pytest.mark.parametrize(
    ("setting", "told"),
    [({"longest_px": 0}, "a picture of 0 px"), ({"show": "masks"}, "overlay, mask, image")],
)
def test_a_picture_that_cannot_be_meant(made, setting, told):
    store, _, _ = made
    with pytest.raises(ExportError, match=told):
        Result(store, "unet").overview(**setting)


@pytest.mark.parametrize("version", ["0.5", "0.4"])
def test_channels_are_drawn_in_their_own_colours(tmp_path, version):
    store = create_store(
        str(tmp_path / "two.zarr"), channels=2, dtype="uint16", extent=(40, 40), unit_px=512,
        channel_names=("GFP", "DAPI"), channel_colors=("00FF00", "0000FF"), ome_zarr=version,
    )  # fmt: skip
    image = np.zeros((2, 40, 40), np.uint16)
    image[0, :20] = image[1, 20:] = 900
    write_pyramid([store.image(0)], reduce_image, image)
    picture = render_view(open_store(store.location), None, show="image")
    assert picture[10, 10].tolist() == [0, 255, 0]
    assert picture[30, 10].tolist() == [0, 0, 255]


def test_an_ome_tiff_has_the_colours_of_its_channels(tmp_path):
    colors = ("FF0000", "00FF00", "0000FF", "FF8000")
    names = ("Cy5", "GFP", "DAPI", "Cy3")
    store = create_store(
        str(tmp_path / "four.zarr"), channels=4, dtype="uint16", extent=(40, 40), unit_px=512,
        channel_names=names, channel_colors=colors,
    )  # fmt: skip
    write_pyramid([store.image(0)], reduce_image, np.ones((4, 40, 40), np.uint16))
    write_ome_tiff(tmp_path / "four.ome.tif", store, label=None)
    with open_slide(str(tmp_path / "four.ome.tif")) as slide:
        assert slide.channel_names == names
        assert slide.channel_colors == colors
    with tifffile.TiffFile(tmp_path / "four.ome.tif") as tif:
        written = re.findall(r'Color="(-?\d+)"', tif.ome_metadata)
    assert [int(one) for one in written] == [-16776961, 16711935, 65535, -8388353]


def test_two_that_write_one_file_at_once_do_not_write_into_each_others(tmp_path):
    path = tmp_path / "a.csv"
    with whole_path(path) as first:
        first.write_text("the first")
        with whole_path(path) as second:
            assert not second.exists()
            second.write_text("the second, longer")
        assert path.read_text() == "the second, longer"
    assert path.read_text() == "the first"
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_no_file_is_not_replaced_by_one(tmp_path):
    pipe, folder = tmp_path / "pipe", tmp_path / "folder"
    os.mkfifo(pipe)
    folder.mkdir()
    for place in (pipe, folder):
        with (
            pytest.raises(ExportError, match=f"{place.name}: is there and no file"),
            whole_path(place, overwrite=True) as part,
        ):
            part.write_text("an export")
    assert pipe.is_fifo()
    assert sorted(tmp_path.iterdir()) == [folder, pipe]
