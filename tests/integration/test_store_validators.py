import json
import warnings
from pathlib import Path

import numpy as np
import ome_zarr_models
import ome_zarr_models.v04
import ome_zarr_models.v05
import pytest
import zarr
from ome_zarr.io import parse_url
from ome_zarr.reader import Reader

from tilepipe.spec import LabelClass, default_classes
from tilepipe.store import create_store, open_store, reduce_image, reduce_label
from tilepipe.tiling import Box

MODELS = {"0.5": ome_zarr_models.v05, "0.4": ome_zarr_models.v04}
CLASSES = (
    LabelClass(name="background", color=(0, 0, 0, 0)),
    LabelClass(name="Tumour, müde", color=(255, 0, 10, 200)),
    LabelClass(name="stroma", color=(0, 99, 255, 255)),
)


def fill(store, *, seed=0):
    rng = np.random.default_rng(seed)
    if np.dtype(store.dtype).kind == "f":
        pixels = rng.random((store.channels, *store.extent), dtype=np.float32)
    else:
        top = np.iinfo(store.dtype).max
        pixels = rng.integers(0, top, (store.channels, *store.extent), store.dtype)
    for index in range(store.n_levels):
        level = store.image(index)
        for unit in level.grid:
            level.write_unit(unit, pixels[(..., *unit.box.slices)])
        pixels = reduce_image(pixels)


def fill_label(label, seed=0):
    mask = np.random.default_rng(seed).integers(0, 3, label.level(0).shape).astype(np.uint8)
    for index in range(label.n_levels):
        level = label.level(index)
        for unit in level.grid:
            level.write_unit(unit, mask[unit.box.slices])
        mask = reduce_label(mask)


def make(path, version, channels, dtype, mpp):
    store = create_store(
        str(path),
        channels=channels,
        dtype=dtype,
        extent=(1101, 900),
        mpp=mpp,
        channel_names=[f"stain {i}" for i in range(channels)],
        rgb=channels == 3,
        ome_zarr=version,
        unit_px=512,
        chunk_px=256,
    )
    fill(store)
    for name, level in (("unet", 0), ("coarse", 1)):
        fill_label(store.create_label(name, classes=CLASSES, level=level, unit_px=512))
    store.write_record({"spec": {"model": "unet"}})
    store.journal("unet", "f").write(
        "segment", 0, store.image(0).grid.unit(0, 0), checksum="0" * 16
    )
    return store


@pytest.mark.parametrize("version", ["0.5", "0.4"])
@pytest.mark.parametrize(
    "channels, dtype, mpp",
    [
        (3, "uint8", (0.5, 0.25)),
        (1, "uint8", None),
        (4, "uint16", (1.0, 1.0)),
        (1, "float32", (9.0, 9.0)),
    ],
)
def test_both_validators_pass(tmp_path, version, channels, dtype, mpp):
    store = make(tmp_path / "a.zarr", version, channels, dtype, mpp)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group = zarr.open_group(store.location, mode="r")
        image = MODELS[version].Image.from_zarr(group)
        assert type(ome_zarr_models.open_ome_zarr(group)) is MODELS[version].Image
        labels = MODELS[version].Labels.from_zarr(group["labels"])
        for name in ("unet", "coarse"):
            MODELS[version].ImageLabel.from_zarr(group[f"labels/{name}"])
        members = dict(group.members(max_depth=None))
    assert image.labels is not None
    found = labels.label_paths if version == "0.5" else labels.attributes.labels
    assert list(found) == ["unet", "coarse"]
    assert {"0", "1", "2", "labels", "labels/unet/2"} <= set(members)

    nodes = list(Reader(parse_url(store.location))())
    assert [level.shape for level in nodes[0].data] == [
        (channels, *store.image(level).shape) for level in range(3)
    ]
    assert nodes[0].metadata["axes"][1:] == [
        {"name": axis, "type": "space", **({"unit": "micrometer"} if mpp else {})} for axis in "yx"
    ]
    masks = {Path(node.zarr.subpath("")).name: node for node in nodes[2:]}
    assert set(masks) == {"unet", "coarse"}
    np.testing.assert_array_equal(
        masks["unet"].data[0].compute(), store.label("unet").level(0).read(Box(0, 0, 1101, 900))
    )
    assert masks["unet"].metadata["properties"][1]["class"] == "Tumour, müde"
    whole = Box(0, 0, *store.extent)
    np.testing.assert_array_equal(nodes[0].data[0].compute(), store.image(0).read(whole))


def metadata(store, group=""):
    if store.version == "0.5":
        path = Path(store.location, group, "zarr.json")
        return json.loads(path.read_text())["attributes"]["ome"]
    return json.loads(Path(store.location, group, ".zattrs").read_text())


@pytest.mark.parametrize("version", ["0.5", "0.4"])
def test_scales_and_translations_are_those_of_pixel_centres(tmp_path, version):
    store = make(tmp_path / "a.zarr", version, 3, "uint8", (0.5, 0.25))
    datasets = metadata(store)["multiscales"][0]["datasets"]
    for factor, dataset in zip((1, 2, 4), datasets, strict=True):
        assert [item["type"] for item in dataset["coordinateTransformations"]] == [
            "scale",
            "translation",
        ]
        scale, shift = dataset["coordinateTransformations"]
        assert scale["scale"] == [1.0, 0.5 * factor, 0.25 * factor]
        assert shift["translation"] == [0.0, 0.5 * (factor - 1) / 2, 0.25 * (factor - 1) / 2]
    coarse = metadata(store, "labels/coarse")["multiscales"][0]["datasets"][0]
    assert coarse["coordinateTransformations"][0]["scale"] == [1.0, 0.5]
    assert coarse["coordinateTransformations"][1]["translation"] == [0.25, 0.125]
    assert store.label("coarse").image_level == 1
    assert [store.label("coarse").level(k).downsample for k in range(3)] == [2, 4, 8]
    assert store.label("coarse").level(0).shape == store.image(1).shape


@pytest.mark.parametrize("version", ["0.5", "0.4"])
def test_an_unknown_mpp_has_no_unit(tmp_path, version):
    store = make(tmp_path / "a.zarr", version, 1, "uint8", None)
    entry = metadata(store)["multiscales"][0]
    assert all("unit" not in axis for axis in entry["axes"])
    assert entry["datasets"][0]["coordinateTransformations"][0]["scale"] == [1.0, 1.0, 1.0]
    assert open_store(store.location).mpp is None


@pytest.mark.parametrize("version", ["0.5", "0.4"])
def test_label_metadata_lists_every_value(tmp_path, version):
    store = make(tmp_path / "a.zarr", version, 3, "uint8", (0.5, 0.5))
    block = metadata(store, "labels/unet")["image-label"]
    assert [item["label-value"] for item in block["colors"]] == [0, 1, 2]
    assert block["colors"][1]["rgba"] == [255, 0, 10, 200]
    assert [item["class"] for item in block["properties"]] == [c.name for c in CLASSES]
    assert block["source"] == {"image": "../../"}
    assert block["version"] == version
    assert open_store(store.location).label("unet").classes == CLASSES


@pytest.mark.parametrize("version", ["0.5", "0.4"])
def test_objects_are_left_to_the_colours_of_the_viewer(tmp_path, version):
    """napari draws nothing of a label whose colours name the background alone, Vizarr black."""
    store = make(tmp_path / "a.zarr", version, 3, "uint8", (0.5, 0.5))
    store.create_label("objects", classes=CLASSES[:1], unit_px=512, dtype="int32")
    store.create_label("unnamed", classes=(), unit_px=512)
    block = metadata(store, "labels/objects")["image-label"]
    assert "colors" not in block
    assert block["properties"] == [{"label-value": 0, "class": "background"}]
    assert open_store(store.location).label("objects").classes == CLASSES[:1]
    # Lists of the standard have one entry at least.
    assert set(metadata(store, "labels/unnamed")["image-label"]) == {"version", "source"}
    for name in ("objects", "unnamed"):
        MODELS[version].ImageLabel.from_zarr(zarr.open_group(store.location)[f"labels/{name}"])
    nodes = list(Reader(parse_url(store.location))())
    (node,) = (one for one in nodes if Path(one.zarr.subpath("")).name == "objects")
    assert not node.metadata["color"]


def test_arrays_name_their_axes_and_check_their_bytes(tmp_path):
    store = make(tmp_path / "a.zarr", "0.5", 3, "uint8", (0.5, 0.5))
    image = json.loads(Path(store.location, "0/zarr.json").read_text())
    label = json.loads(Path(store.location, "labels/unet/0/zarr.json").read_text())
    assert image["dimension_names"] == ["c", "y", "x"]
    assert label["dimension_names"] == ["y", "x"]
    assert image["chunk_grid"]["configuration"]["chunk_shape"] == [3, 512, 512]
    (shards,) = image["codecs"]
    assert shards["name"] == "sharding_indexed"
    assert shards["configuration"]["chunk_shape"] == [3, 256, 256]
    assert [c["name"] for c in shards["configuration"]["codecs"]] == ["bytes", "blosc", "crc32c"]
    assert shards["configuration"]["index_codecs"][-1]["name"] == "crc32c"
    (masks,) = label["codecs"]
    assert masks["configuration"]["codecs"][-1] == {
        "name": "zstd",
        "configuration": {"level": 3, "checksum": True},
    }


def test_version_04_is_zarr_v2_with_slashes(tmp_path):
    store = make(tmp_path / "a.zarr", "0.4", 3, "uint8", (0.5, 0.5))
    array = json.loads(Path(store.location, "0/.zarray").read_text())
    assert array["zarr_format"] == 2
    assert array["dimension_separator"] == "/"
    assert array["chunks"] == [3, 256, 256]
    assert Path(store.location, "0/0/4/3").is_file()
    assert not list(Path(store.location).rglob("zarr.json"))


@pytest.mark.parametrize("version", ["0.5", "0.4"])
def test_labels_without_an_image_are_valid_labels(tmp_path, version):
    store = create_store(
        str(tmp_path / "a.zarr"),
        channels=3,
        dtype="uint8",
        extent=(600, 700),
        mpp=(0.5, 0.5),
        ome_zarr=version,
        unit_px=256,
        with_image=False,
    )
    fill_label(store.create_label("m", classes=default_classes(3), unit_px=256))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group = zarr.open_group(store.location, mode="r")
        MODELS[version].Labels.from_zarr(group["labels"])
        MODELS[version].ImageLabel.from_zarr(group["labels/m"])
    assert "source" not in metadata(store, "labels/m")["image-label"]
    (node, *_) = list(Reader(parse_url(f"{store.location}/labels/m"))())
    assert node.data[0].shape == (600, 700)


def test_omero_colours_and_windows(tmp_path):
    rgb = make(tmp_path / "rgb.zarr", "0.5", 3, "uint8", None)
    channels = metadata(rgb)["omero"]["channels"]
    assert [channel["color"] for channel in channels] == ["FF0000", "00FF00", "0000FF"]
    assert channels[0]["window"] == {"min": 0.0, "max": 255.0, "start": 0.0, "end": 255.0}
    assert rgb.rgb
    stained = create_store(
        str(tmp_path / "s.zarr"),
        channels=2,
        dtype="uint16",
        extent=(10, 10),
        channel_names=("DAPI", "CD3"),
        channel_colors=("#0000ff", "nonsense"),
        unit_px=16,
    )
    channels = metadata(stained)["omero"]["channels"]
    assert [channel["label"] for channel in channels] == ["DAPI", "CD3"]
    assert channels[0]["color"] == "0000FF"
    assert len(channels[1]["color"]) == 6
    assert channels[1]["window"]["max"] == 65535.0
