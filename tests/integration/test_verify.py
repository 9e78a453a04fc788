"""``tilepipe verify``: a finished mask passes; each way of being wrong is caught and named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
from click.testing import CliRunner

from tilepipe.cli.main import main
from tilepipe.errors import StoreError, VerifyError
from tilepipe.infer import certify, verify
from tilepipe.infer.recompute import places
from tilepipe.notebook import open_result
from tilepipe.pipeline.output import running
from tilepipe.store import Label, open_store, reduce_image, reduce_label
from tilepipe.tiling import Box

RANDOM = ["--model", "unet", "--weights", "random:0", "--base", "4", "--no-tune", "--unit", "256"]


def tilepipe(*args, code=0):
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def slide(tmp_path_factory) -> Path:
    """A textured RGB slide of odd sides."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[0:600, 0:389]
    waves = 128 + 60 * np.sin(rows / 17) + 50 * np.cos(columns / 11)
    image = np.stack([waves + rng.normal(0, 12, waves.shape) for _ in range(3)], axis=-1)
    path = tmp_path_factory.mktemp("slide") / "waves.tif"
    tifffile.imwrite(
        path, np.clip(image, 0, 255).astype(np.uint8), tile=(128, 128), photometric="rgb"
    )
    return path


@pytest.fixture(scope="module")
def finished(slide, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "waves.zarr"
    tilepipe("run", slide, "-o", out, *RANDOM, "--quiet")
    return out


@pytest.fixture
def store(finished, tmp_path) -> Path:
    """A copy that a test may damage."""
    copy = tmp_path / "waves.zarr"
    shutil.copytree(finished, copy)
    return copy


def label_of(path: Path):
    return open_store(str(path), writable=True).label("unet")


def rewrite(path: Path, stage: str, level, unit, pixels) -> None:
    """Write other pixels and a journal record that fits them: damage that checksums cannot see."""
    store = open_store(str(path), writable=True)
    image = stage in ("ingest", "reduce")
    record = store.read_record() if image else store.label("unet").read_record()
    journal = store.journal(None if image else "unet", record["fingerprint"])
    checksum = level.write_unit(unit, np.ascontiguousarray(pixels))
    journal.write(stage, level.index, unit, checksum=checksum)


def shard(path: Path, array: str) -> Path:
    """The largest stored object of an array."""
    files = [file for file in (path / array).rglob("*") if file.is_file()]
    return max((file for file in files if file.name != "zarr.json"), key=lambda f: f.stat().st_size)


def test_a_finished_mask_passes_and_keeps_its_certificate(store):
    result = tilepipe("verify", store, "--json", "--samples", "4")
    certificate = json.loads(result.stdout)
    assert certificate["passed"] is True
    assert certificate["samples"] == 4
    assert certificate["flips"] == 0
    assert certificate["max_probability_error"] < 1e-5
    assert certificate["label_units"] == 6 + 4 - 2
    assert certificate["image_units"] == 6 + 4 - 2
    assert certificate["slide_units"] == 6
    record = label_of(store).read_record()
    assert record["verified"] == certificate
    assert record["state"] == "done"


def test_text_says_what_was_checked(store):
    output = tilepipe("verify", store, "--samples", "1").output
    assert "label unet verified" in output
    assert "1 places" in output


def test_a_certificate_that_cannot_be_kept_is_said_to_be_lost(store, monkeypatch):
    def full(label, record):
        raise StoreError("waves.zarr: cannot write labels/unet/zarr.json: No space left on device")

    monkeypatch.setattr(Label, "write_record", full)
    said = tilepipe("verify", store, "--samples", "1").stdout
    assert "label unet verified" in said
    assert "note: the certificate could not be kept beside the mask: waves.zarr: cannot" in said
    told = json.loads(tilepipe("verify", store, "--samples", "1", "--json", "-q").stdout)
    assert "No space left on device" in told["notes"][0]


@pytest.mark.parametrize(("seed", "passes"), [(0, True), (1, True), (1, False)])
def test_a_mask_that_is_begun_anew_meanwhile_gets_no_certificate(
    store, slide, monkeypatch, seed, passes
):
    begun = label_of(store).read_record()["started"]

    def compare(*_args, **_options):
        monkeypatch.undo()
        while time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()) == begun:
            time.sleep(0.05)
        other = [*RANDOM, "--weights", f"random:{seed}", "--quiet", "--overwrite"]
        tilepipe("run", slide, "-o", store, *other)
        if not passes:
            raise VerifyError("the places differ")
        return []

    monkeypatch.setattr(certify, "_compare", compare)
    with pytest.raises(VerifyError, match="was begun anew by another job, or taken away"):
        verify(str(store))
    assert "verified" not in label_of(store).read_record()
    verify(str(store))


@pytest.mark.parametrize("array", ["labels/unet/0", "labels/unet/1", "0", "1"])
def test_a_flipped_byte_is_caught(store, array):
    file = shard(store, array)
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 3] ^= 0xFF
    file.write_bytes(raw)
    result = tilepipe("verify", store, "--samples", "0", code=1)
    assert "level" in result.output
    assert "y " in result.output
    assert ", x " in result.output


@pytest.mark.parametrize("array", ["labels/unet/0", "0"])
def test_a_missing_shard_is_caught(store, array):
    shard(store, array).unlink()
    with pytest.raises(VerifyError, match=r"level 0, y \d+:\d+, x \d+:\d+"):
        verify(str(store), samples=0)
    verdict = label_of(store).read_record()["verified"]
    assert verdict["passed"] is False
    assert "level 0" in verdict["reason"]


def test_a_missing_record_is_caught(store):
    next(store.rglob("journal/unet/segment/0/1.0.json")).unlink()
    with pytest.raises(VerifyError, match=r"y 256:512, x 0:256: has no journal record"):
        verify(str(store), samples=0)


def test_pixels_changed_together_with_their_record_are_caught_by_the_slide(store):
    level = open_store(str(store), writable=True).image(0)
    unit = level.grid.unit(0, 0)
    pixels = level.read(unit.box)
    pixels[1, 7, 9] ^= 1
    rewrite(store, "ingest", level, unit, pixels)
    coarse = open_store(str(store), writable=True).image(1)
    under = coarse.grid.unit(0, 0)
    fine = (
        open_store(str(store))
        .image(0)
        .read(under.box.enlarged(2).intersect(Box.of_shape(level.shape)))
    )
    rewrite(store, "reduce", coarse, under, reduce_image(fine))
    with pytest.raises(VerifyError, match=r"1 pixels differ from the slide, the first at y 7, x 9"):
        verify(str(store), samples=0)


def test_a_level_that_is_not_the_mode_of_the_one_below_is_caught(store):
    level = label_of(store).level(1)
    unit = level.grid.unit(0, 0)
    pixels = level.read(unit.box)
    pixels[3, 4] ^= 1
    rewrite(store, "label-reduce", level, unit, pixels)
    with pytest.raises(VerifyError, match=r"label unet level 1.*first at y 3, x 4"):
        verify(str(store), samples=0)


def test_a_mask_of_other_weights_is_caught(store, slide, tmp_path):
    other = tmp_path / "other.zarr"
    tilepipe("run", slide, "-o", other, *RANDOM, "--weights", "random:5", "--quiet")
    mine, theirs = label_of(store), label_of(other)
    for index in range(mine.n_levels):
        level = mine.level(index)
        for unit in level.grid:
            stage = "label-reduce" if index else "segment"
            rewrite(store, stage, level, unit, theirs.level(index).read(unit.box))
    with pytest.raises(VerifyError, match=r"label unet, y .*pixels differ from the network's own"):
        verify(str(store), samples=4)


def test_a_precision_too_coarse_for_the_network_is_named(slide, tmp_path, monkeypatch):
    out = tmp_path / "out.zarr"
    tilepipe("run", slide, "-o", out, *RANDOM, "--precision", "bf16", "--quiet")
    monkeypatch.setattr("tilepipe.infer.certify.REDUCED_FLIPS", 1e-5)
    with pytest.raises(VerifyError, match=r"or bf16 is too coarse .* --overwrite --precision fp32"):
        verify(str(out), samples=2)


def test_weights_that_are_not_the_recorded_ones_are_refused(store):
    with pytest.raises(VerifyError, match="was made with weights"):
        verify(str(store), weights="random:5", samples=1)


def test_a_class_that_does_not_exist_is_caught(store):
    level = label_of(store).level(0)
    unit = level.grid.unit(1, 1)
    pixels = level.read(unit.box)
    pixels[0, 0] = 9
    rewrite(store, "segment", level, unit, pixels)
    with pytest.raises(VerifyError, match="holds class 9; the label has classes 0 to 1"):
        verify(str(store), samples=0)


def test_what_is_not_finished_is_not_verified(store):
    label = label_of(store)
    label.write_record({**label.read_record(), "state": "units failed"})
    with pytest.raises(VerifyError, match=r"is not finished \(state: units failed\)"):
        verify(str(store))


def test_a_slide_that_is_gone_is_said_and_the_rest_still_verified(store):
    owner = open_store(str(store), writable=True)
    record = owner.read_record()
    owner.write_record({**record, "source": {"path": "/nowhere/waves.tif", "format": "tiff"}})
    certificate = verify(str(store), samples=1)
    assert certificate.slide == "gone (/nowhere/waves.tif)"
    assert certificate.slide_units == 0
    assert certificate.passed


def test_a_store_without_masks(tmp_path, slide):
    out = tmp_path / "image.zarr"
    tilepipe("ingest", slide, "-o", out, "--quiet")
    assert "nothing to verify" in tilepipe("verify", out, code=1).output


@pytest.mark.parametrize(
    "options",
    [
        ["--in-place", "--model", "unet"],
        ["--model", "unet-dilated", "--tile", "489", "--halo", "64"],
        ["--model", "unet3plus", "--tile", "352"],
    ],
)
def test_in_place_and_blended_and_padded(slide, tmp_path, options):
    out = tmp_path / "out.zarr"
    tilepipe("run", slide, "-o", out, "--weights", "random:0", "--base", "2", "--no-tune",
             "--unit", "256", "--quiet", *options)  # fmt: skip
    certificate = json.loads(tilepipe("verify", out, "--json", "--samples", "2").stdout)
    assert certificate["flips"] == 0
    assert certificate["sampled_px"] > 0


def test_places_lie_inside_and_are_the_same_again():
    class Plan:
        extent = (500, 389)
        core_px = 256

    boxes = list(places(Plan, 20, 3))
    assert boxes == list(places(Plan, 20, 3))
    assert all(Box(0, 0, 500, 389).contains(box) and box.area for box in boxes)
    assert len(set(boxes)) > 10


def test_label_reduction_is_the_stores_own(store):
    label = label_of(store)
    fine = label.level(0).read(Box.of_shape(label.level(0).shape))
    coarse = label.level(1).read(Box.of_shape(label.level(1).shape))
    np.testing.assert_array_equal(reduce_label(fine), coarse)


@pytest.fixture(scope="module")
def with_all(slide, tmp_path_factory) -> Path:
    """A mask with probabilities and objects."""
    out = tmp_path_factory.mktemp("all") / "waves.zarr"
    tilepipe("run", slide, "-o", out, *RANDOM, "--probabilities", "--instances", "--quiet")
    return out


def test_objects_that_are_not_finished_are_said_to_be_unchecked(with_all, tmp_path):
    store = Path(shutil.copytree(with_all, tmp_path / "waves.zarr"))
    objects = open_store(str(store), writable=True).label("unet-instances")
    objects.write_record({**objects.read_record(), "state": "running"})
    said = tilepipe("verify", store, "--label", "unet", "--samples", "1").stdout
    assert "note: its objects, unet-instances, are not finished and were not checked" in said


@pytest.mark.parametrize("level", [0, 1])
def test_objects_are_verified_with_their_mask(with_all, tmp_path, level):
    store = Path(shutil.copytree(with_all, tmp_path / "waves.zarr"))
    objects = open_store(str(store)).label("unet-instances")
    units = sum(len(objects.level(k).grid) for k in range(objects.n_levels))
    for name in ("unet", "unet-instances"):
        told = json.loads(tilepipe("verify", store, "--label", name, "--json", "-q").stdout)
        assert (told["label"], told["object_units"]) == ("unet", units)
    assert f"{units} of its objects" in tilepipe("verify", store).stdout
    shard(store, f"labels/unet-instances/{level}").unlink()
    said = tilepipe("verify", store, code=1).output
    assert f"unet-instances level {level}" in said
    assert "checksum differs" in said


def test_what_is_lost_of_a_mask_is_made_again(with_all, slide, tmp_path):
    store = Path(shutil.copytree(with_all, tmp_path / "waves.zarr"))
    again = ["run", slide, "-o", store, *RANDOM, "--probabilities", "--instances", "--quiet"]
    assert "made again" not in tilepipe(*again).output
    lost = [
        shard(store, f"{place}/{level}")
        for place in ("labels/unet", "labels/unet-instances", "probabilities/unet")
        for level in (0, 1)
    ]
    bytes_before = {path: path.read_bytes() for path in lost}
    for path in lost:
        path.unlink()
    said = tilepipe(*again).output
    assert "of label unet in" in said
    assert "2 units of label unet-instances in" in said
    assert {path: path.read_bytes() for path in lost} == bytes_before
    tilepipe("verify", store, "--quiet")


def test_a_store_that_others_write_is_not_taken_away(finished, slide, tmp_path):
    store = Path(shutil.copytree(finished, tmp_path / "waves.zarr"))
    other = [arg if arg != "256" else "128" for arg in RANDOM]
    with running(str(store)) as sole:
        assert sole
        refused = ["run", slide, "-o", store, *other, "--overwrite", "--quiet"]
        holder = subprocess.run(
            [sys.executable, "-m", "tilepipe", *map(str, refused)],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert holder.returncode == 1
        assert "another tilepipe process is writing there" in holder.stderr
    tilepipe("verify", store, "--quiet")
    tilepipe(*refused)


@pytest.mark.parametrize("place", ["labels/unet", "probabilities/unet", ""])
def test_what_is_lost_is_not_handed_on_as_background(with_all, tmp_path, place):
    store = Path(shutil.copytree(with_all, tmp_path / "waves.zarr"))
    shard(store, f"{place}/0" if place else "0").unlink()
    page, table = tmp_path / "page.html", tmp_path / "objects.csv"
    commands: list[list[object]] = [
        ["report", store, "-o", page],
        ["export", store, "--to", "ome-zarr-0.4", "-o", tmp_path / "copy.zarr"],
    ]
    if place:
        commands += [
            ["export", store, "--label", "unet-instances", "--to", "csv", "-o", table],
            ["export", store, "--label", "unet", "--to", "geojson", "-o", table],
            ["evaluate", with_all, store, "--label", "unet", "--truth-label", "unet"],
        ]
    else:
        commands.append(["export", store, "--to", "ome-tiff", "--image", "-o", tmp_path / "i.tif"])
    for command in commands:
        said = tilepipe(*command, code=1).output
        assert "lacks 1 units that were written" in said, command
        assert f"tilepipe finish {store}" in said
    assert {path.name for path in tmp_path.iterdir()} == {"waves.zarr"}
    with pytest.raises(StoreError, match="would be read as 0"):
        open_result(store, "unet")


def test_the_viewer_shows_what_is_there_and_says_what_is_lost(with_all, tmp_path, monkeypatch):
    monkeypatch.setattr("tilepipe.view.server.ViewServer.serve_forever", lambda *_, **__: None)
    store = Path(shutil.copytree(with_all, tmp_path / "waves.zarr"))
    view = ["view", store, "--no-browser"]
    assert "Warning" not in tilepipe(*view).output
    shard(store, "labels/unet/0").unlink()
    said = tilepipe(*view).output
    assert "Warning: " in said
    assert "label unet lacks 1 units that were written" in said


def test_a_mask_that_is_not_finished_is_handed_on_with_a_warning(with_all, tmp_path):
    store = Path(shutil.copytree(with_all, tmp_path / "waves.zarr"))
    label = open_store(str(store), writable=True).label("unet")
    label.write_record({**label.read_record(), "state": "running"})
    shard(store, "labels/unet/0").unlink()
    export = ["export", store, "--label", "unet", "--to", "csv", "--overwrite"]
    assert "label unet is not finished (running)" in tilepipe(*export).output
    assert tilepipe(*export, "--quiet").output == ""


def test_another_slide_is_told_from_the_stores(store, tmp_path):
    other = tmp_path / "other.tif"
    tifffile.imwrite(other, np.zeros((300, 389, 3), np.uint8), photometric="rgb")
    said = r"other.tif is not its slide: 3 x 300 x 389 \(c, y, x\) instead of 3 x 600 x 389"
    with pytest.raises(VerifyError, match=said):
        verify(str(store), slide=str(other), samples=1)


@pytest.mark.parametrize("option", ["--label", "--slide", "--weights"])
def test_an_option_that_is_empty_is_not_one_left_out(store, option):
    said = tilepipe("verify", store, option, "", "--samples", "0", code=1).output
    assert said.startswith("Error: ")
