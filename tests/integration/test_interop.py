"""Other people's readers open our stores and see the same pixels, names, sizes and colours."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from tilepipe.export import copy_store
from tilepipe.spec import LabelClass
from tilepipe.store import create_store, open_store, reduce_image, reduce_label

SIDES = (700, 1100)
CLASSES = (
    LabelClass(name="background", color=(0, 0, 0, 0)),
    LabelClass(name="nucleus", color=(10, 200, 30, 255)),
)


def write_pyramid(levels, reduce, pixels):
    for level in levels:
        for unit in level.grid:
            level.write_unit(unit, np.ascontiguousarray(pixels[(..., *unit.box.slices)]))
        pixels = reduce(pixels)


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (3, *SIDES), dtype=np.uint8)
    mask = np.zeros(SIDES, dtype=np.uint8)
    mask[100:300, 50:250] = 1
    return image, mask


@pytest.fixture(scope="module", params=["0.5", "0.4"])
def path(request, arrays, tmp_path_factory):
    image, mask = arrays
    folder = tmp_path_factory.mktemp("interop")
    path = folder / "slide.zarr"
    store = create_store(
        str(path),
        channels=3,
        dtype="uint8",
        extent=SIDES,
        mpp=(0.5, 0.25),
        channel_names=("red", "green", "blue"),
        channel_colors=("FF0000", "00FF00", "0000FF"),
        rgb=True,
        unit_px=512,
    )
    write_pyramid([store.image(k) for k in range(store.n_levels)], reduce_image, image)
    label = store.create_label("unet", classes=CLASSES, unit_px=512)
    write_pyramid([label.level(k) for k in range(label.n_levels)], reduce_label, mask)
    if request.param == "0.5":
        return path
    copy_store(store, str(folder / "slide-0.4.zarr"))
    return folder / "slide-0.4.zarr"


@pytest.fixture(autouse=True)
def _their_warnings():
    # What other libraries warn about in themselves is not ours to mend.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_ome_zarr_py(path, arrays):
    pytest.importorskip("ome_zarr")
    from ome_zarr.io import parse_url
    from ome_zarr.reader import Reader

    image, mask = arrays
    nodes = list(Reader(parse_url(str(path)))())
    found = nodes[0]
    assert [axis["name"] for axis in found.metadata["axes"]] == ["c", "y", "x"]
    assert [data.shape[-2:] for data in found.data] == [(700, 1100), (350, 550), (175, 275)]
    assert np.array_equal(np.asarray(found.data[0]), image)
    scale = found.metadata["coordinateTransformations"][1][0]["scale"]
    assert scale == [1.0, 1.0, 0.5]
    labels = [node for node in nodes if node.zarr.zgroup and "labels" in str(node.zarr)]
    masks = [node for node in labels if node.data and node.data[0].shape == SIDES]
    assert masks
    assert np.array_equal(np.asarray(masks[0].data[0]), mask)


def test_ome_zarr_models(path):
    import zarr

    version = open_store(str(path)).version
    module = pytest.importorskip(f"ome_zarr_models.v0{version[-1]}")
    group = zarr.open_group(str(path), mode="r")
    image = module.Image.from_zarr(group)
    (multiscale,) = (
        image.ome_attributes.multiscales if version == "0.5" else image.attributes.multiscales
    )
    assert [axis.unit for axis in multiscale.axes] == [None, "micrometer", "micrometer"]
    module.ImageLabel.from_zarr(group["labels/unet"])


def test_plain_zarr_and_dask(path, arrays):
    import dask.array
    import zarr

    group = zarr.open_group(str(path), mode="r")
    assert np.array_equal(group["0"][:], arrays[0])
    lazy = dask.array.from_zarr(group["labels/unet/0"])
    assert int((lazy == 1).sum().compute()) == int((arrays[1] == 1).sum())


def test_ngff_zarr(path, arrays):
    ngff_zarr = pytest.importorskip("ngff_zarr")
    multiscales = ngff_zarr.from_ngff_zarr(str(path))
    finest = multiscales.images[0]
    assert finest.dims == ("c", "y", "x")
    assert (finest.scale["y"], finest.scale["x"]) == (0.5, 0.25)
    assert np.array_equal(np.asarray(finest.data), arrays[0])


def test_bioio(path, arrays):
    bioio = pytest.importorskip("bioio_ome_zarr")
    reader = bioio.Reader(str(path))
    data = np.asarray(
        reader.get_image_data("CYX") if hasattr(reader, "get_image_data") else reader.data
    )
    assert np.array_equal(data.reshape(arrays[0].shape), arrays[0])
    assert reader.physical_pixel_sizes.Y == 0.5
    assert reader.physical_pixel_sizes.X == 0.25


def test_napari_ome_zarr(path, arrays):
    plugin = pytest.importorskip("napari_ome_zarr")
    reader = plugin.napari_get_reader(str(path))
    assert reader is not None
    layers = reader(str(path))
    kinds = [layer[2] for layer in layers]
    assert "image" in kinds
    masks = [layer for layer in layers if layer[2] == "labels"]
    assert masks
    data = masks[0][0]
    finest = data[0] if isinstance(data, list | tuple) else data
    assert np.array_equal(np.asarray(finest).reshape(SIDES), arrays[1])
