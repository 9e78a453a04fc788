import json
import warnings
from pathlib import Path

import numpy as np
import ome_zarr_models.v04
import ome_zarr_models.v05
import pytest
import tifffile
import zarr
from ome_zarr.io import parse_url
from ome_zarr.writer import write_image

from tilepipe.errors import ExportError, PlanError, SlideError, StoreError
from tilepipe.export import Result, copy_store, render_view, write_ome_tiff
from tilepipe.export.image import class_tables
from tilepipe.pipeline.inspect import inspect
from tilepipe.pipeline.source import open_source, resolve_level
from tilepipe.spec import JobSpec, default_classes
from tilepipe.store import open_store, reduce_image, reduce_label
from tilepipe.tiling import Box
from tilepipe.view.source import open_sources


def foreign(
    path, *, version="0.5", axes="tczyx", shape=(1, 3, 1, 301, 200), steps=(1, 2, 4), told=None,
    unit=None,
):  # fmt: skip
    """Write an image as another program might: odd chunks, its own pyramid.

    A step is a number, or one for y and one for x; ``told`` are those that the metadata says.
    """
    pixels = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
    group = zarr.open_group(path, mode="w", zarr_format=3 if version == "0.5" else 2)
    datasets = []
    for index, step in enumerate(steps):
        y, x = step if isinstance(step, tuple) else (step, step)
        rows, columns = (
            np.arange(0, side, by).astype(int) for side, by in zip(shape[-2:], (y, x), strict=True)
        )
        data = pixels[..., rows[:, None], columns]
        step = (told or steps)[index]
        y, x = step if isinstance(step, tuple) else (step, step)
        options = (
            {} if version == "0.5" else {"chunk_key_encoding": {"name": "v2", "separator": "/"}}
        )
        if version == "0.5":
            options["dimension_names"] = tuple(axes)
        array = group.create_array(
            f"scale{index}",
            shape=data.shape,
            dtype=data.dtype,
            chunks=(*(1 for _ in data.shape[:-2]), 70, 90),
            **options,
        )
        array[...] = data
        scale = [1.0] * (len(axes) - 2) + [y * 0.25, x * 0.25]
        datasets.append(
            {
                "path": f"scale{index}",
                "coordinateTransformations": [{"type": "scale", "scale": scale}],
            }
        )
    kinds = {"t": "time", "c": "channel"}
    described = [
        {
            "name": axis,
            "type": kinds.get(axis, "space"),
            **({"unit": unit} if unit and axis in "zyx" else {}),
        }
        for axis in axes
    ]
    entry = {"axes": described, "datasets": datasets, "name": "theirs"}
    if version == "0.5":
        group.attrs["ome"] = {"version": "0.5", "multiscales": [entry]}
    else:
        group.attrs["multiscales"] = [{**entry, "version": "0.4"}]
    return pixels


@pytest.mark.parametrize("version", ["0.5", "0.4"])
@pytest.mark.parametrize(
    "axes, shape",
    [
        ("tczyx", (1, 3, 1, 301, 200)),
        ("czyx", (2, 1, 301, 200)),
        ("cyx", (3, 301, 200)),
        ("tyx", (1, 301, 200)),
        ("yx", (301, 200)),
    ],
)
def test_every_arrangement_of_axes_is_read(tmp_path, version, axes, shape):
    path = str(tmp_path / "theirs.zarr")
    pixels = foreign(path, version=version, axes=axes, shape=shape)
    store = open_store(path)
    channels = shape[axes.index("c")] if "c" in axes else 1
    assert (store.channels, store.extent, store.n_levels) == (channels, (301, 200), 3)
    assert not store.own
    assert store.mpp is None
    expected = pixels.reshape(channels, 301, 200)
    np.testing.assert_array_equal(store.image(0).read(Box(0, 0, 301, 200)), expected)
    np.testing.assert_array_equal(
        store.image(1).read(Box(3, 5, 100, 71)), expected[:, ::2, ::2][:, 3:100, 5:71]
    )
    assert [store.image(k).downsample for k in range(3)] == [1, 2, 4]
    with pytest.raises(StoreError, match="writable=True"):
        unit = store.image(0).grid.unit(0, 0)
        store.image(0).write_unit(unit, np.zeros((channels, *unit.box.shape), np.uint8))


@pytest.mark.parametrize(
    ("steps", "told", "whole"),
    [
        ((1, 1.5, 3), None, {0: 1, 2: 3}),
        ((1, 2.5, 5), None, {0: 1, 2: 5}),
        ((1, (2, 1), (4, 2)), None, {0: 1}),
        ((1, (1, 2), 2), None, {0: 1, 2: 2}),
        ((1, 2, 4), (1, 301 / 150, 301 / 75), {0: 1, 1: 2, 2: 4}),  # of rounded sizes
        ((1, 2, 4), (1, 1, 1), {0: 1, 1: 2, 2: 4}),  # left out
        ((1, 2, 4), (1, 2, 3), {0: 1, 1: 2}),  # not what the sizes say
        ((1, 16, 100), None, {0: 1, 1: 16, 2: 100}),
    ],
)
def test_levels_that_are_smaller_by_no_whole_number(tmp_path, steps, told, whole):
    """Rounded, they were taken for others: masks and areas on them were of another size."""
    path = str(tmp_path / "theirs.zarr")
    foreign(path, axes="cyx", shape=(3, 301, 200), steps=steps, told=told, unit="micrometer")
    store = open_store(path, writable=True)
    assert {level.index: level.downsample for level in store.whole_levels()} == whole
    for index in set(range(3)) - set(whole):
        with pytest.raises(StoreError, match=f"level {index} of .* by a whole number"):
            store.level_downsample(index)
        with pytest.raises(StoreError, match="by a whole number"):
            store.create_label("m", classes=default_classes(2), level=index, unit_px=128)
    assert store.labels == ()
    assert [
        one.downsample for one in open_sources([path], cache_bytes=1 << 20)[0].image.levels
    ] == [*whole.values()]


def test_a_level_that_is_smaller_by_no_whole_number_is_not_segmented(tmp_path):
    path = str(tmp_path / "theirs.zarr")
    foreign(
        path, axes="cyx", shape=(3, 301, 200), steps=(1, 1.5, 3), unit="micrometer"
    )  # 0.25, 0.375 and 0.75 um/px
    source = open_source(path, None, JobSpec())
    with pytest.raises(StoreError, match=r"level 1 of 201 x 134 px .* by a whole number"):
        resolve_level(source, JobSpec(level=1))
    # Rounded to 2, level 1 was the one of 0.5 um/px.
    for mpp in (0.5, 0.375):
        with pytest.raises(PlanError, match="level 1: 201 x 134 px, not smaller by a whole number"):
            resolve_level(source, JobSpec(mpp=mpp))
    assert resolve_level(source, JobSpec(mpp=0.75)) == 2
    assert resolve_level(source, JobSpec()) == 0
    assert [level["downsample"] for level in inspect(path)["image"]["levels"]] == [1, 1.4925, 3]


@pytest.mark.parametrize("version", ["0.5", "0.4"])
def test_labels_are_added_without_touching_the_image(tmp_path, version):
    path = tmp_path / "theirs.zarr"
    foreign(str(path), version=version, axes="cyx", shape=(3, 301, 200), unit="nanometer")
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    store = open_store(str(path), writable=True)
    assert store.mpp == pytest.approx((0.00025, 0.00025))
    label = store.create_label("m", classes=default_classes(2), unit_px=128)
    mask = np.random.default_rng(1).integers(0, 2, (301, 200)).astype(np.uint8)
    journal = store.journal("m", "f")
    for unit in label.level(0).grid:
        journal.write(
            "segment", 0, unit, checksum=label.level(0).write_unit(unit, mask[unit.box.slices])
        )
    label.write_record({"state": "done"})
    assert {p: p.read_bytes() for p in before} == before
    store.write_record({"model": "unet"})
    again = open_store(str(path))
    assert again.read_record() == {"model": "unet"}
    assert again.labels == ("m",)
    assert len(again.journal("m", "f").recorded("segment", 0)) == 6
    np.testing.assert_array_equal(again.label("m").level(0).read(Box(0, 0, 301, 200)), mask)
    models = ome_zarr_models.v05 if version == "0.5" else ome_zarr_models.v04
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group = zarr.open_group(str(path), mode="r")
        assert models.Image.from_zarr(group).labels is not None
        list(group.members(max_depth=None))


@pytest.mark.parametrize("version", ["0.5", "0.4"])
@pytest.mark.parametrize("unit", [None, "nanometer", "micrometer", "pixel"])
def test_a_label_lies_where_its_image_lies(tmp_path, version, unit):
    """Viewers compare the numbers, not the units; the image may begin elsewhere than at 0."""
    path = tmp_path / "theirs.zarr"
    foreign(str(path), version=version, axes="tczyx", unit=unit)
    group = zarr.open_group(str(path), mode="a")
    entries = (group.attrs["ome"] if version == "0.5" else group.attrs)["multiscales"]
    for dataset in entries[0]["datasets"]:
        step = {"type": "translation", "translation": [0.0, 0.0, 0.0, 100.0, -20.0]}
        dataset["coordinateTransformations"].append(step)
    entries[0]["coordinateTransformations"] = [
        {"type": "scale", "scale": [1.0, 1.0, 1.0, 2.0, 4.0]},
        {"type": "translation", "translation": [0.0, 0.0, 0.0, 7.0, 9.0]},
    ]
    if version == "0.5":
        group.attrs["ome"] = {"version": "0.5", "multiscales": entries}
    else:
        group.attrs["multiscales"] = entries
    store = open_store(str(path), writable=True)
    um = {"nanometer": 1e-3, "micrometer": 1}.get(unit)
    assert store.mpp == (None if um is None else pytest.approx((0.5 * um, 1.0 * um)))
    store.create_label("m", classes=default_classes(3), level=1, unit_px=128, probabilities=True)
    for place in ("labels/m", "probabilities/m"):
        attributes = dict(zarr.open_group(f"{path}/{place}", mode="r").attrs)
        (made,) = (attributes["ome"] if version == "0.5" else attributes)["multiscales"]
        assert [axis.get("unit") for axis in made["axes"][-2:]] == [unit, unit]
        for factor, dataset in zip((2, 4, 8), made["datasets"], strict=True):
            scale, shift = dataset["coordinateTransformations"]
            assert scale["scale"][-2:] == [0.5 * factor, 1.0 * factor]
            centre = [207 + 0.5 * (factor - 1) / 2, -71 + 1.0 * (factor - 1) / 2]
            assert shift["translation"][-2:] == centre
    label = open_store(str(path)).label("m")
    assert [label.level(k).downsample for k in range(3)] == [2, 4, 8]
    label.check_placed()


@pytest.mark.parametrize("version", ["0.5", "0.4"])
def test_a_label_is_seen_in_a_store_with_consolidated_metadata(tmp_path, version):
    path = tmp_path / "theirs.zarr"
    foreign(str(path), version=version, axes="cyx", shape=(3, 301, 200))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        zarr.consolidate_metadata(str(path))
    store = open_store(str(path), writable=True)
    store.create_label("m", classes=default_classes(2), unit_px=128)
    group = zarr.open_group(str(path), mode="r")
    assert "m" in dict(group["labels"].members())
    assert ("ome" if version == "0.5" else "multiscales") in group.attrs


@pytest.mark.parametrize("version", ["0.5", "0.4"])
def test_an_image_of_spatialdata_takes_no_label(tmp_path, version):
    """With labels in it, that package calls the image corrupted and opens nothing of the store."""
    path = tmp_path / "sd.zarr" / "images" / "slide"
    root = zarr.open_group(tmp_path / "sd.zarr", mode="w", zarr_format=3 if version == "0.5" else 2)
    root.attrs["spatialdata_attrs"] = {"version": "0.2"}
    pixels = foreign(str(path), version=version, axes="cyx", shape=(3, 301, 200))
    zarr.open_group(str(path), mode="a").attrs["spatialdata_attrs"] = {"version": "0.3"}
    before = {one: one.read_bytes() for one in tmp_path.rglob("*") if one.is_file()}
    with pytest.raises(StoreError, match=r"of a SpatialData store.*another output \(-o\)"):
        open_source(str(path), None, JobSpec())
    assert {one: one.read_bytes() for one in tmp_path.rglob("*") if one.is_file()} == before
    with open_source(str(path), str(tmp_path / "mine.zarr"), JobSpec()).slide as slide:
        np.testing.assert_array_equal(slide.read(Box(0, 0, 301, 200)), pixels)
    with pytest.raises(SlideError, match=r"give one of its images, .*/images/NAME, and -o"):
        open_source(str(tmp_path / "sd.zarr"), None, JobSpec())


@pytest.mark.parametrize("axes", [None, ["t", "c", "z", "y", "x"]])
def test_versions_before_04_are_told_as_such(tmp_path, axes):
    path = tmp_path / "theirs.zarr"
    pixels = foreign(str(path), version="0.4")
    group = zarr.open_group(str(path), mode="a")
    entry = {"version": "0.3", "datasets": [{"path": f"scale{k}"} for k in range(3)]}
    group.attrs["multiscales"] = [entry if axes is None else {**entry, "axes": axes}]
    with pytest.raises(StoreError, match=r"is of OME-Zarr 0.3 or before, .* \(-o\)"):
        open_source(str(path), None, JobSpec())
    with open_source(str(path), str(tmp_path / "mine.zarr"), JobSpec()).slide as slide:
        np.testing.assert_array_equal(slide.read(Box(0, 0, 301, 200)), pixels[0, :, 0])


def test_what_ome_zarr_py_writes_is_read(tmp_path):
    path = tmp_path / "theirs.zarr"
    pixels = np.random.default_rng(0).integers(0, 60000, (2, 260, 300), np.uint16)
    root = zarr.open_group(str(path), mode="w")
    write_image(pixels, root, axes="cyx")
    assert parse_url(path) is not None
    store = open_store(str(path), writable=True)
    assert store.dtype == np.uint16
    np.testing.assert_array_equal(store.image(0).read(Box(0, 0, 260, 300)), pixels)
    store.create_label("m", classes=default_classes(2), unit_px=128)


def test_labels_of_others_are_read(tmp_path):
    path = tmp_path / "theirs.zarr"
    foreign(str(path), axes="cyx", shape=(3, 301, 200))
    mask = foreign(str(path / "labels/nuclei"), axes="tczyx", shape=(1, 1, 1, 301, 200))
    document = {"zarr_format": 3, "node_type": "group"}
    document["attributes"] = {"ome": {"version": "0.5", "labels": ["nuclei", "../evil", 7]}}
    (path / "labels/zarr.json").write_text(json.dumps(document))
    store = open_store(str(path), writable=True)
    assert store.labels == ("nuclei",)
    label = store.label("nuclei")
    np.testing.assert_array_equal(label.level(0).read(Box(0, 0, 301, 200)), mask[0, 0, 0])
    assert label.classes == ()
    store.create_label("m", classes=default_classes(2), unit_px=128)
    assert store.labels == ("nuclei", "m")
    with pytest.raises(StoreError, match="no label 'x'; there are: nuclei, m"):
        store.label("x")


@pytest.mark.parametrize(
    "axes, shape, said",
    [
        ("tcyx", (2, 1, 301, 200), "only one plane of one time point"),
        ("zyx", (5, 301, 200), "only one plane of one time point"),
        ("cxy", (1, 301, 200), "its axes are c, x, y"),
        ("yxc", (301, 200, 3), "its axes are y, x, c"),
    ],
)
def test_what_cannot_be_read_is_told(tmp_path, axes, shape, said):
    path = str(tmp_path / "theirs.zarr")
    foreign(path, axes=axes, shape=shape)
    with pytest.raises(StoreError, match=said):
        open_store(path)


def scaled(own, common, *more):
    def scale(number):
        return [{"type": "scale", "scale": [1, number, number]}]

    datasets = [
        {"path": "scale0", "coordinateTransformations": scale(each)} for each in (own, *more)
    ]
    axes = [{"name": axis} for axis in "cyx"]
    image = {"axes": axes, "datasets": datasets, "coordinateTransformations": scale(common)}
    return {"multiscales": [image]}


BROKEN = {
    "no multiscales": {},
    "empty multiscales": {"multiscales": []},
    "no datasets": {"multiscales": [{"axes": [{"name": "y"}, {"name": "x"}], "datasets": []}]},
    "datasets of another kind": {
        "multiscales": [{"axes": [{"name": "y"}, {"name": "x"}], "datasets": [7]}]
    },
    "an array that is not there": {
        "multiscales": [{"axes": [{"name": "y"}, {"name": "x"}], "datasets": [{"path": "no"}]}]
    },
    "a path that leaves": {
        "multiscales": [{"axes": [{"name": "y"}, {"name": "x"}], "datasets": [{"path": "../x"}]}]
    },
    "more axes than the array": {
        "multiscales": [
            {
                "axes": [{"name": a} for a in "tczyx"],
                "datasets": [{"path": "scale0"}],
            }
        ]
    },
    "scales that are 0 together": scaled(1e-200, 1e-200),
    "scales that are infinite together": scaled(1e200, 1e200),
    "a level that is infinitely coarser": scaled(1e-300, 1.0, 1e300),
    "a list": [1],
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_metadata_is_one_error(tmp_path, kind):
    path = tmp_path / "theirs.zarr"
    foreign(str(path), axes="cyx", shape=(3, 301, 200))
    document = {"zarr_format": 3, "node_type": "group", "attributes": {"ome": BROKEN[kind]}}
    (path / "zarr.json").write_text(json.dumps(document))
    with pytest.raises(StoreError, match=str(path)):
        open_store(str(path))


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"null", b'{"attributes": 1}', b"[" * 100_000])
def test_a_broken_root_is_one_error(tmp_path, raw):
    path = Path(tmp_path, "a.zarr")
    path.mkdir()
    (path / "zarr.json").write_bytes(raw)
    with pytest.raises(
        StoreError, match=r"cannot|not JSON|not a JSON|does not describe|without OME|broken"
    ):
        open_store(str(path))
    (path / "zarr.json").unlink()
    (path / ".zattrs").write_bytes(raw)
    with pytest.raises(
        StoreError, match=r"cannot|not JSON|not a JSON|does not describe|without OME|broken"
    ):
        open_store(str(path))


def with_label(path, mask, *, scale, unit="micrometer"):
    """A foreign image of 301 x 200 px at 0.25 with a label ``theirs`` of one level."""
    foreign(str(path), axes="cyx", shape=(3, 301, 200), unit="micrometer")
    group = zarr.open_group(str(path / "labels/theirs"), mode="w")
    group.create_array("0", data=mask)
    axes = [{"name": axis, "type": "space", **({"unit": unit} if unit else {})} for axis in "yx"]
    steps = [{"type": "scale", "scale": scale}]
    entry = {"axes": axes, "datasets": [{"path": "0", "coordinateTransformations": steps}]}
    group.attrs["ome"] = {"version": "0.5", "multiscales": [entry], "image-label": {}}
    document = {"zarr_format": 3, "node_type": "group"}
    document["attributes"] = {"ome": {"version": "0.5", "labels": ["theirs"]}}
    (path / "labels/zarr.json").write_text(json.dumps(document))
    return open_store(str(path)).label("theirs")


@pytest.mark.parametrize(
    ("shape", "scale", "unit", "factor"),
    [
        ((301, 200), [0.25, 0.25], "micrometer", 1),
        ((301, 200), [1.0, 1.0], None, 1),  # scales that are not the image's
        ((150, 100), [0.5, 0.5], "micrometer", 2),
        ((151, 100), [500.0, 500.0], "nanometer", 2),
        ((75, 50), [1.0, 1.0], None, 4),  # by its size alone
        ((150, 100), [0.25, 0.25], "micrometer", None),  # a quarter of the image, cut out
        ((100, 60), [0.25, 0.25], "micrometer", None),
        ((602, 400), [0.125, 0.125], "micrometer", None),
        ((301, 100), [0.25, 0.5], "micrometer", None),
    ],
)
def test_a_label_of_others_lies_where_its_scale_says(tmp_path, shape, scale, unit, factor):
    mask = np.zeros(shape, np.uint8)
    mask[20:30, 10:15] = 1
    label = with_label(tmp_path / "theirs.zarr", mask, scale=scale, unit=unit)
    if factor is None:
        with pytest.raises(StoreError, match="does not cover the image"):
            label.check_placed()
        with pytest.raises(StoreError, match="does not cover the image"):
            Result(str(tmp_path / "theirs.zarr"), "theirs")
        assert not open_sources([str(tmp_path / "theirs.zarr")], cache_bytes=1 << 20)[0].labels
        return
    label.check_placed()
    assert label.level(0).downsample == factor
    (feature,) = Result(str(tmp_path / "theirs.zarr"), "theirs").to_geojson()["features"]
    assert feature["properties"]["measurements"] == {
        "Area px": 50 * factor**2,
        "Area µm^2": 50 * factor**2 / 16,
    }
    corners = np.array(feature["geometry"]["coordinates"][0])
    assert corners.min(axis=0).tolist() == [10 * factor, 20 * factor]
    assert corners.max(axis=0).tolist() == [15 * factor, 30 * factor]


@pytest.mark.parametrize("sides", [(1100, 1030), (1101, 1031)])
def test_a_copy_has_the_levels_that_another_program_left_out(tmp_path, sides):
    """One level only, or halves rounded down: the copy is a whole pyramid all the same."""
    pixels = foreign(str(tmp_path / "theirs.zarr"), axes="cyx", shape=(3, *sides))
    mask = (pixels[0] > 200).astype(np.uint8)
    path = tmp_path / "theirs.zarr"
    group = zarr.open_group(str(path / "labels/theirs"), mode="w")
    group.create_array("0", data=mask)
    entry = {"axes": [{"name": "y", "type": "space"}, {"name": "x", "type": "space"}]}
    steps = [{"type": "scale", "scale": [0.25, 0.25]}]
    entry["datasets"] = [{"path": "0", "coordinateTransformations": steps}]
    group.attrs["ome"] = {"version": "0.5", "multiscales": [entry], "image-label": {}}
    labels = zarr.open_group(str(path / "labels"), mode="a")
    labels.attrs["ome"] = {"version": "0.5", "labels": ["theirs"]}
    store = open_store(str(path))
    copy_store(store, str(tmp_path / "copy.zarr"))
    copy = open_store(str(tmp_path / "copy.zarr"))
    image, label = copy.image(0), copy.label("theirs").level(0)
    assert copy.n_levels == copy.label("theirs").n_levels == 3
    np.testing.assert_array_equal(image.read(Box.of_shape(sides)), pixels)
    np.testing.assert_array_equal(label.read(Box.of_shape(sides)), mask)
    for k in (1, 2):
        finer, here = (copy.image(j) for j in (k - 1, k))
        wanted = reduce_image(finer.read(Box.of_shape(finer.shape)))
        if here.shape == store.image(k).shape:
            wanted = store.image(k).read(Box.of_shape(here.shape))
        np.testing.assert_array_equal(here.read(Box.of_shape(here.shape)), wanted)
        finer, here = (copy.label("theirs").level(j) for j in (k - 1, k))
        wanted = reduce_label(finer.read(Box.of_shape(finer.shape)))
        np.testing.assert_array_equal(here.read(Box.of_shape(here.shape)), wanted)


@pytest.mark.parametrize(
    ("dtype", "shape", "scale", "said"),
    [("int64", (301, 200), 0.25, "holds int64"), ("uint8", (100, 66), 0.75, "3 times coarser")],
)
def test_what_no_copy_takes_is_refused_before_it_is_begun(tmp_path, dtype, shape, scale, said):
    mask = np.ones(shape, dtype)
    with_label(tmp_path / "theirs.zarr", mask, scale=[scale, scale])
    with pytest.raises(ExportError, match=said):
        copy_store(open_store(str(tmp_path / "theirs.zarr")), str(tmp_path / "copy.zarr"))
    assert not (tmp_path / "copy.zarr").exists()


@pytest.mark.parametrize("show", ["mask", "overlay"])
@pytest.mark.parametrize("levels", [1, 3])
@pytest.mark.parametrize("up", [True, False])
def test_pictures_of_pyramids_that_are_rounded_down(tmp_path, monkeypatch, show, levels, up):
    """Each pixel of the picture is the mask's that is nearest, whichever level it is drawn from."""
    path = tmp_path / "theirs.zarr"
    sides = (301, 203)
    foreign(str(path), axes="cyx", shape=(3, *sides))
    mask = np.zeros(sides, np.uint8)
    mask[40:200, 60:120] = 1
    group = zarr.open_group(str(path / "labels/theirs"), mode="w")
    datasets = []
    for k in range(levels):
        high, wide = (side >> k if not up else -(-side >> k) for side in sides)
        group.create_array(str(k), data=mask[:: 1 << k, :: 1 << k][:high, :wide])
        steps = [{"type": "scale", "scale": [0.25 * 2**k] * 2}]
        datasets.append({"path": str(k), "coordinateTransformations": steps})
    axes = [{"name": axis, "type": "space"} for axis in "yx"]
    group.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": datasets}]}
    zarr.open_group(str(path / "labels"), mode="a").attrs["ome"] = {"labels": ["theirs"]}
    store = open_store(str(path))
    label = store.label("theirs")
    monkeypatch.setattr("tilepipe.export.image._BAND_PX", 1000)
    color = class_tables(label.classes)[0][1]
    for size in (50, 80, 160, 301):
        picture = render_view(store, label, longest_px=size, show=show, opacity=1.0)
        assert max(picture.shape) <= size
        factor = -(-301 // picture.shape[0])
        drawn = (picture == color).all(axis=-1)
        wanted = mask[::factor, ::factor][: drawn.shape[0], : drawn.shape[1]] == 1
        assert (drawn[: wanted.shape[0], : wanted.shape[1]] == wanted).all()
    corner = Box(300, 0, 301, 203)
    assert render_view(store, label, region=corner, longest_px=60, show=show).shape[0] == 1


@pytest.mark.parametrize("dtype", ["int64", "uint64", "int32", "int8"])
def test_ids_of_any_width_become_an_ome_tiff(tmp_path, dtype):
    mask = np.zeros((301, 200), dtype)
    mask[20:30, 10:15] = 100
    mask[50:60, 10:15] = 101 if dtype == "int8" else 2**31 - 1
    label = with_label(tmp_path / "theirs.zarr", mask, scale=[0.25, 0.25])
    store = open_store(str(tmp_path / "theirs.zarr"))
    write_ome_tiff(tmp_path / "ids.ome.tif", store, label=label.name)
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "ids.ome.tif"), mask)


def test_ids_that_no_ome_tiff_holds_are_refused(tmp_path):
    mask = np.full((301, 200), 2**31, np.int64)
    with_label(tmp_path / "theirs.zarr", mask, scale=[0.25, 0.25])
    store = open_store(str(tmp_path / "theirs.zarr"))
    with pytest.raises(ExportError, match="2147483648, which do not fit into the int32"):
        write_ome_tiff(tmp_path / "ids.ome.tif", store, label="theirs")
    assert not (tmp_path / "ids.ome.tif").exists()
