"""``tilepipe run --instances``: the same objects for any units, resumed, finished, inspected."""

from __future__ import annotations

import json

import numpy as np
import ome_zarr_models.v04
import ome_zarr_models.v05
import pytest
import tifffile
import zarr
from click.testing import CliRunner
from scipy import ndimage

from tilepipe.cli.main import main
from tilepipe.errors import StoreError
from tilepipe.pipeline.instances import Objects, close_instances, open_instances
from tilepipe.store import Label, create_store, open_store, reduce_label
from tilepipe.train.targets import BORDER_CLASSES, separate

RANDOM = ["--model", "unet", "--weights", "random:0", "--base", "2", "--no-tune",
          "--backend", "torch", "--precision", "fp32"]  # fmt: skip


def tilepipe(*args, code=0):
    """Run the command in this process; returns its JSON when asked for."""
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    return json.loads(result.stdout) if "--json" in args and code == 0 else result.output


def pixels(store, path):
    return zarr.open_group(str(store), mode="r")[path][:]


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    """A small slide whose mask by random weights has objects of all sizes."""
    path = tmp_path_factory.mktemp("slides") / "small.tif"
    generator = np.random.default_rng(0)
    field = ndimage.gaussian_filter(generator.random((3, 530, 120)), (0, 2, 2))
    field = (field - field.min()) / np.ptp(field) * 255
    tifffile.imwrite(path, np.moveaxis(field.astype(np.uint8), 0, -1), tile=(64, 64),
                     photometric="rgb")  # fmt: skip
    return path


@pytest.fixture(scope="module")
def done(slide, tmp_path_factory):
    """A finished run with instances, in units of 80 px."""
    out = tmp_path_factory.mktemp("done") / "small.zarr"
    facts = tilepipe("run", slide, "-o", out, *RANDOM, "--unit", 80, "--instances", "--json")
    return out, facts


def test_objects_are_those_of_the_whole_mask(done):
    out, facts = done
    whole, n = ndimage.label(pixels(out, "labels/unet/0") == 1)
    assert n > 20
    assert facts["instances"] == n
    np.testing.assert_array_equal(pixels(out, "labels/unet-instances/0"), whole)
    label = open_store(str(out)).label("unet-instances")
    record = label.read_record()
    assert (record["state"], record["count"], record["instances_of"]) == ("done", n, "unet")
    assert label.n_levels == open_store(str(out)).label("unet").n_levels
    np.testing.assert_array_equal(pixels(out, "labels/unet-instances/1"), reduce_label(whole))
    # Where a command wants one label, the objects are not a second one to choose from.
    assert open_store(str(out)).masks == ("unet",)
    scores = tilepipe("evaluate", out, out, "--json")
    assert scores["objects_predicted"] == n
    # What the units told each other is not kept.
    assert not (out / "tilepipe" / "objects" / "unet").exists()


@pytest.mark.parametrize("options", [["--unit", "512"], ["--unit", "112", "--ome-zarr", "0.4"]])
def test_ids_do_not_depend_on_the_units(done, slide, tmp_path, options):
    out = tmp_path / "other.zarr"
    tilepipe("run", slide, "-o", out, *RANDOM, *options, "--instances", "--quiet")
    np.testing.assert_array_equal(
        pixels(out, "labels/unet-instances/0"), pixels(done[0], "labels/unet-instances/0")
    )
    models = ome_zarr_models.v04 if "0.4" in options else ome_zarr_models.v05
    group = zarr.open_group(str(out), mode="r")
    models.ImageLabel.from_zarr(group["labels/unet-instances"])


def test_objects_can_be_asked_for_later_and_what_was_lost_is_made_again(done, slide, tmp_path):
    out = tmp_path / "later.zarr"
    run = ["run", slide, "-o", out, *RANDOM, "--unit", 80, "--json"]
    assert "instances" not in tilepipe(*run)
    facts = tilepipe(*run, "--instances")
    assert facts["px"] == 0  # the mask was there
    assert facts["instances"] == done[1]["instances"]
    # As after a kill: two units painted, no file of the join left whole.
    journal = out / "tilepipe" / "journal" / "unet-instances"
    painted = sorted((journal / "paint-objects" / "0").iterdir())
    for path in painted[2:]:
        path.unlink()
    (out / "labels" / "unet-instances" / "0" / "c" / "1" / "1").unlink()
    text = tilepipe(*run[:-1], "--instances", code=1)
    assert "give the same command again" in text
    assert open_store(str(out)).label("unet-instances").read_record()["state"] == "units failed"
    facts = tilepipe(*run, "--instances")
    assert facts["units"]["instances"]["resumed"] == 2
    np.testing.assert_array_equal(
        pixels(out, "labels/unet-instances/0"), pixels(done[0], "labels/unet-instances/0")
    )


@pytest.mark.parametrize("again", ["run", "finish"])
def test_what_was_stopped_before_the_objects_first_record_goes_on(
    done, slide, tmp_path, monkeypatch, again
):
    out = tmp_path / "out.zarr"
    run = ["run", slide, "-o", out, *RANDOM, "--unit", 80, "--instances", "--quiet"]
    write = Label.write_record

    def full(label, record):
        if "instances_of" in record:
            raise StoreError("the disk is full")
        write(label, record)

    with monkeypatch.context() as patch:
        patch.setattr(Label, "write_record", full)
        assert "the disk is full" in tilepipe(*run, code=1)
    tilepipe(*run if again == "run" else ("finish", out))
    ids = pixels(out, "labels/unet-instances/0")
    assert np.array_equal(ids, pixels(done[0], "labels/unet-instances/0"))


def test_parts_leave_the_objects_to_finish(done, slide, tmp_path):
    out = tmp_path / "parts.zarr"
    for part in ("1/2", "0/2"):
        tilepipe("run", slide, "-o", out, *RANDOM, "--unit", 80, "--instances",
                 "--part", part, "--quiet")  # fmt: skip
    assert open_store(str(out)).label("unet-instances").read_record()["state"] == "part done"
    tilepipe("finish", out)
    np.testing.assert_array_equal(
        pixels(out, "labels/unet-instances/0"), pixels(done[0], "labels/unet-instances/0")
    )


def test_a_new_mask_does_not_keep_the_old_objects(slide, tmp_path):
    out = tmp_path / "anew.zarr"
    run = ["run", slide, "-o", out, *RANDOM, "--unit", 160, "--quiet"]
    tilepipe(*run, "--instances")
    other = [*run[:7], "random:5", *run[8:]]
    assert run[7] == "random:0"
    tilepipe(*other, "--overwrite")
    assert open_store(str(out)).labels == ("unet",)
    tilepipe(*other, "--instances")
    _, n = ndimage.label(pixels(out, "labels/unet/0") == 1)
    assert pixels(out, "labels/unet-instances/0").max() == n


def test_objects_do_not_take_the_place_of_a_mask_that_has_their_name(slide, tmp_path):
    out = tmp_path / "named.zarr"
    run = ["run", slide, "-o", out, *RANDOM, "--unit", 160, "--quiet"]
    tilepipe(*run, "--name", "a-instances")
    mask = pixels(out, "labels/a-instances/0")
    text = tilepipe(*run, "--name", "a", "--instances", "--overwrite", code=1)
    assert "give the mask another --name" in text
    np.testing.assert_array_equal(pixels(out, "labels/a-instances/0"), mask)


def test_a_mask_with_a_border_class_is_separated_as_in_training(tmp_path):
    generator = np.random.default_rng(3)
    field = ndimage.gaussian_filter(generator.random((150, 130)), 2.5)
    mask = np.digitize(field, np.quantile(field, [0.55, 0.75])).astype(np.uint8)
    mask = np.array([0, 2, 1], np.uint8)[mask]
    store = create_store(
        str(tmp_path / "s.zarr"), channels=1, dtype="uint8", extent=mask.shape, mpp=None,
        channel_names=["x"], channel_colors=[None], rgb=False, unit_px=48, chunk_px=16,
    )  # fmt: skip
    label = store.create_label("m", classes=BORDER_CLASSES, unit_px=48)
    level = label.level(0)
    for unit in level.grid:
        level.write_unit(unit, mask[unit.box.slices])
    mark = open_instances(
        store, label, mask_fingerprint="f", overwrite=False, check_turn=lambda: None
    )
    journal = store.journal("m-instances", mark)
    objects = Objects(store, "m", journal)
    for index in reversed(range(len(level.grid))):
        objects.find(index)
    # Lost and damaged files of units are made again.
    files = sorted((tmp_path / "s.zarr" / "tilepipe" / "objects" / "m" / "edges").iterdir())
    files[1].unlink()
    files[4].write_bytes(files[4].read_bytes()[:-3])
    whole = separate(mask)
    assert objects.join() == {"count": whole.max()}
    found = store.label("m-instances")
    for index in range(len(level.grid)):
        objects.paint(found, index)
    np.testing.assert_array_equal(pixels(tmp_path / "s.zarr", "labels/m-instances/0"), whole)
    # Without its numbers a unit is not painted, and the next run joins anew.
    (tmp_path / "s.zarr" / "tilepipe" / "objects" / "m" / "ids" / "0.0").write_bytes(b"junk")
    with pytest.raises(StoreError, match="give the same command again"):
        objects.paint(found, 0)
    assert not journal.recorded("join-objects", 0)
    objects.join()
    objects.paint(found, 0)
    assert close_instances(store, "m", mark, state="done", units={}, failed=[]) == whole.max()


def test_inspect_tells_of_objects(done):
    out, facts = done
    text = tilepipe("inspect", out)
    assert f"objects of unet: {facts['instances']}" in text
    label = tilepipe("inspect", out, "--json")["labels"]["unet-instances"]
    assert label["units"]["paint-objects"] == {"done": 14, "total": 14}
    assert label["count"] == facts["instances"]


def test_objects_found_later_leave_the_masks_account_alone(slide, tmp_path):
    out = tmp_path / "later.zarr"
    tilepipe("run", slide, "-o", out, *RANDOM, "--unit", 80)
    before = open_store(str(out)).label("unet").read_record()
    tilepipe("run", slide, "-o", out, *RANDOM, "--unit", 80, "--instances")
    after = open_store(str(out)).label("unet").read_record()
    facts = ("state", "finished", "units", "account", "mpix_per_s", "class_px")
    assert {key: after[key] for key in facts} == {key: before[key] for key in facts}
    assert open_store(str(out)).label("unet-instances").read_record()["state"] == "done"
