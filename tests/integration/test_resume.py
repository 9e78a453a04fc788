"""Killed at any moment, the same command goes on; another job's output is refused."""

import json
import random
import time

import numpy as np
import pytest
import tifffile

from tilepipe.pipeline.run import Request, run_one
from tilepipe.pipeline.work import SlideWork
from tilepipe.spec import JobSpec
from tilepipe.store import open_store
from tilepipe.tiling import Box


def records_by_age(store):
    return {
        path: path.stat().st_mtime_ns
        for path in (store / "tilepipe" / "journal").rglob("*.json")
    }  # fmt: skip


def test_killed_ten_times_it_ends_byte_equal(
    zygote, slide, flags, reference, equal, records, tmp_path
):
    store = tmp_path / "out.zarr"
    chance = random.Random(5)
    whole = records(reference)
    kept = {}
    kills = 0
    for _ in range(10):
        process = zygote.start("tilepipe", "run", slide, "-o", store, *flags)
        # A random moment: of the start, or some units after it.
        more = chance.choice([None, 0, 1, 2, 4])
        if more is None:
            time.sleep(chance.uniform(0, 1.5))
        else:
            least = min(whole - 1, len(kept) + more)
            while process.poll() is None and records(store) < least:
                time.sleep(0.002)
        kills += process.kill() < 0
        now = records_by_age(store)
        # What was recorded is never done again: its record is the one that was written first.
        assert now.items() >= kept.items()
        kept = now
    assert kills >= 5
    zygote.run("run", slide, "-o", store, *flags)
    assert records_by_age(store).items() >= kept.items()
    equal(store, reference)
    assert open_store(str(store)).label("unet").read_record()["state"] == "done"


def test_killed_after_its_last_unit_the_record_still_tells_of_all(slide, tmp_path, monkeypatch):
    def run():
        spec = JobSpec(model="unet", weights="random:0", base=2, unit=256, tune=False)
        run_one(Request(str(slide), str(tmp_path / "out.zarr"), spec))

    def killed(self, reason):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(SlideWork, "close", killed)
        with pytest.raises(KeyboardInterrupt):
            run()
    run()
    label = open_store(str(tmp_path / "out.zarr"), writable=True).label("unet")
    record, level = label.read_record(), label.level(0)
    assert record["state"] == "done"
    assert record["finished"]
    ids = level.read(Box.of_shape(level.shape))
    assert list(record["class_px"].values()) == [int((ids == k).sum()) for k in range(2)]
    # Of a part of the mask, told by a run that did no more, as little may be left.
    label.write_record({**record, "class_px": {"background": 1, "foreground": 0}})
    run()
    assert label.read_record()["class_px"] == record["class_px"]


def test_a_run_that_goes_on_tells_of_the_numbers_of_the_whole_mask(tmp_path):
    path, out = tmp_path / "heights.tif", tmp_path / "out.zarr"
    heights = np.full((256, 512), 0.5, np.float32)
    heights[:3, :5] = np.nan
    tifffile.imwrite(path, heights)
    spec = JobSpec(model="unet", weights="random:0", base=2, unit=256, tune=False)
    assert run_one(Request(str(path), str(out), spec)).summary["not_finite_px"] == 15
    for folder in ("segment", "label-reduce"):  # as if stopped before its last unit
        for record in (out / "tilepipe" / "journal" / "unet" / folder).rglob("0.1.json"):
            record.unlink()
    summary = run_one(Request(str(path), str(out), spec)).summary
    assert summary["units"]["segment"] == {"done": 2, "total": 2, "resumed": 1}
    assert summary["not_finite_px"] == 15
    assert summary["units_redone_fp32"] == 0


def test_a_killed_ingest_goes_on(zygote, slide, equal, records, tmp_path, wait_until):
    whole, store = tmp_path / "whole.zarr", tmp_path / "out.zarr"
    zygote.run("ingest", slide, "-o", whole, "--unit", 64, "--quiet")
    for _ in range(3):
        process = zygote.start("tilepipe", "ingest", slide, "-o", store, "--unit", 64, "--quiet")
        before = records(store)
        wait_until(
            lambda process=process, before=before: (
                process.poll() is not None or records(store) > before + 3
            ),
            "some units",
        )
        process.kill()
    zygote.run("ingest", slide, "-o", store, "--unit", 64, "--quiet")
    equal(store, whole)
    assert open_store(str(store)).read_record()["state"] == "done"


def test_a_finished_run_does_nothing_again(zygote, slide, flags, reference):
    before = records_by_age(reference)
    told = zygote.run("run", slide, "-o", reference, *flags, "--json")
    summary = json.loads(told.strip().splitlines()[-1])
    assert summary["px"] == 0
    assert all(row["done"] == row["resumed"] for row in summary["units"].values())
    assert records_by_age(reference) == before


def test_a_run_that_finds_all_done_writes_its_trace_too(zygote, slide, flags, tmp_path):
    command = ["run", slide, "-o", tmp_path / "out.zarr", *flags, "--trace", tmp_path / "t.json"]
    for found in (True, False):
        zygote.run(*command)
        spans = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
        assert any(span["name"] == "segment" for span in spans) is found


@pytest.mark.parametrize(
    "changes, told",
    [
        (["--weights", "random:1"], "weights"),
        (["--option", "depth=2"], "options"),
        (["--tile", "140"], "tile"),
        (["--batch", "2"], "batch"),
    ],
)
def test_a_mask_of_another_job_is_refused_with_the_ways_out(
    zygote, slide, flags, reference, changes, told
):
    before = records_by_age(reference)
    text = zygote.run("run", slide, "-o", reference, *flags, *changes, code=1)
    assert "label 'unet' is of another job" in text
    assert told in text
    assert "--overwrite" in text
    assert "--name" in text
    assert records_by_age(reference) == before


def test_the_store_of_another_slide_is_refused_with_the_ways_out(
    zygote, make_slide, flags, reference, tmp_path
):
    other = make_slide(tmp_path / "other.tif", seed=9)
    text = zygote.run("run", other, "-o", reference, *flags, code=1)
    assert "was made from another input" in text
    assert "--overwrite" in text
    assert "-o" in text


def test_both_ways_out_work(zygote, slide, flags, reference, equal, tmp_path):
    store = tmp_path / "out.zarr"
    zygote.run("run", slide, "-o", store, *flags, "--weights", "random:1")
    zygote.run("run", slide, "-o", store, *flags, "--name", "second")
    assert open_store(str(store)).labels == ("unet", "second")
    zygote.run("run", slide, "-o", store, *flags, "--overwrite")
    # The mask alone is made anew: its neighbour stays.
    assert set(open_store(str(store)).labels) == {"unet", "second"}
    for folder in ("labels/unet", "tilepipe/journal/unet", "0", "1"):
        equal(store / folder, reference / folder)


def test_two_runs_on_one_output_do_not_mix(zygote, slide, flags, reference, equal, tmp_path):
    store = tmp_path / "out.zarr"
    both = [zygote.start("tilepipe", "run", slide, "-o", store, *flags) for _ in range(2)]
    codes = sorted(process.wait() for process in both)
    assert codes in ([0, 0], [0, 1])
    if codes == [0, 1]:
        told = next(process.text() for process in both if process.code == 1)
        assert "another tilepipe process is writing" in told
    equal(store, reference)
