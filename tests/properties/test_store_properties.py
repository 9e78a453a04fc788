import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tilepipe.errors import StoreError, TilepipeError
from tilepipe.spec import LabelClass
from tilepipe.store import checksum_of, create_store, open_store, reduce_image, reduce_label
from tilepipe.tiling import Box

QUICK = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@QUICK
@given(
    extent=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    unit_px=st.integers(1, 100),
    chunk_px=st.integers(1, 64),
    channels=st.integers(1, 3),
    dtype=st.sampled_from(["uint8", "uint16", "float32"]),
    version=st.sampled_from(["0.5", "0.4"]),
    data=st.data(),
)
def test_any_layout_gives_back_what_was_written(
    extent, unit_px, chunk_px, channels, dtype, version, data
):
    unit_px = max(unit_px, max(extent) // 8)  # a few dozen units at most
    with tempfile.TemporaryDirectory() as folder:
        store = create_store(
            f"{folder}/a.zarr",
            channels=channels,
            dtype=dtype,
            extent=extent,
            ome_zarr=version,
            unit_px=unit_px,
            chunk_px=chunk_px,
        )
        rng = np.random.default_rng(0)
        pixels = rng.integers(0, 3, (channels, *extent)).astype(dtype)
        level = store.image(0)
        sums = {}
        for unit in data.draw(st.permutations(list(level.grid))):
            sums[unit] = level.write_unit(unit, pixels[(..., *unit.box.slices)])
        again = open_store(store.location).image(0)
        y0, x0 = data.draw(st.integers(0, extent[0] - 1)), data.draw(st.integers(0, extent[1] - 1))
        box = Box(y0, x0, data.draw(st.integers(y0 + 1, extent[0])), extent[1])
        np.testing.assert_array_equal(again.read(box), pixels[(..., *box.slices)])
        assert all(again.checksum(unit) == summed for unit, summed in sums.items())


@given(
    hnp.arrays(
        st.sampled_from([np.uint8, np.int32]),
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=7),
        elements=st.integers(0, 5),
    )
)
@settings(deadline=None)
def test_no_class_appears_that_is_not_below(fine):
    coarse = reduce_label(fine)
    for i, j in np.ndindex(coarse.shape):
        block = fine[2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
        counts = {int(value): int((block == value).sum()) for value in block.ravel()}
        best = max(counts.values())
        assert coarse[i, j] == min(value for value, count in counts.items() if count == best)


@given(
    hnp.arrays(
        st.sampled_from([np.uint8, np.uint16]), hnp.array_shapes(min_dims=3, max_dims=3, max_side=7)
    )
)
@settings(deadline=None)
def test_means_are_exact(fine):
    coarse = reduce_image(fine)
    for k, i, j in np.ndindex(coarse.shape):
        block = fine[k, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].astype(int)
        assert coarse[k, i, j] == int(np.floor(block.sum() / block.size + 0.5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hostile") / "a.zarr"
    store = create_store(
        str(path), channels=1, dtype="uint8", extent=(40, 40), mpp=(1, 1), unit_px=16
    )
    store.create_label("m", classes=[LabelClass(name="x", color=(0, 0, 0, 0))], unit_px=16)
    store.journal(None, "f").write("ingest", 0, store.image(0).grid.unit(0, 0), checksum="0" * 16)
    return path


@settings(QUICK, max_examples=60)
@given(raw=st.binary(max_size=300) | JSON.map(lambda value: json.dumps(value).encode()))
def test_no_record_can_do_harm(folder, raw):
    journal = open_store(str(folder)).journal(None, "f")
    (folder / "tilepipe/journal/_image/ingest/0/0.1.json").write_bytes(raw)
    assert set(journal.recorded("ingest", 0)) == {(0, 0)}
    assert len(journal.rejected) == 1


ARRAY_PLACES = [
    ("shape",),
    ("shape", 1),
    ("data_type",),
    ("chunk_grid", "configuration", "chunk_shape"),
    ("chunk_grid", "configuration", "chunk_shape", 2),
    ("codecs",),
    ("codecs", 0, "configuration", "chunk_shape", 1),
    ("codecs", 0, "configuration", "codecs"),
    ("fill_value",),
    ("node_type",),
    ("zarr_format",),
]
NUMBERS = st.integers(-2, 20) | st.sampled_from([2**31, 2**40, 2**63, 2**64, 1.5])


@settings(QUICK, max_examples=100)
@given(
    place=st.sampled_from(ARRAY_PLACES),
    value=JSON | NUMBERS | st.lists(NUMBERS, min_size=3, max_size=3) | st.just("float64"),
    foreign=st.booleans(),
)
def test_no_array_metadata_gives_anything_but_pixels_or_one_error(folder, place, value, foreign):
    root, array = folder / "zarr.json", folder / "0/zarr.json"
    kept = root.read_bytes(), array.read_bytes()
    document, top = json.loads(kept[1]), json.loads(kept[0])
    at = document
    for step in place[:-1]:
        at = at[step]
    at[place[-1]] = value
    array.write_text(json.dumps(document))
    if foreign:
        top["attributes"].pop("tilepipe")
        root.write_text(json.dumps(top))
    told = None
    try:
        pixels = open_store(str(folder)).image(0).read(Box(0, 0, 1, 1))
        assert pixels.ndim == 3
    except TilepipeError as error:
        told = error
    finally:
        root.write_bytes(kept[0])
        array.write_bytes(kept[1])
    assert told is None or (isinstance(told, StoreError) and str(folder) in str(told))


PLACES = [
    ("ome",),
    ("ome", "multiscales"),
    ("ome", "multiscales", 0),
    ("ome", "multiscales", 0, "axes"),
    ("ome", "multiscales", 0, "datasets"),
    ("ome", "multiscales", 0, "datasets", 0, "path"),
    ("ome", "multiscales", 0, "datasets", 0, "coordinateTransformations"),
    ("ome", "omero"),
    ("ome", "omero", "channels"),
    ("tilepipe",),
    ("tilepipe", "store"),
    ("tilepipe", "store", "extent"),
    ("tilepipe", "store", "n_levels"),
    ("tilepipe", "store", "unit_px"),
    ("ome", "image-label"),
    ("ome", "image-label", "colors"),
    ("ome", "image-label", "properties", 0),
]


@settings(QUICK, max_examples=120)
@given(place=st.sampled_from(PLACES), value=JSON, on_label=st.booleans(), foreign=st.booleans())
def test_no_metadata_gives_anything_but_a_store_or_one_error(
    folder, place, value, on_label, foreign
):
    path = Path(folder, "labels/m" if on_label else ".", "zarr.json")
    good = path.read_bytes()
    document = json.loads(good)
    if foreign:
        document["attributes"].pop("tilepipe")
    at = document["attributes"]
    try:
        for step in place[:-1]:
            at = at[step]
        at[place[-1]] = value
    except (KeyError, IndexError, TypeError):
        return
    path.write_text(json.dumps(document))
    told = None
    try:
        store = open_store(str(folder))
        store.read_record()
        label = store.label("m")
        assert len(label.classes) <= 256
        label.level(0).read(Box(0, 0, 1, 1))
        store.image(0).read(Box(0, 0, 1, 1))
    except TilepipeError as error:
        told = error
    finally:
        path.write_bytes(good)
    if told is not None:
        assert isinstance(told, StoreError)
        assert str(folder) in str(told)
        assert len(str(told)) < 2000


@given(hnp.arrays(np.uint16, (3, 4, 5)))
@settings(deadline=None)
def test_the_checksum_is_of_the_pixels_not_of_their_order_in_memory(pixels):
    assert checksum_of(pixels) == checksum_of(np.asfortranarray(pixels))
    assert checksum_of(pixels) == checksum_of(pixels.astype(">u2"))
    other = pixels.copy()
    other[2, 3, 4] ^= 1
    assert checksum_of(other) != checksum_of(pixels)
