"""Display windows: what the pixels span, and nothing where they say nothing or somebody spoke."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from tilepipe.store import create_store, fit_windows, open_store, shades_of
from tilepipe.store import windows as windows_room


def make(path, planes, *, rgb=False, version="0.5"):
    """Store planes (c, y, x) as the finest level; the coarser ones hold what to_coarser makes."""
    store = create_store(
        str(path), channels=len(planes), dtype=planes.dtype, extent=planes.shape[1:],
        rgb=rgb, unit_px=2048, ome_zarr=version,
    )  # fmt: skip
    for index in range(store.n_levels):
        level = store.image(index)
        for unit in level.grid:
            part = planes[:, :: 1 << index, :: 1 << index][(slice(None), *unit.box.slices)]
            level.write_unit(unit, np.ascontiguousarray(part))
    return store


def windows(store, version="0.5"):
    name = "zarr.json" if version == "0.5" else ".zattrs"
    found = json.loads(Path(store.location, name).read_text())
    found = found["attributes"]["ome"] if version == "0.5" else found
    return [one["window"] for one in found["omero"]["channels"]]


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_a_camera_of_12_bits_is_not_shown_between_0_and_65535(tmp_path, version):
    planes = np.zeros((2, 90, 80), np.uint16)
    planes[0] = np.linspace(100, 4095, 7200).reshape(90, 80)
    planes[1, 40:50] = 300
    store = make(tmp_path / "a.zarr", planes, version=version)
    whole = {"min": 0.0, "max": 65535.0, "start": 0.0, "end": 65535.0}
    assert windows(store, version) == [whole, whole]
    before = open_store(store.location)
    fit_windows(store)
    first, second = windows(store, version)
    low, high = np.percentile(planes[0], [0.5, 99.7])
    assert first == {"min": 0.0, "max": 65535.0, "start": low, "end": high}
    assert second == {"min": 0.0, "max": 65535.0, "start": 300.0, "end": 301.0}
    after = open_store(store.location)
    assert after.facts == before.facts
    np.testing.assert_array_equal(after.image(0).read(after.image(0).grid.unit(0, 0).box), planes)


def test_floats_have_the_range_of_their_own(tmp_path):
    planes = np.linspace(-3, 5, 6400, dtype=np.float32).reshape(1, 80, 80)
    store = make(tmp_path / "a.zarr", planes)
    fit_windows(store)
    (found,) = windows(store)
    assert (found["min"], found["max"]) == (-3, 5)
    assert -3 < found["start"] < -2.9 < 4.9 < found["end"] < 5


def test_colours_keep_their_balance(tmp_path):
    planes = np.stack([np.full((50, 60), value, np.uint16) for value in (4000, 2000, 0)])
    store = make(tmp_path / "a.zarr", planes, rgb=True)
    fit_windows(store)
    wanted = {"min": 0.0, "max": 65535.0, "start": 0.0, "end": 4000.0}
    assert windows(store) == [wanted] * 3


@pytest.mark.parametrize(("dtype", "value"), [("uint8", 7), ("uint16", 0), ("float32", np.nan)])
def test_nothing_is_said_of_bytes_and_of_nothing(tmp_path, dtype, value):
    store = make(tmp_path / "a.zarr", np.full((1, 30, 30), value, dtype))
    before = Path(store.location, "zarr.json").read_bytes()
    fit_windows(store)
    assert Path(store.location, "zarr.json").read_bytes() == before


def test_what_somebody_else_has_set_stays(tmp_path):
    store = make(tmp_path / "a.zarr", np.full((2, 30, 30), 500, np.uint16))
    path = Path(store.location, "zarr.json")
    document = json.loads(path.read_text())
    document["attributes"]["ome"]["omero"]["channels"][0]["window"]["end"] = 900.0
    path.write_text(json.dumps(document))
    fit_windows(store)
    assert [one["end"] for one in windows(store)] == [900.0, 501.0]


def test_of_a_large_image_a_coarser_level_is_looked_at(tmp_path):
    planes = np.zeros((1, 2100, 2100), np.uint16)
    planes[:, ::2, ::2] = 1000  # all that the coarser level holds
    planes[:, 1::2] = 50000
    store = make(tmp_path / "a.zarr", planes)
    fit_windows(store)
    assert windows(store)[0]["end"] == 1001.0


@given(
    npst.arrays(
        st.sampled_from([np.uint16, np.float32]),
        npst.array_shapes(min_dims=2, max_dims=2, max_side=12),
    )
)
def test_shades_lie_within_what_there_is(plane):
    shades = shades_of(plane)
    values = plane[(np.abs(plane) <= 1e30) & (plane != 0)]
    assert (shades is None) == (values.size == 0)
    if shades is not None:
        assert shades.least == values.min()
        assert shades.most == values.max()
        assert shades.least <= shades.black <= shades.white <= shades.most


def test_the_ends_of_float32_are_no_data(tmp_path):
    ends = np.finfo(np.float32)
    planes = np.array([[[ends.min, ends.max, 2, 1e30, -3, 4]]], np.float32)
    store = make(tmp_path / "a.zarr", planes)
    fit_windows(store)
    (found,) = windows(store)
    assert (found["min"], found["max"]) == (-3, np.float32(1e30))


def test_of_very_many_channels_the_middle_is_looked_at(tmp_path, monkeypatch):
    planes = np.zeros((3, 60, 80), np.uint16)
    planes[:, 25:35, 35:45] = np.array([100, 200, 300])[:, None, None]
    planes[:, 0] = 9000
    store = make(tmp_path / "a.zarr", planes)
    monkeypatch.setattr(windows_room, "_MOST_VALUES", 3 * 400)
    fit_windows(store)
    assert [one["start"] for one in windows(store)] == [100, 200, 300]
