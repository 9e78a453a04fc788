"""Objects, outlines, GeoJSON and CSV against brute force on masks that cross every border."""

from __future__ import annotations

import csv
import errno
import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from tilepipe.errors import ExportError, StoreError
from tilepipe.export.geojson import iter_features, write_geojson
from tilepipe.export.objects import iter_instances, iter_objects
from tilepipe.export.runs import find_regions
from tilepipe.export.table import totals_beside, write_csv
from tilepipe.spec import default_classes
from tilepipe.tiling import Box

shapely = pytest.importorskip("shapely")
features = pytest.importorskip("rasterio.features")


class ArrayLevel:
    def __init__(self, mask):
        self.mask = mask
        self.shape = mask.shape
        self.largest_read = 0

    def read(self, box):
        self.largest_read = max(self.largest_read, box.area)
        return self.mask[box.slices]


def random_mask(height, width, *, density, seed=0, classes=3):
    rng = np.random.default_rng(seed)
    solid = rng.random((height, width)) < density
    return (solid * rng.integers(1, classes + 1, (height, width))).astype(np.uint8)


def blobs(height, width, seed=0):
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.random((height, width)), 3)
    return (np.digitize(smooth, np.quantile(smooth, [0.5, 0.8]))).astype(np.uint8)


MASKS = {
    "noise": random_mask(97, 110, density=0.5),
    "dense": random_mask(64, 65, density=0.9, classes=1),
    "sparse": random_mask(130, 75, density=0.05),
    "blobs": blobs(150, 121),
    "full": np.full((50, 70), 2, dtype=np.uint8),
    "line": np.eye(40, dtype=np.uint8),
    "one": np.ones((1, 1), dtype=np.uint8),
}


def brute_force(mask):
    """(value, area, centroid, box) of each object, in a canonical order."""
    found = []
    for value in np.unique(mask[mask != 0]):
        labels, _ = ndimage.label(mask == value)
        for index, window in enumerate(ndimage.find_objects(labels), start=1):
            ys, xs = np.nonzero(labels == index)
            box = (window[0].start, window[1].start, window[0].stop, window[1].stop)
            centroid = (round(ys.mean() + 0.5, 6), round(xs.mean() + 0.5, 6))
            found.append((int(value), len(ys), centroid, box))
    return sorted(found)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("region_px", [7, 32, 4096])
def test_objects_equal_brute_force(name, region_px):
    mask = MASKS[name]
    level = ArrayLevel(mask)
    got = sorted(
        (
            o.value,
            o.area_px,
            (round(o.centroid[0], 6), round(o.centroid[1], 6)),
            (o.box.y0, o.box.x0, o.box.y1, o.box.x1),
        )
        for o in iter_objects(level, region_px=region_px)
    )
    assert got == brute_force(mask)
    assert level.largest_read <= region_px**2


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("region_px", [16, 41])
def test_outlines_are_valid_whole_and_rasterise_back(name, region_px):
    mask = MASKS[name]
    shapes = []
    for found in iter_objects(ArrayLevel(mask), outlines=True, region_px=region_px):
        polygons = found.polygons()
        assert len(polygons) == 1, "one object is one polygon"
        shape = shapely.Polygon(polygons[0][0], polygons[0][1:])
        assert shape.is_valid, shapely.is_valid_reason(shape)
        assert shape.area == found.area_px
        shapes.append((shape, found.value))
    back = features.rasterize(shapes, out_shape=mask.shape, dtype=np.uint8)
    assert np.count_nonzero(back != mask) == 0


def test_a_joined_outline_has_no_corner_at_the_seam():
    mask = np.zeros((40, 40), dtype=np.uint8)
    mask[10:30, 10:30] = 1
    (found,) = iter_objects(ArrayLevel(mask), outlines=True, region_px=16)
    ((outer,),) = found.polygons()
    assert sorted(map(tuple, outer[:-1].tolist())) == [(10, 10), (10, 30), (30, 10), (30, 30)]


def test_objects_meeting_at_a_corner_are_two():
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[:4, :4] = mask[4:, 4:] = 1
    for region_px in (4, 8):
        assert len(list(iter_objects(ArrayLevel(mask), region_px=region_px))) == 2


def test_within_cuts_the_mask():
    mask = np.ones((30, 30), dtype=np.uint8)
    (found,) = iter_objects(ArrayLevel(mask), region_px=8, within=Box(5, 6, 25, 20))
    assert found.box == Box(5, 6, 25, 20)
    assert found.area_px == 20 * 14


def test_instance_ids_above_a_byte():
    mask = np.zeros((20, 20), dtype=np.int32)
    mask[2:5, 2:5], mask[2:5, 5:8] = 70_000, 70_001
    regions = find_regions(mask)
    assert sorted(regions.values.tolist()) == [70_000, 70_001]
    assert regions.areas_px.tolist() == [9, 9]


def scattered(height=90, width=100):
    """Object ids whose pixels lie apart, some across every border of regions; some with holes."""
    mask = MASKS["blobs"][:height, :width].astype(np.int32)
    pieces, _ = ndimage.label(mask == 1)
    ids = 100_000 + pieces % 7  # seven ids share all the pieces
    return np.where(pieces > 0, ids, 0).astype(np.int32)


@pytest.mark.parametrize("region_px", [16, 41, 4096])
def test_an_instance_in_several_pieces_is_one_object(region_px):
    mask = scattered()
    level = ArrayLevel(mask)
    found = list(iter_instances(level, outlines=True, region_px=region_px))
    ids, areas = np.unique(mask[mask > 0], return_counts=True)
    assert len(list(iter_objects(level))) > len(ids) == len(found)
    assert dict(zip(ids.tolist(), areas.tolist(), strict=True)) == {
        one.value: one.area_px for one in found
    }
    shapes = []
    for one in found:
        ys, xs = np.nonzero(mask == one.value)
        assert one.centroid == pytest.approx((ys.mean() + 0.5, xs.mean() + 0.5))
        assert one.box == Box(ys.min(), xs.min(), ys.max() + 1, xs.max() + 1)
        polygons = [shapely.Polygon(rings[0], rings[1:]) for rings in one.polygons()]
        assert len(polygons) == ndimage.label(mask == one.value)[1]
        shapes.append((shapely.MultiPolygon(polygons), one.value))
        assert shapes[-1][0].is_valid
    back = features.rasterize(shapes, out_shape=mask.shape, dtype=np.int32)
    assert np.array_equal(back, mask)


def test_an_instance_is_one_feature_and_one_row(tmp_path):
    mask = scattered()
    ids = np.unique(mask[mask > 0]).tolist()
    level = ArrayLevel(mask)
    found = list(iter_features(level, [], instances=True, um2_per_px=0.25))
    assert sorted(one["properties"]["object_id"] for one in found) == ids
    assert {one["properties"]["classification"]["name"] for one in found} == {"object"}
    assert {one["geometry"]["type"] for one in found} == {"MultiPolygon"}
    path = tmp_path / "objects.csv"
    count, totals = write_csv(path, level, [], um2_per_px=0.25, instances=True)
    rows = list(csv.DictReader(path.open()))
    assert count == len(ids)
    assert {int(row["id"]): int(row["area_px"]) for row in rows} == {
        value: np.count_nonzero(mask == value) for value in ids
    }
    (total,) = csv.DictReader(totals.open())
    assert (total["class"], total["objects"]) == ("object", str(len(ids)))
    assert int(total["area_px"]) == np.count_nonzero(mask)


def test_empty_masks_have_no_objects():
    assert len(find_regions(np.zeros((0, 5), dtype=np.uint8))) == 0
    assert list(iter_objects(ArrayLevel(np.zeros((20, 20), dtype=np.uint8)), outlines=True)) == []


@pytest.mark.parametrize("suffix", [".geojson", ".geojson.gz"])
def test_geojson_file_is_what_qupath_reads(tmp_path, suffix):
    mask = MASKS["blobs"]
    path = tmp_path / f"mask{suffix}"
    count = write_geojson(
        path, ArrayLevel(mask), default_classes(3), scale=2, um2_per_px=0.25, overwrite=False
    )
    raw = path.read_bytes()
    content = json.loads(gzip.decompress(raw) if suffix.endswith("gz") else raw)
    assert content["type"] == "FeatureCollection"
    assert len(content["features"]) == count == len(brute_force(mask))
    first = content["features"][0]
    assert first["properties"]["objectType"] == "annotation"
    assert first["properties"]["classification"] in [
        {"name": c.name, "color": list(c.color[:3])} for c in default_classes(3)
    ]
    shapes = [
        (
            shapely.affinity.scale(shapely.geometry.shape(f["geometry"]), 0.5, 0.5, origin=(0, 0)),
            f["properties"]["class_id"],
        )
        for f in content["features"]
    ]
    assert np.array_equal(features.rasterize(shapes, out_shape=mask.shape, dtype=np.uint8), mask)
    areas = sum(f["properties"]["measurements"]["Area px"] for f in content["features"])
    assert areas == 4 * np.count_nonzero(mask)
    assert not list(tmp_path.glob(".*")), "no partial file is left"


def test_geojson_of_some_classes_and_of_simplified_outlines():
    mask = MASKS["blobs"]
    level = ArrayLevel(mask)
    exact = list(iter_features(level, default_classes(3), only=frozenset({2})))
    loose = list(iter_features(level, default_classes(3), only=frozenset({2}), tolerance_px=1.5))
    assert {f["properties"]["class_id"] for f in exact} == {2}
    corners = [
        sum(len(ring) for f in some for ring in f["geometry"]["coordinates"])
        for some in (exact, loose)
    ]
    assert corners[1] < corners[0]
    for a, b in zip(exact, loose, strict=True):
        distance = shapely.hausdorff_distance(
            shapely.geometry.shape(a["geometry"]).exterior,
            shapely.geometry.shape(b["geometry"]).exterior,
        )
        assert distance <= 3
        assert shapely.geometry.shape(b["geometry"]).is_valid


@pytest.mark.parametrize("instances", [False, True])
@pytest.mark.parametrize("tolerance_px", [0.0, 1.5])
@pytest.mark.parametrize("region_px", [16, 2048])
@pytest.mark.parametrize("name", ["noise", "dense", "blobs", "one"])
def test_outer_rings_run_counterclockwise_and_holes_clockwise(
    name, region_px, tolerance_px, instances
):
    """The right-hand rule of RFC 7946, also for outlines joined of pieces."""
    for one in iter_features(
        ArrayLevel(MASKS[name]), default_classes(4), instances=instances,
        tolerance_px=tolerance_px, region_px=region_px,
    ):  # fmt: skip
        shape = shapely.geometry.shape(one["geometry"])
        for polygon in shapely.get_parts(shape):
            assert polygon.exterior.is_ccw
            assert not any(hole.is_ccw for hole in polygon.interiors)


def test_simplified_pieces_of_one_object_do_not_overlap():
    field = ndimage.gaussian_filter(np.random.default_rng(3).random((80, 80)), 1.2)
    parts, _ = ndimage.label(field > np.quantile(field, 0.5))
    mask = np.where(parts > 0, parts % 5 + 1, 0).astype(np.int32)
    for tolerance_px in (1.0, 3.0, 10.0):
        for one in iter_features(
            ArrayLevel(mask), (), instances=True, tolerance_px=tolerance_px, scale=8,
            extent=(633, 634),
        ):  # fmt: skip
            shape = shapely.geometry.shape(one["geometry"])
            assert shape.is_valid, tolerance_px
            assert shape.area > 0
            assert max(shape.bounds) <= 634


def test_an_existing_file_is_kept(tmp_path):
    path = tmp_path / "mask.geojson"
    path.write_text("mine")
    with pytest.raises(ExportError, match="exists already; pass --overwrite"):
        write_geojson(path, ArrayLevel(MASKS["one"]), default_classes(2))
    assert path.read_text() == "mine"


def test_a_failing_read_leaves_no_file(tmp_path):
    class Broken(ArrayLevel):
        def read(self, box):
            if box.y0 > 0:
                raise ExportError("damaged")
            return super().read(box)

    path = tmp_path / "mask.geojson"
    with pytest.raises(ExportError, match="damaged"):
        write_geojson(path, Broken(np.ones((5000, 4), dtype=np.uint8)), default_classes(2))
    assert list(tmp_path.iterdir()) == []


def test_csv_and_its_totals(tmp_path):
    mask = MASKS["blobs"]
    path = tmp_path / "objects.csv"
    count, totals_path = write_csv(path, ArrayLevel(mask), default_classes(3), um2_per_px=0.25)
    rows = list(csv.DictReader(path.open()))
    assert len(rows) == count == len(brute_force(mask))
    got = sorted(
        (int(r["class_id"]), int(r["area_px"]), (int(r["y0_px"]), int(r["x0_px"]))) for r in rows
    )
    assert got == sorted((v, a, box[:2]) for v, a, _, box in brute_force(mask))
    assert totals_path == totals_beside(path)
    for total in csv.DictReader(totals_path.open()):
        area = np.count_nonzero(mask == int(total["class_id"]))
        assert int(total["area_px"]) == area
        assert float(total["area_um2"]) == pytest.approx(area * 0.25)
        assert float(total["area_mm2"]) == pytest.approx(area * 0.25e-6, abs=1e-6)


@pytest.mark.parametrize("region_px", [4, 64])
def test_ids_of_64_bits_are_told_as_they_are(region_px):
    ids = (1, 2**40 + 1, 2**63 + 5, 2**64 - 1)
    mask = np.zeros((9, 20), dtype=np.uint64)
    for place, value in enumerate(ids):
        mask[1:8, 5 * place : 5 * place + 4] = value
    found = iter_instances(ArrayLevel(mask), region_px=region_px)
    assert sorted((one.value, one.area_px) for one in found) == [(value, 28) for value in ids]


def test_totals_that_are_there_are_not_replaced_unasked(tmp_path):
    level, classes = ArrayLevel(MASKS["blobs"]), default_classes(3)
    path = tmp_path / "objects.csv.gz"
    totals_beside(path).write_text("of objects.csv")
    with pytest.raises(ExportError, match=r"objects\.totals\.csv: exists already"):
        write_csv(path, level, classes)
    assert totals_beside(path).read_text() == "of objects.csv"
    assert list(tmp_path.iterdir()) == [totals_beside(path)]
    write_csv(path, level, classes, overwrite=True)
    assert totals_beside(path).read_text().startswith("class_id,")


def test_every_column_of_the_tables(tmp_path):
    """A mask of half the slide's resolution: px of the slide, µm² of its own px."""
    mask = MASKS["blobs"]
    names = [one.name for one in default_classes(3)]
    path = tmp_path / "objects.csv"
    _, totals_path = write_csv(
        path, ArrayLevel(mask), default_classes(3), scale=2, um2_per_px=0.998001
    )
    rows = list(csv.DictReader(path.open()))
    assert [int(row["id"]) for row in rows] == list(range(1, len(rows) + 1))
    assert {row["class"] for row in rows} == {names[1], names[2]}
    got = [
        (
            names.index(row["class"]),
            int(row["class_id"]),
            int(row["area_px"]),
            float(row["area_um2"]),
            (float(row["centroid_y_px"]), float(row["centroid_x_px"])),
            tuple(int(row[side]) for side in ("y0_px", "x0_px", "y1_px", "x1_px")),
        )
        for row in rows
    ]
    wanted = [
        (v, v, 4 * a, round(a * 0.998001, 4), (round(2 * y, 3), round(2 * x, 3)),
         tuple(2 * side for side in box))
        for v, a, (y, x), box in brute_force(mask)
    ]  # fmt: skip
    for one, other in zip(sorted(got), sorted(wanted), strict=True):
        assert one[:3] == other[:3]
        assert one[3] == pytest.approx(other[3], abs=1e-4)
        assert one[4] == pytest.approx(other[4], abs=2e-3)
        assert one[5] == other[5]
    totals = list(csv.DictReader(totals_path.open()))
    assert [(total["class"], int(total["objects"])) for total in totals] == [
        (names[value], sum(one[0] == value for one in wanted)) for value in (1, 2)
    ]


def test_csv_without_a_pixel_size_leaves_micrometres_empty(tmp_path):
    path = tmp_path / "objects.csv"
    write_csv(path, ArrayLevel(MASKS["full"]), default_classes(3))
    (row,) = csv.DictReader(path.open())
    assert (row["area_px"], row["area_um2"]) == ("3500", "")


def weights_like(mask, seed=4):
    return np.random.default_rng(seed).integers(0, 256, mask.shape).astype(np.uint8)


@pytest.mark.parametrize("region_px", [16, 37, 2048])
@pytest.mark.parametrize("name", MASKS)
def test_weights_are_summed_over_each_object(name, region_px):
    mask = MASKS[name]
    weights = weights_like(mask)
    expected = []
    for value in np.unique(mask[mask > 0]):
        ids, count = ndimage.label(mask == value)
        sums = ndimage.sum_labels(weights.astype(float), ids, range(1, count + 1))
        areas = ndimage.sum_labels(ids > 0, ids, range(1, count + 1))
        expected += [(int(value), int(a), float(s)) for a, s in zip(areas, sums, strict=True)]
    found = [
        (one.value, one.area_px, one.sum_weight)
        for one in iter_objects(
            ArrayLevel(mask), region_px=region_px, probability=lambda box, _: weights[box.slices]
        )
    ]
    assert sorted(found) == sorted(expected)


def test_an_instance_in_pieces_has_one_mean(tmp_path):
    mask = np.zeros((40, 40), np.int32)
    mask[2:5, 2:30] = 7
    mask[30:39, 1:3] = 7
    mask[20:22, 20:22] = 9
    weights = weights_like(mask)
    path = tmp_path / "objects.csv"
    write_csv(
        path, ArrayLevel(mask), (), instances=True, probability=lambda box, _: weights[box.slices]
    )
    rows = {int(row["id"]): row for row in csv.DictReader(path.open())}
    for value in (7, 9):
        mean = weights[mask == value].mean() / 255
        assert abs(float(rows[value]["mean_probability"]) - mean) < 1e-4
    (one,) = [
        feature["properties"]["measurements"]
        for feature in iter_features(
            ArrayLevel(mask), (), instances=True, probability=lambda box, _: weights[box.slices]
        )
        if feature["properties"]["object_id"] == 7
    ]
    assert abs(one["mean probability"] - weights[mask == 7].mean() / 255) < 1e-4


def test_without_probabilities_there_is_no_column(tmp_path):
    path = tmp_path / "objects.csv"
    write_csv(path, ArrayLevel(MASKS["blobs"]), default_classes(3))
    assert "mean_probability" not in path.read_text().splitlines()[0]
    for feature in iter_features(ArrayLevel(MASKS["blobs"]), default_classes(3)):
        assert "mean probability" not in feature["properties"]["measurements"]


def test_a_read_only_folder_is_said_of_the_file_that_was_asked_for(tmp_path, monkeypatch):
    def refuse(path, *_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    said = rf"^{re.escape(str(tmp_path))}/m.geojson: cannot be written: Read-only file system$"
    with pytest.raises(ExportError, match=said):
        write_geojson(tmp_path / "m.geojson", ArrayLevel(MASKS["one"]), default_classes(2))


def test_what_cannot_be_read_is_not_said_to_be_what_cannot_be_written(tmp_path):
    class Damaged(ArrayLevel):
        def read(self, box):
            raise StoreError("slide.zarr: array 0 cannot be read")

    with pytest.raises(StoreError, match=r"^slide.zarr: array 0 cannot be read$"):
        write_geojson(tmp_path / "m.geojson", Damaged(MASKS["one"]), default_classes(2))
    assert list(tmp_path.iterdir()) == []
