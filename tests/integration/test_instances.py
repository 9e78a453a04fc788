"""``tilepipe run --instances``: the same objects for any units, resumed, finished, inspected."""

from __future__ import annotations

import json

import numpy as np
import pytest
import zarr
from click.testing import CliRunner
from scipy import ndimage

from tilepipe.cli.main import main
from tilepipe.store import open_store, reduce_label

RANDOM = ["--model", "unet", "--weights", "random:0", "--base", "4", "--no-tune"]


def tilepipe(*args, code=0):
    """Run the command in this process; returns its JSON when asked for."""
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    return json.loads(result.stdout) if "--json" in args and code == 0 else result.output


def pixels(store, path):
    return zarr.open_group(str(store), mode="r")[path][:]


@pytest.fixture(scope="module")
def done(small_slide, tmp_path_factory):
    """A finished run with instances, in units of 128 px."""
    out = tmp_path_factory.mktemp("done") / "small.zarr"
    facts = tilepipe("run", small_slide, "-o", out, *RANDOM, "--unit", 128, "--instances", "--json")
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
    # What the units told each other is not kept.
    assert not (out / "tilepipe" / "objects" / "unet").exists()


@pytest.mark.parametrize("options", [["--unit", "512"], ["--unit", "80", "--ome-zarr", "0.4"]])
def test_ids_do_not_depend_on_the_units(done, small_slide, tmp_path, options):
    out = tmp_path / "other.zarr"
    tilepipe("run", small_slide, "-o", out, *RANDOM, *options, "--instances", "--quiet")
    np.testing.assert_array_equal(
        pixels(out, "labels/unet-instances/0"), pixels(done[0], "labels/unet-instances/0")
    )


def test_objects_can_be_asked_for_later_and_what_was_lost_is_made_again(
    done, small_slide, tmp_path
):
    out = tmp_path / "later.zarr"
    run = ["run", small_slide, "-o", out, *RANDOM, "--unit", 128, "--json"]
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


def test_parts_leave_the_objects_to_finish(done, small_slide, tmp_path):
    out = tmp_path / "parts.zarr"
    for part in ("1/2", "0/2"):
        tilepipe("run", small_slide, "-o", out, *RANDOM, "--unit", 128, "--instances",
                 "--part", part, "--quiet")  # fmt: skip
    assert open_store(str(out)).label("unet-instances").read_record()["state"] == "part done"
    tilepipe("finish", out)
    np.testing.assert_array_equal(
        pixels(out, "labels/unet-instances/0"), pixels(done[0], "labels/unet-instances/0")
    )


def test_a_new_mask_does_not_keep_the_old_objects(small_slide, tmp_path):
    out = tmp_path / "anew.zarr"
    run = ["run", small_slide, "-o", out, *RANDOM, "--unit", 256, "--quiet"]
    tilepipe(*run, "--instances")
    other = [*run[:7], "random:5", *run[8:]]
    assert run[7] == "random:0"
    tilepipe(*other, "--overwrite")
    assert open_store(str(out)).labels == ("unet",)
    tilepipe(*other, "--instances")
    _, n = ndimage.label(pixels(out, "labels/unet/0") == 1)
    assert pixels(out, "labels/unet-instances/0").max() == n


def test_inspect_tells_of_objects(done):
    out, facts = done
    text = tilepipe("inspect", out)
    assert f"objects of unet: {facts['instances']}" in text
    label = tilepipe("inspect", out, "--json")["labels"]["unet-instances"]
    assert label["units"]["paint-objects"] == {"done": 24, "total": 24}
    assert label["count"] == facts["instances"]
