"""Which write units a job takes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tilepipe.errors import StoreError
from tilepipe.pipeline.output import exclusive, unit_for
from tilepipe.spec import JobSpec
from tilepipe.store import create_store


def slide_of(*extent):
    return SimpleNamespace(levels=[SimpleNamespace(shape=extent)])


@pytest.mark.parametrize(
    ("extent", "device", "unit_px"),
    [
        ((900, 1300), "cpu", 1536),
        ((90000, 1300), "cpu", 2048),
        ((32767, 20000), "cuda:0", 2048),
        ((20000, 32768), "cuda:0", 4096),
        ((900, 1300), "cuda:1", 1536),
    ],
)
def test_units_are_large_where_a_gpu_meets_a_large_slide(tmp_path, extent, device, unit_px):
    out = str(tmp_path / "a.zarr")
    assert unit_for(slide_of(*extent), out, JobSpec(), device=device) == unit_px
    assert unit_for(slide_of(*extent), out, JobSpec(unit=768), device=device) == 768


def test_an_image_that_is_there_keeps_its_units(tmp_path):
    out = str(tmp_path / "a.zarr")
    store = create_store(out, channels=1, dtype="uint8", extent=(300, 300), unit_px=512)
    for recorded, wanted in ((512, 512), (None, 4096), ("many", 4096), (-1, 4096)):
        store.write_record({"state": "running", "unit_px": recorded})
        assert unit_for(slide_of(40000, 40000), out, JobSpec(), device="cuda:0") == wanted


@pytest.mark.parametrize(
    ("one", "other"),
    [("{}/a.zarr", "file://{}/a.zarr"), ("s3://b{}/a.zarr", "s3://b{}/a.zarr/")],
)
def test_an_output_is_one_however_it_is_spelled(tmp_path, one, other):
    one, other = one.format(tmp_path), other.format(tmp_path)
    for first, second in ((one, other), (other, one)):
        with (
            exclusive(first, "the image"),
            pytest.raises(StoreError, match="another tilepipe process is writing the image there"),
            exclusive(second, "the image"),
        ):
            pass
