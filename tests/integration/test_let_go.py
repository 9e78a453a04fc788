"""What a job of many slides holds does not grow with their number."""

from __future__ import annotations

import gc
import os
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
from distributed import Scheduler, Worker

from tests.conftest import write_slide
from tilepipe.errors import PlanError, StoreError
from tilepipe.pipeline import context as context_room
from tilepipe.pipeline import run as run_room
from tilepipe.pipeline.bill import bill
from tilepipe.pipeline.context import context_of, forget
from tilepipe.pipeline.events import ignore
from tilepipe.pipeline.prepare import prepare
from tilepipe.pipeline.run import Request, run_many, run_one
from tilepipe.pipeline.work import SlideWork
from tilepipe.spec import JobSpec
from tilepipe.tiling import Box

SPEC = JobSpec(
    weights="random:0", base=2, options={"depth": 1}, tune=False, precision="fp32", device="cpu"
)
COUNT = 18


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    paths = [folder / f"{number:02}.tif" for number in range(COUNT)]
    for number, path in enumerate(paths):
        write_slide(path, (150 - number, 130), seed=number)
    return paths


def open_files_in(folder):
    """Files of a folder that this process holds open."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        try:
            found.append(Path(os.readlink(f"/proc/self/fd/{number}")))
        except OSError:
            continue
    return [path for path in found if path.parent == folder]


def test_of_many_slides_only_those_at_work_are_held(slides, tmp_path, monkeypatch):
    alive, held, files = weakref.WeakSet(), [], []

    class Watched(run_room._Kept):
        def __init__(self, *args, **named):
            super().__init__(*args, **named)
            alive.add(self)

    monkeypatch.setattr(run_room, "_Kept", Watched)

    def look(result):
        assert result.state == "done", result.reason
        held.append(len(alive))
        files.append(len(open_files_in(slides[0].parent)))

    requests = [Request(str(path), str(tmp_path / f"{path.stem}.zarr"), SPEC) for path in slides]
    results = run_many(requests, on_result=look)
    assert len(results) == len(held) == COUNT
    # Four jobs are open at the most, and those just closed; each opens its slide twice.
    assert max(held) <= 8
    assert 0 < max(files) <= 14
    assert open_files_in(slides[0].parent) == []
    outputs = {request.output for request in requests}
    assert not outputs & {key[0] for key in context_room._contexts}


def test_a_store_that_goes_before_its_job_ends_is_no_end_of_the_others(
    slides, tmp_path, monkeypatch
):
    requests = [
        Request(str(path), str(tmp_path / f"{path.stem}.zarr"), SPEC) for path in slides[:3]
    ]
    close = SlideWork.close

    def close_after_all(work, reason):
        if work.job.source.output == requests[1].output:
            shutil.rmtree(requests[1].output)  # by whoever
        close(work, reason)

    monkeypatch.setattr(SlideWork, "close", close_after_all)
    told = []
    results = run_many(requests, on_result=told.append)
    assert {result.output: result.state for result in results} == {
        requests[0].output: "done",
        requests[1].output: "failed",
        requests[2].output: "done",
    }
    failed = next(result for result in results if result.state == "failed")
    assert "or taken away, while this one was at work" in failed.reason
    assert told == results
    with pytest.raises(StoreError, match="or taken away, while this one was at work"):
        run_many(requests[1:2])
    assert open_files_in(slides[0].parent) == []


def test_the_slide_of_a_unit_under_way_is_closed_after_it(slides, tmp_path):
    jobs = [
        prepare(str(path), str(tmp_path / f"{path.stem}.zarr"), SPEC, on_event=ignore)
        for path in slides[:6]
    ]
    for job in jobs:
        job.source.slide.close()
    box = Box(0, 0, 100, 100)
    with context_of(jobs[0].ticket) as first:
        before = first.slide.read(box)
        for job in jobs[1:]:  # more than a process keeps
            with context_of(job.ticket) as other:
                other.slide.read(box)
        assert jobs[0].ticket.output not in {key[0] for key in context_room._contexts}
        np.testing.assert_array_equal(first.slide.read(box), before)
        assert slides[0] in open_files_in(slides[0].parent)
    assert slides[0] not in open_files_in(slides[0].parent)

    with context_of(jobs[1].ticket) as second:
        second.slide.read(box)
        forget(jobs[1].ticket.output)
        np.testing.assert_array_equal(second.slide.read(box).shape, (3, 100, 100))
    assert slides[1] not in open_files_in(slides[0].parent)
    for job in jobs:
        job.held.close()
        forget(job.ticket.output)
    assert open_files_in(slides[0].parent) == []


def test_slides_that_are_refused_are_closed(slides, tmp_path):
    refused = SPEC.replace(level=7)
    requests = [Request(str(path), str(tmp_path / path.stem), refused) for path in slides]
    results = run_many(requests)
    assert {result.state for result in results} == {"failed"}
    assert open_files_in(slides[0].parent) == []
    for request in requests[:3]:
        with pytest.raises(PlanError):
            bill(request)
    assert bill(Request(str(slides[0]), str(tmp_path / "one"), SPEC))["units"] == 1
    assert open_files_in(slides[0].parent) == []


def servers():
    """Count the schedulers and workers in this process, also those that are closed."""
    gc.collect()
    return sum(isinstance(one, Scheduler | Worker) for one in gc.get_objects())


def test_nothing_is_left_of_the_scheduler_and_workers_of_a_run(slides, tmp_path):
    before = servers()
    for path in slides[:3]:
        run_one(Request(str(path), str(tmp_path / f"{path.stem}.zarr"), SPEC))
    assert servers() <= before
