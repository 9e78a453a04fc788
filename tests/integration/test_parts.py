"""``--part I/N`` in processes that know nothing of each other, then ``finish``."""

from contextlib import contextmanager

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from tilepipe.cli.main import main
from tilepipe.errors import StoreError
from tilepipe.pipeline import prepare as prepare_room
from tilepipe.pipeline.events import ignore
from tilepipe.pipeline.job import SEGMENT
from tilepipe.pipeline.output import running
from tilepipe.pipeline.work import SlideWork
from tilepipe.spec import JobSpec
from tilepipe.store import open_store
from tilepipe.tiling import Box


def test_three_parts_at_once_then_finish(zygote, slide, flags, reference, equal, tmp_path):
    store = tmp_path / "out.zarr"
    parts = [
        zygote.start("tilepipe", "run", slide, "-o", store, *flags, "--part", f"{share}/3")
        for share in (2, 0, 1)
    ]
    for part in parts:
        assert part.wait() == 0, part.text()
    label = open_store(str(store)).label("unet")
    assert label.read_record()["state"] == "part done"
    zygote.run("finish", store, "--quiet")
    equal(store, reference)
    assert open_store(str(store)).label("unet").read_record()["state"] == "done"
    assert open_store(str(store)).read_record()["state"] == "done"


@pytest.mark.parametrize("order", [(1, 2, 0), (2, 1)])
def test_parts_in_any_order_or_missing(zygote, slide, flags, reference, equal, tmp_path, order):
    """``finish`` does what no part has done."""
    store = tmp_path / "out.zarr"
    for share in order:
        zygote.run("run", slide, "-o", store, *flags, "--part", f"{share}/3")
    zygote.run("finish", store, "--quiet")
    equal(store, reference)


def test_a_killed_part_goes_on(
    zygote, slide, flags, reference, equal, records, tmp_path, wait_until
):
    store = tmp_path / "out.zarr"
    command = ["run", slide, "-o", store, *flags, "--part", "0/2"]
    process = zygote.start("tilepipe", *command)
    wait_until(lambda: records(store) > 3 or process.poll() is not None, "some units")
    process.kill()
    zygote.run(*command)
    zygote.run("run", slide, "-o", store, *flags, "--part", "1/2")
    zygote.run("finish", store, "--quiet")
    equal(store, reference)


@pytest.mark.parametrize("more", [[], ["--instances"]], ids=["mask", "objects"])
def test_a_part_that_ends_after_finish_takes_nothing_back(
    zygote, slide, flags, tmp_path, monkeypatch, more
):
    store = tmp_path / "out.zarr"
    close = SlideWork.close

    def late(work, reason):
        zygote.run("finish", store, "--quiet")
        close(work, reason)

    monkeypatch.setattr(SlideWork, "close", late)
    command = ["run", slide, "-o", store, *flags, *more, "--part", "0/2", "--quiet"]
    result = CliRunner().invoke(main, [str(arg) for arg in command])
    assert result.exit_code == 0, result.output
    found = open_store(str(store))
    states = [found.label(name).read_record()["state"] for name in found.labels]
    assert states == ["done"] * (1 + len(more))
    assert found.read_record()["state"] == "done"


def test_a_label_is_not_taken_away_from_those_that_write_parts_of_it(
    zygote, slide, flags, equal, tmp_path
):
    """Their units would lie among the new ones and count as done, whatever made them."""
    store = tmp_path / "out.zarr"
    zygote.run("run", slide, "-o", store, *flags, "--part", "0/2")
    anew = ["run", slide, "-o", store, *flags, "--weights", "random:7", "--overwrite"]
    with running(str(store), "unet") as sole:
        assert sole
        for part in ([], ["--part", "1/2"]):
            text = zygote.run(*anew, *part, code=1)
            assert "writing a part of label unet" in text
        zygote.run(*anew, "--name", "other")
    zygote.run(*anew)
    equal(store / "labels" / "unet", store / "labels" / "other")


@pytest.mark.parametrize("in_store", [False, True])
def test_overwrite_given_to_every_part_keeps_the_others_work(
    zygote, slide, flags, equal, tmp_path, in_store
):
    """As ``submit.sh … --overwrite`` gives it, and again when a task of the array is requeued."""
    store, other = tmp_path / "out.zarr", ["--name", "other"]
    image = store if in_store else slide
    zygote.run("run", slide, "-o", store, *flags)
    anew = ["run", image, "-o", store, *flags, "--weights", "random:7"]
    zygote.run(*anew, "--overwrite", "--part", "0/3")
    with running(str(store), "unet"):  # nor does it wait for other parts
        for share in (1, 2, 1):
            zygote.run(*anew, "--overwrite", "--part", f"{share}/3")
    label = open_store(str(store)).label("unet")
    journal = open_store(str(store)).journal("unet", label.read_record()["fingerprint"])
    assert len(journal.recorded(SEGMENT, 0)) == len(label.level(0).grid) == 20
    zygote.run("finish", store, "--label", "unet", "--quiet")
    zygote.run(*anew, *other)
    equal(store / "labels" / "unet", store / "labels" / "other")


def test_overwrite_makes_the_units_of_a_part_anew(zygote, slide, flags, tmp_path):
    store = tmp_path / "out.zarr"
    command = ["run", slide, "-o", store, *flags, "--part", "0/20"]
    zygote.run(*command)
    shard = store / "labels" / "unet" / "0" / "c" / "0" / "0"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-8] + bytes(8))
    zygote.run(*command)
    assert shard.read_bytes() != whole
    zygote.run(*command, "--overwrite")
    assert shard.read_bytes() == whole


@pytest.mark.parametrize("last", ["the image", "the mask", "its objects"])
def test_who_slept_while_preparing_takes_nothing_away(slide, tmp_path, monkeypatch, last):
    """Its turn is asked for before each thing that is created."""
    store = tmp_path / "out.zarr"
    turns = ["the image", "the mask", "its objects"]

    @contextmanager
    def taken_over_before_the_last(location, **_):
        left = turns[: turns.index(last)]

        def check():
            if not left:
                raise StoreError(f"{location}: another process took over there")
            left.pop()

        yield check

    monkeypatch.setattr(prepare_room, "leased", taken_over_before_the_last)
    spec = JobSpec(model="unet", weights="random:0", base=2, part="0/2", instances=True)
    with pytest.raises(StoreError, match="another process took over there"):
        prepare_room.prepare(str(slide), str(store), spec, on_event=ignore)
    made = [store, store / "labels" / "unet", store / "labels" / "unet-instances"]
    assert [place.exists() for place in made] == [
        place in made[: turns.index(last)] for place in made
    ]


@pytest.mark.parametrize("part", ["3/3", "0/0", "-1/3", "x"])
def test_parts_that_make_no_sense_are_refused(zygote, slide, flags, tmp_path, part):
    text = zygote.run("run", slide, "-o", tmp_path / "out.zarr", *flags, "--part", part, code=1)
    assert "part" in text
    assert not (tmp_path / "out.zarr").exists()


def test_finish_needs_a_store_of_ours(zygote, tmp_path):
    text = zygote.run("finish", tmp_path / "none.zarr", code=1)
    assert "nothing there" in text


def test_finish_in_another_folder_finds_what_the_settings_name(zygote, slide, flags, tmp_path):
    mask = np.zeros((60, 50), np.uint8)
    mask[:30] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    store, elsewhere = tmp_path / "out.zarr", tmp_path / "elsewhere"
    elsewhere.mkdir()
    part = ["--tissue", "mask.png", "--part", "0/2"]
    zygote.run("run", slide, "-o", store, *flags, *part, cwd=tmp_path)
    zygote.run("finish", store, "--quiet", cwd=elsewhere)
    label = open_store(str(store)).label("unet")
    assert label.read_record()["state"] == "done"
    assert not label.level(0).read(Box(500, 0, 600, 500)).any()


def test_a_mask_that_cannot_be_finished_keeps_no_other_from_it(zygote, slide, flags, tmp_path):
    gone = tmp_path / "mask.png"
    Image.fromarray(np.full((60, 50), 255, np.uint8)).save(gone)
    store = tmp_path / "out.zarr"
    for name, more in (("lost", ["--tissue", gone]), ("other", [])):
        part = ["--name", name, "--part", "0/2", *more]
        zygote.run("run", slide, "-o", store, *flags, *part)
    gone.unlink()
    text = zygote.run("finish", store, "--quiet", code=1)
    assert f"Error: label lost: {gone}: not a mask image" in text
    states = [
        open_store(str(store)).label(name).read_record()["state"] for name in ("lost", "other")
    ]
    assert states == ["part done", "done"]
