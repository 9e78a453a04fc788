"""What a run of several slides says of all of them."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from tilepipe.cli import steps
from tilepipe.cli.console import Console, Slides, summary_text
from tilepipe.pipeline.events import Finished, Progress


def ended(number, state="done", **summary):
    facts = {"px": 4_000_000, "elapsed_s": 8.0, "mpix_per_s": 0.5, "failed": [], **summary}
    return Finished(f"s{number}.tif", f"s{number}.zarr", state, facts)


COMPLETE = {"px": 0, "elapsed_s": 0.1, "mpix_per_s": 0.0}


def test_time_left_is_that_of_slides_for_which_something_was_done():
    now = [100.0]
    slides = Slides(10, clock=lambda: now[0])
    assert slides.left_s is None
    for number in range(4):
        slides.end(ended(number, **COMPLETE))
    assert slides.left_s is None
    assert str(slides) == "4 of 10 slides, ? left for all"
    now[0] = 130.0
    slides.end(ended(4))
    slides.end(ended(5, "units failed"))
    now[0] = 140.0
    assert slides.left_s == pytest.approx(40 / 2 * 4)
    assert slides.to_json() == {"total": 10, "done": 6, "failed": 1, "left_s": 80.0}
    assert str(slides) == "6 of 10 slides, 1 failed, 1:20 left for all"
    for number in range(6, 10):
        slides.end(ended(number))
    assert slides.left_s == 0
    assert str(slides) == "10 of 10 slides, 1 failed"


@pytest.mark.parametrize(
    "name", ["a b.zarr", "test3-DAPI-2-(387).zarr", "-dash.zarr", "plain.zarr"]
)
def test_what_comes_next_can_be_copied_into_a_shell(name):
    told = summary_text({"extent": (1, 1), "state": "done", "px": 0, "output": name})
    command = shlex.split(told.rpartition("next: ")[2])
    assert command[:2] == ["tilepipe", "view"]
    assert Path(command[2]) == Path(name)
    assert not command[2].startswith("-")


def test_the_end_of_each_of_several_slides_is_told(capsys):
    with Console(quiet=False, slides=5) as console:
        console(ended(1))
        console(ended(2, **COMPLETE))
        console(Finished("s3.tif", "s3.zarr", "failed", {"reason": "is not a TIFF"}))
        unit = {"unit": [0, 1], "reason": "the tile at 3, 4 is damaged"}
        console(ended(4, "units failed", failed=[unit], n_failed=1))
        console(ended(5, "part done"))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("s1.tif: done in 8 s, 0.50 MPix/s; 1 of 5 slides, ")
    assert lines[1].startswith("s2.tif: was complete already; 2 of 5 slides, ")
    assert lines[2].startswith("s3.tif: failed: is not a TIFF; 3 of 5 slides, 1 failed, ")
    wanted = "s4.tif: units failed: the tile at 3, 4 is damaged; 4 of 5 slides, 2 failed, "
    assert lines[3].startswith(wanted)
    assert lines[4] == "s5.tif: part done in 8 s, 0.50 MPix/s; 5 of 5 slides, 2 failed"


def test_one_slide_is_told_of_at_the_end_alone_and_quiet_is_quiet(capsys):
    for options in ({}, {"quiet": True, "slides": 3}):
        with Console(**{"quiet": False, **options}) as console:
            console(ended(1))
        assert capsys.readouterr().err == ""


def test_a_program_hears_of_all_slides(capsys, monkeypatch):
    monkeypatch.setattr(steps, "EVERY_S", 0.0)
    with Console(quiet=False, as_json=True, slides=3) as console:
        console(ended(1, "units failed"))
        console(Progress("s2.tif", (), 1.0, 2.0, None, 0, 1))
    (line,) = capsys.readouterr().err.splitlines()
    facts = json.loads(line)
    assert facts["slide"] == "s2.tif"
    assert {**facts["slides"], "left_s": 0} == {"total": 3, "done": 1, "failed": 1, "left_s": 0}


def told_of(**changed):
    summary = {
        "extent": (10, 20), "state": "done", "output": "a.zarr", "label": "unet", "px": 200,
        "elapsed_s": 2.0, "mpix_per_s": 0.1,
        "units": {"segment": {"done": 1, "total": 1, "resumed": 0}},
    }  # fmt: skip
    return summary_text({**summary, **changed})


def test_objects_that_are_made_of_a_mask_that_is_there_are_told():
    rows = {
        "segment": {"done": 1, "total": 1, "resumed": 1},
        "find objects": {"done": 1, "total": 1, "resumed": 0},
    }
    told = told_of(px=0, units=rows, instances=7)
    assert "complete already" not in told
    assert "find objects in 2 s; the rest was there already" in told
    assert "7 objects in unet-instances" in told
    rows["find objects"]["resumed"] = 1
    assert "complete already" in told_of(px=0, units=rows, instances=7)


@pytest.mark.parametrize("count, words", [(1, "memory once;"), (2, "memory 2 times;")])
def test_how_often_memory_ran_out_is_told(count, words):
    assert words in told_of(out_of_memory_events=count)


def test_what_skipping_costs_and_what_was_no_number_is_told():
    skipped = {"skipped_px": 100, "tiles": 1, "tiles_skipped": 1}
    told = told_of(**skipped, skipped_checked_px=40, skipped_lost_px=10, not_finite_px=3)
    assert "40 of these px were run all the same: 25.00% of them would not be background" in told
    assert "3 px are NaN, infinite or beyond 1e+30, and were taken for 0" in told
    assert "computed again in fp32" not in told
    assert "overflowed in 2 units" in told_of(units_redone_fp32=2)
