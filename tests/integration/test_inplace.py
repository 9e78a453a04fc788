"""An OME-Zarr as SLIDE: whole or refused, the same whatever its path, as other slides are read."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import tifffile
import zarr
from click.testing import CliRunner
from PIL import Image

from tilepipe.cli.main import main
from tilepipe.export import copy_store
from tilepipe.pipeline.stored import content_of, lost_units
from tilepipe.store import create_store, open_store
from tilepipe.store.layout import OWN

NETWORK = ["--model", "unet", "--weights", "random:0", "--base", "2", "--option", "depth=1",
           "--precision", "fp32", "--backend", "torch", "--no-tune"]  # fmt: skip
SHAPE = (300, 620)
UNIT = 128


def call(*args, code=0):
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    return result.output


def mask(store, name):
    return zarr.open_group(str(store), mode="r")[f"labels/{name}/0"][:]


@pytest.fixture(scope="module")
def pixels():
    """(y, x, c); units in the middle are all 0."""
    found = np.random.default_rng(0).integers(1, 255, (*SHAPE, 3), np.uint8)
    found[UNIT : 2 * UNIT, UNIT : 2 * UNIT] = 0
    return found


@pytest.fixture(scope="module")
def slide(pixels, tmp_path_factory):
    path = tmp_path_factory.mktemp("slide") / "slide.tif"
    tifffile.imwrite(path, pixels, tile=(64, 64), photometric="rgb", resolution=(20000, 20000),
                     resolutionunit="CENTIMETER")  # fmt: skip
    return path


@pytest.fixture(scope="module", params=["0.5", "0.4"])
def ingested(request, slide, tmp_path_factory):
    out = tmp_path_factory.mktemp("ingested") / f"image-{request.param}.zarr"
    call("ingest", slide, "-o", out, "--unit", UNIT, "--ome-zarr", request.param, "-q")
    return out


@pytest.fixture
def store(ingested, tmp_path):
    return shutil.copytree(ingested, tmp_path / "image.zarr")


def files_of(store, level=0):
    """The files of the units of a level, by row and column of the files."""
    folder = store / str(level) / ("c/0" if (store / "zarr.json").exists() else "0")
    return {
        (int(path.parent.name), int(path.name)): path
        for path in folder.glob("*/*")
        if path.name.isdigit()
    }


def foreign(path, levels, *, scales=None, unit="micrometer", axes="cyx", mpp=0.25):
    """Write levels (c, y, x) as another program might."""
    group = zarr.open_group(path, mode="w", zarr_format=2)
    datasets = []
    for number, level in enumerate(levels):
        chunks = (level.shape[0], 64, 64) if axes == "cyx" else (64, 64, level.shape[2])
        group.create_array(str(number), data=np.ascontiguousarray(level), chunks=chunks)
        step = (scales or [2**k for k in range(len(levels))])[number]
        scale = [1 if axis == "c" else mpp * step for axis in axes]
        datasets.append(
            {
                "path": str(number),
                "coordinateTransformations": [{"type": "scale", "scale": scale}],
            }
        )
    described = [
        {"name": axis, "type": "channel"}
        if axis == "c"
        else {"name": axis, "type": "space", **({"unit": unit} if unit else {})}
        for axis in axes
    ]
    group.attrs["multiscales"] = [{"version": "0.4", "axes": described, "datasets": datasets}]
    return path


@pytest.fixture
def planes(pixels):
    return pixels.transpose(2, 0, 1)


# -- all of it, or an error ------------------------------------------------------------------


def test_an_unfinished_image_is_refused_until_it_is_finished(store, slide, tmp_path):
    for path in (store / "tilepipe/journal/_image/ingest/0").glob("2.*.json"):
        path.unlink()
    opened = open_store(str(store), writable=True)
    opened.write_record({**opened.read_record(), "state": "running"})
    for output in ([], ["-o", tmp_path / "copy.zarr"], ["--dry-run"]):
        told = call("run", store, *NETWORK, *output, code=1)
        assert "not finished (ingest 10 of 15 units" in told
        assert f"tilepipe finish {store}" in told
        assert f"tilepipe ingest {slide} -o {store}" in told
    assert not (store / "labels").exists()
    call("finish", store, "-q")
    call("run", store, *NETWORK, "-q")


def test_an_image_without_pixels_is_refused(tmp_path):
    create_store(str(tmp_path / "a.zarr"), channels=3, dtype="uint8", extent=SHAPE, unit_px=UNIT)
    assert "nothing is there yet" in call("run", tmp_path / "a.zarr", *NETWORK, code=1)


def test_a_copy_of_an_unfinished_image_is_refused(store, tmp_path):
    opened = open_store(str(store), writable=True)
    copy_store(opened, str(tmp_path / "whole.zarr"))
    opened.write_record({**opened.read_record(), "state": "running"})
    copy_store(opened, str(tmp_path / "part.zarr"))
    call("run", tmp_path / "whole.zarr", *NETWORK, "-q")
    assert "exported while running" in call("run", tmp_path / "part.zarr", *NETWORK, code=1)


@pytest.mark.parametrize("level, place", [(0, (2, 3)), (1, (1, 0))])
def test_a_lost_file_is_refused_or_made_again(store, slide, level, place):
    file = files_of(store, level)[place]
    before = file.read_bytes()
    file.unlink()
    record = open_store(str(store)).read_record()
    assert lost_units(open_store(str(store)), record["fingerprint"]) == {level: {place}}
    told = call("run", store, *NETWORK, code=1)
    assert "lacks 1 units that were written" in told
    assert f"level {level}, y {place[0] * UNIT}" in told
    assert f"tilepipe ingest {slide} -o {store}" in told
    told = call("run", slide, "-o", store, *NETWORK, "--unit", UNIT,
                "--ome-zarr", open_store(str(store)).version)  # fmt: skip
    assert "1 units of the image" in told
    assert file.read_bytes() == before
    assert open_store(str(store)).read_record() == record
    call("run", store, *NETWORK, "--name", "again", "-q")
    np.testing.assert_array_equal(mask(store, "again"), mask(store, "unet"))


def test_finish_makes_what_was_lost_and_knows_masks_of_the_store_itself(store, slide):
    given = ["--name", "again", "--part", "0/2", "-q"]
    call("run", store, *NETWORK, "--unit", UNIT, *given)
    files_of(store)[2, 3].unlink()
    call("finish", store, "-q")
    assert (2, 3) in files_of(store)
    assert open_store(str(store)).label("again").read_record()["state"] == "done"


def test_finish_leaves_labels_of_other_programs_alone(store):
    """One beside ours, drawn by hand, say, is nothing that a job has to finish."""
    call("run", store, *NETWORK, "--unit", UNIT, "--name", "theirs", "-q")
    del zarr.open_group(str(store / "labels" / "theirs"), mode="r+").attrs[OWN]
    before = mask(store, "theirs")
    call("run", store, *NETWORK, "--unit", UNIT, "--part", "0/2", "-q")
    call("finish", store, "-q")
    assert open_store(str(store)).label("unet").read_record()["state"] == "done"
    np.testing.assert_array_equal(mask(store, "theirs"), before)
    assert "does not say how it was made" in call("finish", store, "--label", "theirs", code=1)


def test_finish_knows_the_pixel_size_that_was_given(slide, tmp_path):
    out = tmp_path / "out.zarr"
    call("ingest", slide, "-o", out, "--unit", UNIT, "--slide-mpp", "0.3", "-q")
    files_of(out)[2, 3].unlink()
    call("finish", out, "-q")
    assert (2, 3) in files_of(out)


def test_a_lost_folder_is_made_again_by_ingest(store, slide, ingested):
    version = open_store(str(store)).version
    shutil.rmtree(files_of(store)[1, 0].parent)
    call("ingest", slide, "-o", store, "--ome-zarr", version, "-q")
    before, now = files_of(ingested), files_of(store)
    assert {place: path.read_bytes() for place, path in now.items()} == {
        place: path.read_bytes() for place, path in before.items()
    }


def test_units_of_zeros_are_not_stored_and_not_lost(ingested):
    assert (1, 1) not in files_of(ingested)
    store = open_store(str(ingested))
    assert lost_units(store, store.read_record()["fingerprint"]) == {}
    absent = {(unit.iy, unit.ix) for unit in store.image(0).not_stored()}
    assert absent == {(1, 1)}


def test_what_another_process_writes_meanwhile_is_not_lost(store, monkeypatch):
    """Its file comes after the look for files, its record before the look for records."""
    path = files_of(store)[1, 0]
    away = path.with_name("away")
    path.rename(away)
    opened = open_store(str(store))
    inside = opened.files.get_many

    def get_many(keys, **given):
        away.rename(path)
        return inside(keys, **given)

    monkeypatch.setattr(opened.files, "get_many", get_many)
    assert lost_units(opened, opened.read_record()["fingerprint"]) == {}
    assert path.exists()


def test_a_whole_image_reads_no_journal(ingested, monkeypatch):
    store = open_store(str(ingested))
    read = []
    inside = store.files.get_many
    monkeypatch.setattr(
        store.files, "get_many", lambda keys, **given: inside(read.extend(keys) or keys, **given)
    )
    lost_units(store, store.read_record()["fingerprint"])
    assert [key.rpartition("/")[2] for key in read] == ["1.1.json"]


@pytest.mark.parametrize("output", ["image.zarr/out.zarr", "."])
def test_an_output_around_or_inside_the_input_is_refused(store, tmp_path, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    told = call("run", store, "-o", output, *NETWORK, "--overwrite", code=1)
    assert "around or inside the input" in told


# -- which image, and which mask of tissue -----------------------------------------------------


def test_in_place_may_be_said_of_a_store_too(store):
    """It is what happens anyway; the units looked for a slide, and failed one by one."""
    call("run", store, *NETWORK, "--in-place", "-q")
    call("run", store, *NETWORK, "--name", "again", "-q")
    np.testing.assert_array_equal(mask(store, "unet"), mask(store, "again"))
    assert '"resumed": 0' not in call("run", store, *NETWORK, "--json")


@pytest.mark.parametrize("ours", [True, False])
def test_a_store_has_nothing_to_ingest(store, planes, tmp_path, ours):
    path = store if ours else foreign(tmp_path / "theirs.zarr", [planes])
    assert "is an OME-Zarr already" in call("ingest", path, code=1)
    call("ingest", path, "-o", tmp_path / "copy.zarr", "-q")


def test_changed_pixels_and_a_path_spelled_otherwise(tmp_path, planes, monkeypatch):
    path = foreign(tmp_path / "theirs.zarr", [planes])
    monkeypatch.chdir(tmp_path)
    call("run", "theirs.zarr", *NETWORK, "-q")
    for spelling in (path, "./theirs.zarr", "../" + tmp_path.name + "/theirs.zarr/"):
        assert "complete already" in call("run", spelling, *NETWORK)
    zarr.open_group(str(path))["0"][:, :64, :64] = 7
    told = call("run", "theirs.zarr", *NETWORK, code=1)
    assert "of another job (the plan or the input differ)" in told
    call("run", "theirs.zarr", *NETWORK, "--overwrite", "-q")


def test_the_content_is_not_the_labels(tmp_path, planes):
    path = str(foreign(tmp_path / "theirs.zarr", [planes]))
    before = content_of(open_store(path))
    call("run", path, *NETWORK, "-q")
    assert content_of(open_store(path)) == before


def test_a_changed_tissue_mask_is_another_job(tmp_path, slide, monkeypatch):
    drawn = np.zeros((30, 62), np.uint8)
    drawn[5:10] = 255
    Image.fromarray(drawn).save(tmp_path / "where.png")
    monkeypatch.chdir(tmp_path)
    arguments = ("run", slide, "-o", tmp_path / "out.zarr", *NETWORK, "--tissue")
    call(*arguments, "where.png", "-q")
    assert "complete already" in call(*arguments, tmp_path / "where.png")
    Image.fromarray(np.flipud(drawn)).save(tmp_path / "where.png")
    assert "tissue" in call(*arguments, "where.png", code=1)


def test_tissue_counts_in_place(tmp_path, slide, store, planes):
    drawn = np.zeros((30, 62), np.uint8)
    drawn[:3, :3] = 1
    Image.fromarray(drawn).save(tmp_path / "where.png")
    given = [*NETWORK, "--tile", "128", "--unit", UNIT, "--tissue", tmp_path / "where.png", "-q"]
    call("run", slide, "-o", tmp_path / "copied.zarr", *given)
    call("run", store, *given)
    expected = mask(tmp_path / "copied.zarr", "unet")
    assert expected.any()
    assert not expected[200:].any()
    np.testing.assert_array_equal(mask(store, "unet"), expected)
    # The network sees level 1 of a pyramid that goes down in fours.
    path = foreign(tmp_path / "fours.zarr", [planes, planes[:, ::4, ::4]], scales=[1, 4])
    drawn[:] = 0
    drawn[-3:, -3:] = 1
    Image.fromarray(drawn).save(tmp_path / "corner.png")
    call("run", path, *NETWORK, "--level", "1", "--tile", "32", "--unit", "32", "--tissue",
         tmp_path / "corner.png", "-q")  # fmt: skip
    call("run", path, *NETWORK, "--level", "1", "--tile", "32", "--unit", "32", "--name", "all",
         "-q")  # fmt: skip
    found = mask(path, "unet")
    assert not found[:40, :100].any()
    np.testing.assert_array_equal(found[68:, 148:], mask(path, "all")[68:, 148:])
    told = call("run", store, *NETWORK, "--name", "x", "--tissue", "/no.png", code=1)
    assert "/no.png" in told


def test_tissue_is_found_in_place(tmp_path):
    rng = np.random.default_rng(0)
    glass = np.clip(rng.normal(242, 2, (900, 900, 3)), 0, 255).astype(np.uint8)
    glass[:200, :200] = (200, 60, 160)
    path = foreign(tmp_path / "glass.zarr", [glass.transpose(2, 0, 1)])
    call("run", path, *NETWORK, "--unit", "256", "--tile", "256", "--tissue", "auto", "-q")
    record = open_store(str(path)).label("unet").read_record()
    assert record["tissue"]["tiles_skipped"] > 0
    assert not mask(path, "unet")[400:].any()


def test_a_mask_without_tissue_is_told(tmp_path, slide):
    Image.fromarray(np.zeros((30, 62), np.uint8)).save(tmp_path / "none.png")
    told = call("run", slide, "-o", tmp_path / "o.zarr", *NETWORK, "--tissue",
                tmp_path / "none.png", "-q")  # fmt: skip
    assert "Warning" in told
    assert "shows no tissue" in told


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_mask_that_is_missing_fails_before_the_job(tmp_path, slide, more):
    told = call("run", slide, "-o", tmp_path / "o.zarr", *NETWORK, "--tissue",
                tmp_path / "nope.png", *more, code=1)  # fmt: skip
    assert "nope.png" in told
    assert not (tmp_path / "o.zarr").exists()


# -- levels, pixel sizes, dtypes and axes --------------------------------------------------------


@pytest.mark.parametrize("mpp, level", [("0.25", 0), ("1", 1), ("4", 2)])
def test_levels_are_as_coarse_as_the_store_says(tmp_path, planes, mpp, level):
    steps = [1, 4, 16]
    path = foreign(tmp_path / "f.zarr", [planes[:, ::k, ::k] for k in steps], scales=steps)
    call("run", path, *NETWORK, "--mpp", mpp, "-q")
    assert open_store(str(path)).label("unet").image_level == level
    told = call("run", path, *NETWORK, "--mpp", "0.5", "--name", "no", code=1)
    assert "level 1: 75 x 155 px, 1 µm/px; level 2: 19 x 39 px, 4 µm/px" in told


def test_the_pixel_size_can_be_given_in_place(tmp_path, planes):
    path = foreign(tmp_path / "n.zarr", [planes, planes[:, ::2, ::2]], unit=None)
    assert "pass --slide-mpp" in call("run", path, *NETWORK, "--mpp", "0.5", code=1)
    call("run", path, *NETWORK, "--mpp", "0.5", "--slide-mpp", "0.25", "-q")
    assert open_store(str(path)).label("unet").image_level == 1


@pytest.mark.parametrize("dtype", [np.uint32, np.float64])
def test_what_cannot_be_copied_is_not_segmented_in_place_either(tmp_path, planes, dtype):
    path = foreign(tmp_path / "n.zarr", [planes.astype(dtype)])
    for output in ([], ["-o", tmp_path / "copy.zarr"]):
        told = call("run", path, *NETWORK, *output, code=1)
        assert f"{np.dtype(dtype)} samples cannot be stored exactly" in told


def test_an_unknown_full_scale_is_told(tmp_path, planes):
    path = foreign(tmp_path / "n.zarr", [planes.astype(np.int16)])
    copied = call("run", path, *NETWORK, "-o", tmp_path / "copy.zarr")
    in_place = call("run", path, *NETWORK)
    assert "full scale of int16 samples is not known" in copied
    assert "full scale of int16 samples is not known" in in_place
    np.testing.assert_array_equal(mask(path, "unet"), mask(tmp_path / "copy.zarr", "unet"))


def test_axes_that_only_a_copy_can_have(tmp_path, planes):
    path = foreign(tmp_path / "n.zarr", [np.moveaxis(planes, 0, -1)], axes="yxc")
    told = call("run", path, *NETWORK, code=1)
    assert "its axes are y, x, c" in told
    assert "another output (-o)" in told
    call("run", path, *NETWORK, "-o", tmp_path / "copy.zarr", "-q")


def test_a_level_is_no_image(tmp_path, planes):
    path = foreign(tmp_path / "n.zarr", [planes])
    told = call("run", path / "0", *NETWORK, "-o", tmp_path / "copy.zarr", code=1)
    assert "is a Zarr array, not an OME-Zarr image; give the group that it lies in" in told
    assert json.dumps("damaged") not in told
