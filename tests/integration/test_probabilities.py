"""``run --probabilities``: stored beside the mask, safe to stop, checked, told of, exported."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import ome_zarr_models
import ome_zarr_models.v04
import ome_zarr_models.v05
import pytest
import zarr
from click.testing import CliRunner
from scipy import ndimage

import tilepipe
from tilepipe.cli.main import main
from tilepipe.errors import VerifyError
from tilepipe.infer import verify
from tilepipe.store import open_store, reduce_image
from tilepipe.tiling import Box

CLASSES = ["--classes", "3"]


def tool(*args, code=0):
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="module")
def plain(zygote, slide, flags, tmp_path_factory):
    """A mask of three classes made without probabilities."""
    store = tmp_path_factory.mktemp("plain") / "out.zarr"
    zygote.run("run", slide, "-o", store, *flags, *CLASSES)
    return store


@pytest.fixture(scope="module")
def made(zygote, slide, flags, tmp_path_factory):
    """The same with them."""
    store = tmp_path_factory.mktemp("made") / "out.zarr"
    zygote.run("run", slide, "-o", store, *flags, *CLASSES, "--probabilities")
    return store


@pytest.fixture
def store(made, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(made, tmp_path / "out.zarr"))


def planes_of(path, level=0):
    found = open_store(str(path)).label("unet").probabilities.level(level)
    return found.read(Box.of_shape(found.shape))


def mask_of(path, level=0):
    found = open_store(str(path)).label("unet").level(level)
    return found.read(Box.of_shape(found.shape))


def shards(path, array):
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted((Path(path) / array).rglob("*"))
        if file.is_file() and file.name not in ("zarr.json", ".zarray", ".zattrs", ".zgroup")
    }


def test_the_mask_is_the_same_bytes_and_the_probabilities_fit_it(plain, made):
    assert len(shards(made, "labels")) > 20
    assert shards(made, "labels") == shards(plain, "labels")
    planes, mask = planes_of(made), mask_of(made)
    assert planes.shape == (2, *mask.shape)
    every = np.concatenate([255 - planes.sum(axis=0, keepdims=True, dtype=np.int64), planes])
    ranked = np.sort(every, axis=0)
    clear = ranked[-1] - ranked[-2] > 4
    assert clear.mean() > 0.5
    np.testing.assert_array_equal(every.argmax(axis=0)[clear], mask[clear])


def test_levels_are_the_labels_and_reduced_by_the_mean(made):
    label = open_store(str(made)).label("unet")
    beside = label.probabilities
    assert beside.n_levels == label.n_levels > 1
    for index in range(label.n_levels):
        ours, theirs = beside.level(index), label.level(index)
        assert (ours.shape, ours.unit_px, ours.downsample) == (
            theirs.shape, theirs.unit_px, theirs.downsample,
        )  # fmt: skip
        assert len(shards(made, f"probabilities/unet/{index}")) == len(theirs.grid)
    for index in range(1, label.n_levels):
        expected = reduce_image(planes_of(made, index - 1))
        np.testing.assert_array_equal(planes_of(made, index), expected)


@pytest.mark.parametrize("version", ["0.5", "0.4"])
def test_ome_zarr_models_accept_them(zygote, slide, flags, made, tmp_path, version):
    path = made
    if version == "0.4":
        path = tmp_path / "old.zarr"
        zygote.run("run", slide, "-o", path, *flags, *CLASSES, "--probabilities",
                   "--ome-zarr", "0.4")  # fmt: skip
        np.testing.assert_array_equal(planes_of(path), planes_of(made))
    group = zarr.open_group(str(path), path="probabilities/unet", mode="r")
    models = {"0.5": ome_zarr_models.v05, "0.4": ome_zarr_models.v04}[version]
    models.Image.from_zarr(group)
    # The image and its labels are still ones, and a walk finds a group at every step.
    root = zarr.open_group(str(path), mode="r")
    models.Image.from_zarr(root)
    found = dict(root.members(max_depth=None))
    assert isinstance(found["probabilities"], zarr.Group)
    assert found["probabilities/unet/1"].shape[0] == 2
    ome = group.attrs["ome"] if version == "0.5" else dict(group.attrs)
    image = ome["multiscales"][0]
    assert [axis["name"] for axis in image["axes"]] == ["c", "y", "x"]
    channels = ome["omero"]["channels"]
    assert [one["label"] for one in channels] == ["class 1", "class 2"]
    assert [one["color"] for one in channels] == ["E64B35", "00A087"]
    assert {(one["window"]["start"], one["window"]["end"]) for one in channels} == {(0, 255)}
    label = zarr.open_group(str(path), path="labels/unet", mode="r")
    theirs = (label.attrs["ome"] if version == "0.5" else label.attrs)["multiscales"][0]
    for ours, other in zip(image["datasets"], theirs["datasets"], strict=True):
        for kind, key in enumerate(("scale", "translation")):
            mine = ours["coordinateTransformations"][kind][key]
            assert mine[1:] == other["coordinateTransformations"][kind][key]


def test_killed_and_run_again_it_ends_byte_equal(
    zygote, slide, flags, made, equal, records, tmp_path, wait_until
):
    path = tmp_path / "out.zarr"
    command = ["run", slide, "-o", path, *flags, *CLASSES, "--probabilities"]
    kills = 0
    for more in (2, 9, 21, 30):
        process = zygote.start("tilepipe", *command)
        least = records(path) + more
        wait_until(
            lambda process=process, least=least: (
                process.poll() is not None or records(path) >= least
            ),
            "some units",
        )
        kills += process.kill() < 0
    assert kills >= 2
    zygote.run(*command)
    equal(path, made)


def test_a_record_without_their_checksum_is_not_believed(zygote, slide, flags, made, store):
    (record,) = (store / "tilepipe/journal/unet/segment/0").glob("1.1.json")
    kept = json.loads(record.read_text())
    shard = store / "probabilities/unet/0/c/0/1/1"
    assert shard.is_file()
    shard.unlink()
    facts = {key: value for key, value in kept["facts"].items() if key != "probabilities"}
    record.write_text(json.dumps({**kept, "facts": facts}))
    zygote.run("run", slide, "-o", store, *flags, *CLASSES, "--probabilities")
    assert shards(store, "probabilities") == shards(made, "probabilities")
    assert "probabilities" in json.loads(record.read_text())["facts"]


def test_two_workers_make_the_same(zygote, slide, flags, made, equal, tmp_path):
    path = tmp_path / "out.zarr"
    zygote.run("run", slide, "-o", path, *flags, *CLASSES, "--probabilities", "--workers", "2")
    equal(path, made)


def test_parts_and_finish_make_the_same(zygote, slide, flags, made, equal, tmp_path):
    path = tmp_path / "out.zarr"
    for share in range(2):
        zygote.run("run", slide, "-o", path, *flags, *CLASSES, "--probabilities",
                   "--part", f"{share}/2")  # fmt: skip
    zygote.run("finish", path, "--quiet")
    equal(path, made)


def test_they_need_no_copy_of_the_image(zygote, slide, flags, made, tmp_path):
    path = tmp_path / "out.zarr"
    zygote.run("run", slide, "-o", path, *flags, *CLASSES, "--probabilities", "--in-place")
    assert not (path / "0").exists()
    assert shards(path, "probabilities") == shards(made, "probabilities")


def test_that_they_were_removed_is_told(store):
    shutil.rmtree(store / "probabilities/unet")
    told = tool("verify", store, code=1)
    assert "probabilities of label unet: listed but missing" in told
    assert "--overwrite" in told


def test_a_mask_without_them_is_not_given_them(zygote, slide, flags, plain, tmp_path):
    path = Path(shutil.copytree(plain, tmp_path / "out.zarr"))
    before = shards(path, "")
    command = ["run", slide, "-o", path, *flags, *CLASSES]
    text = zygote.run(*command, "--probabilities", code=1)
    assert "probabilities False then, True now" in text
    assert "--overwrite" in text
    assert "--name" in text
    assert shards(path, "") == before
    assert open_store(str(path)).label("unet").probabilities is None
    zygote.run(*command, "--probabilities", "--name", "second")
    assert open_store(str(path)).label("second").probabilities is not None
    zygote.run(*command, "--probabilities", "--overwrite")
    assert planes_of(path).any()
    # And back: made anew without, nothing of them is left.
    zygote.run(*command, "--overwrite")
    assert open_store(str(path)).label("unet").probabilities is None
    assert not (path / "probabilities/unet").exists()
    assert (path / "probabilities/second").exists()


def test_inspect_says_whether_they_are_there(plain, made):
    labels = [json.loads(tool("inspect", path, "--json"))["labels"] for path in (plain, made)]
    assert labels[0]["unet"]["probabilities"] is None
    assert labels[1]["unet"]["probabilities"] == {"channels": ["class 1", "class 2"], "levels": 2}
    assert "probabilities of class 1, class 2" in tool("inspect", made)
    assert "probabilities of" not in tool("inspect", plain)


def test_the_bill_knows_of_them(slide, flags, tmp_path):
    def bill(*more):
        flags_ = [flag for flag in flags if flag != "--quiet"]
        command = ["run", slide, "-o", tmp_path / "out.zarr", *flags_, *CLASSES, "--dry-run"]
        return json.loads(tool(*command, "--json", *more))

    without, beside = bill(), bill("--probabilities")
    assert without["probabilities_bytes"] == 0
    assert beside["probabilities_bytes"] > 0
    more_bytes = beside["disk_bytes"] - without["disk_bytes"]
    assert abs(more_bytes - beside["probabilities_bytes"]) <= 1
    # Three copies of two channels of a unit in three lanes; three float32 maps of three outputs for
    # each batch under way.
    assert beside["plan"]["core_px"] == beside["plan"]["unit_px"] == 128
    assert beside["settings"]["backend"] == "torch"
    maps = 3 * 4 * 3 * min(2, beside["settings"]["threads"])
    assert beside["ram_bytes"] - without["ram_bytes"] == (3 * 3 * 2 + maps) * 128**2
    assert not (tmp_path / "out.zarr").exists()


def test_a_spec_and_a_job_file_can_ask_for_them(slide, tmp_path):
    job = tmp_path / "job.toml"
    job.write_text(
        'model = "unet"\nweights = "random:0"\nbase = 2\noptions = {depth = 1}\ntune = false\n'
        "unit = 128\nprobabilities = true\n"
    )
    # A run without comes first: the process keeps its network, which makes none.
    tilepipe.run(slide, tmp_path / "b.zarr", model="unet", weights="random:0", base=2,
                 options={"depth": 1}, tune=False, unit=128, name="plain")  # fmt: skip
    tool("run", slide, "-o", tmp_path / "a.zarr", "--job", job, "--quiet")
    tilepipe.run(slide, tmp_path / "b.zarr", model="unet", weights="random:0", base=2,
                 options={"depth": 1}, tune=False, unit=128, probabilities=True)  # fmt: skip
    assert planes_of(tmp_path / "a.zarr").shape == (1, 600, 500)
    assert planes_of(tmp_path / "a.zarr").any()
    np.testing.assert_array_equal(planes_of(tmp_path / "a.zarr"), planes_of(tmp_path / "b.zarr"))


def test_verify_counts_them_and_computes_them_again(store):
    certificate = verify(str(store), samples=3)
    units = sum(len(open_store(str(store)).label("unet").level(k).grid) for k in range(2))
    assert certificate.probability_units == units
    assert certificate.probability_off <= 1
    assert "of its probabilities" in tool("verify", store, "--samples", "1")


@pytest.mark.parametrize("level", [0, 1])
def test_a_flipped_byte_in_them_is_named(store, level):
    file = max((store / f"probabilities/unet/{level}/c").rglob("*"), key=lambda f: f.stat().st_size)
    iy, ix = (int(part) for part in file.parts[-2:])
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 3] ^= 0xFF
    file.write_bytes(raw)
    where = rf"probabilities of label unet level {level}, y {iy * 128}:\d+, x {ix * 128}:\d+"
    with pytest.raises(VerifyError, match=where):
        verify(str(store), samples=0)


def rewrite(store, level, change):
    """Other pixels in the first unit of a level, with a record that fits them."""
    opened = open_store(str(store), writable=True)
    label = opened.label("unet")
    planes = label.probabilities.level(level)
    unit = planes.grid.at(0)
    journal = opened.journal("unet", label.read_record()["fingerprint"])
    stage = "segment" if level == 0 else "label-reduce"
    kept = journal.recorded(stage, level)[0, 0]
    facts = {**kept.facts, "probabilities": planes.write_unit(unit, change(planes.read(unit.box)))}
    journal.write(stage, level, unit, checksum=kept.checksum, facts=facts)


def test_a_level_that_is_not_the_mean_of_the_one_below_is_named(store):
    rewrite(store, 1, lambda pixels: pixels ^ 1)
    with pytest.raises(VerifyError, match=r"probabilities of label unet level 1.*the level below"):
        verify(str(store), samples=0)


def test_other_probabilities_are_found_by_computing_them_again(store):
    opened = open_store(str(store), writable=True)
    label = opened.label("unet")
    journal = opened.journal("unet", label.read_record()["fingerprint"])
    fine = label.probabilities.level(0)
    whole = np.zeros((2, *fine.shape), np.uint8)
    for index, stage in enumerate(("segment", "label-reduce")):
        level = label.probabilities.level(index)
        recorded = journal.recorded(stage, index)
        for unit in level.grid:
            pixels = np.ascontiguousarray(whole[(..., *unit.box.slices)])
            kept = recorded[unit.iy, unit.ix]
            facts = {**kept.facts, "probabilities": level.write_unit(unit, pixels)}
            journal.write(stage, index, unit, checksum=kept.checksum, facts=facts)
        whole = reduce_image(whole)
    with pytest.raises(VerifyError, match=r"up to \d+/255 from the network's own answer"):
        verify(str(store), samples=1)


def test_a_copy_in_0_4_has_them(made, tmp_path):
    path = tmp_path / "copy.zarr"
    tool("export", made, "--to", "ome-zarr-0.4", "-o", path, "--quiet")
    np.testing.assert_array_equal(planes_of(path), planes_of(made))
    np.testing.assert_array_equal(planes_of(path, 1), planes_of(made, 1))


def test_a_closed_gate_writes_none(slide, tmp_path, monkeypatch):
    from tilepipe.infer import Engine

    monkeypatch.setattr(Engine, "gate", lambda self, read, box: (1.0, 0.5))
    command = ["run", slide, "-o", tmp_path / "out.zarr", "--model", "unet3plus-cgm", "--weights",
               "random:0", "--base", "2", "--no-tune", "--cgm", "slide", "--name", "unet",
               "--tile", "512", "--probabilities", "--quiet"]  # fmt: skip
    tool(*command)
    planes = planes_of(tmp_path / "out.zarr")
    assert planes.shape == (1, 600, 500)
    assert not planes.any()
    assert verify(str(tmp_path / "out.zarr"), samples=1).passed


def test_on_s3_they_lie_as_on_a_disk(bucket, slide, made):
    path = "s3://slides/probabilities.zarr"
    tool("run", slide, "-o", path, "--model", "unet", "--weights", "random:0", "--base", "2",
         "--option", "depth=1", "--precision", "fp32", "--backend", "torch", "--device", "cpu",
         "--no-tune", "--unit", "128", *CLASSES, "--probabilities", "--quiet")  # fmt: skip
    np.testing.assert_array_equal(planes_of(path), planes_of(made))


@pytest.fixture(scope="module")
def with_objects(zygote, slide, flags, tmp_path_factory):
    """Masks of one and of two foreground classes, with objects and probabilities."""
    store = tmp_path_factory.mktemp("objects") / "out.zarr"
    for name, more in (("three", CLASSES), ("two", [])):
        zygote.run("run", slide, "-o", store, *flags, *more, "--probabilities", "--instances",
                   "--name", name)  # fmt: skip
    return store


def whole(level):
    return level.read(Box.of_shape(level.shape))


def means(path, label, tmp_path):
    """(class or object id, area, mean) of each line of the table."""
    table = tmp_path / "objects.csv"
    tool("export", path, "--to", "csv", "--label", label, "-o", table, "--overwrite", "--quiet")
    objects = label.endswith("-instances")
    return sorted(
        (int(row["id" if objects else "class_id"]), int(row["area_px"]),
         float(row["mean_probability"]))
        for row in csv.DictReader(table.open())
    )  # fmt: skip


@pytest.mark.parametrize("name", ["two", "three"])
def test_the_tables_means_are_those_of_the_whole_arrays(with_objects, name, tmp_path):
    store = open_store(str(with_objects))
    mask, planes = (
        whole(store.label(name).level(0)),
        whole(store.label(name).probabilities.level(0)),
    )
    expected = []
    for value in range(1, len(planes) + 1):
        ids, count = ndimage.label(mask == value)
        areas = ndimage.sum_labels(ids > 0, ids, range(1, count + 1))
        sums = ndimage.mean(planes[value - 1] / 255, ids, range(1, count + 1))
        expected += [(value, int(area), mean) for area, mean in zip(areas, sums, strict=True)]
    found = means(with_objects, name, tmp_path)
    assert len(found) == len(expected) > 20
    for ours, theirs in zip(sorted(found), sorted(expected), strict=True):
        assert ours[:2] == theirs[:2]
        assert abs(ours[2] - theirs[2]) < 1e-4


@pytest.mark.parametrize("name", ["two", "three"])
def test_an_objects_mean_is_of_any_foreground_class(with_objects, name, tmp_path):
    store = open_store(str(with_objects))
    ids = whole(store.label(f"{name}-instances").level(0))
    planes = whole(store.label(name).probabilities.level(0)).astype(np.int64)
    foreground = np.minimum(planes.sum(axis=0), 255) / 255
    assert (planes.shape[0] > 1) == (name == "three")
    values = np.unique(ids[ids > 0])
    expected = ndimage.mean(foreground, ids, values)
    found = means(with_objects, f"{name}-instances", tmp_path)
    assert [one[0] for one in found] == values.tolist()
    assert np.abs(np.array([one[2] for one in found]) - expected).max() < 1e-4


def test_geojson_measures_them(with_objects, plain, tmp_path):
    path = tmp_path / "objects.geojson"
    tool("export", with_objects, "--to", "geojson", "--label", "three", "-o", path, "--quiet")
    features = json.loads(path.read_text())["features"]
    told = sorted(one["properties"]["measurements"]["mean probability"] for one in features)
    assert told == sorted(one[2] for one in means(with_objects, "three", tmp_path))
    tool("export", plain, "--to", "geojson", "-o", path, "--overwrite", "--quiet")
    features = json.loads(path.read_text())["features"]
    assert not any("mean probability" in f["properties"]["measurements"] for f in features)
