"""How a network is run is chosen where it is run."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tilepipe.errors import ModelError, StoreError
from tilepipe.infer.backends import device_here
from tilepipe.pipeline import choice
from tilepipe.pipeline import context as context_room
from tilepipe.pipeline.bill import bill
from tilepipe.pipeline.context import context_of, forget
from tilepipe.pipeline.events import ignore
from tilepipe.pipeline.job import INGEST, SEGMENT
from tilepipe.pipeline.prepare import prepare
from tilepipe.pipeline.run import Request
from tilepipe.pipeline.source import open_source
from tilepipe.pipeline.worker import run_units
from tilepipe.spec import JobSpec


def test_a_cluster_is_asked_how_to_run_the_network(small_slide, tmp_path, monkeypatch):
    spec = JobSpec(weights="random:0", base=2, tune=False, scheduler="tcp://far:8786")
    monkeypatch.chdir(small_slide.parent)
    asked = []

    def ask(scheduler, function, *arguments):
        asked.append((scheduler, arguments))
        there = function(*arguments)
        return {**there, "threads": 77, "notes": ["as it is there"]}

    monkeypatch.setattr(choice, "ask_a_worker", ask)
    source = open_source(small_slide.name, "out.zarr", spec)
    told = []
    chosen = choice.choose(source, spec, told.append)
    ((scheduler, (slide, output, settings)),) = asked
    assert scheduler == "tcp://far:8786"
    assert Path(slide) == small_slide, "a worker may stand in another folder"
    assert Path(output) == small_slide.parent / "out.zarr"
    assert settings["base"] == 2
    assert chosen.settings.threads == 77
    assert [event.text for event in told] == ["as it is there"]
    here = choice.choose(source, spec.replace(scheduler="local"), told.append)
    assert here.settings.plan == chosen.settings.plan
    assert here.settings.threads != 77
    assert len(asked) == 1
    source.slide.close()


def test_units_in_this_process_use_the_network_that_was_planned_with(
    small_slide, tmp_path, monkeypatch
):
    spec = JobSpec(weights="random:0", base=3, tune=False, in_place=True)
    job = prepare(str(small_slide), str(tmp_path / "out.zarr"), spec, on_event=ignore)

    def load_model(*args, **options):
        raise AssertionError("loaded a second time")

    monkeypatch.setattr("tilepipe.models.load_model", load_model)
    (done,) = run_units(job.ticket, job.ticket.stages.index((SEGMENT, 0)), (0,))
    job.held.close()
    forget(job.ticket.output)
    assert done.ok, done.error


def test_another_network_than_the_job_was_planned_with_is_refused(small_slide, tmp_path):
    """A worker may find another file under the same name."""
    spec = JobSpec(weights="random:0", base=2, tune=False, in_place=True)
    job = prepare(str(small_slide), str(tmp_path / "out.zarr"), spec, on_event=ignore)
    stage = job.ticket.stages.index((SEGMENT, 0))
    (fits,) = run_units(job.ticket, stage, (0,))
    forget(job.ticket.output)
    (other,) = run_units(replace(job.ticket, network="0" * 16), stage, (0,))
    job.held.close()
    forget(job.ticket.output)
    assert fits.ok, fits.error
    assert not other.ok
    assert "not the network here that the job was planned with" in other.error


@pytest.mark.parametrize(
    ("gpus", "asked", "device"),
    [("2,3", "auto", "cuda:2"), ("2,3", "cpu", "cpu"), ("3", "cuda:1", "cuda:1"),
     (None, "cuda", "cuda:0")],
)  # fmt: skip
def test_settings_are_measured_on_a_gpu_of_the_job(
    small_slide, tmp_path, monkeypatch, gpus, asked, device
):
    """The machine's first may be in use by somebody else."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.setattr("tilepipe.infer.backends.gpu_count", lambda: 4)
    spec = JobSpec(weights="random:0", base=2, tune=False, gpus=gpus, device=asked)
    source = open_source(str(small_slide), str(tmp_path / "out.zarr"), spec)
    assert choice.choose(source, spec, ignore).settings.device == device
    source.slide.close()


def test_a_job_on_gpus_does_not_run_on_the_processor_instead(small_slide, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")  # there, but torch cannot use them
    monkeypatch.setattr("tilepipe.infer.backends.gpu_count", lambda: 0)
    spec = JobSpec(weights="random:0", base=2, tune=False, gpus="all")
    with pytest.raises(ModelError, match=r"--gpus all: torch finds no GPU here .*; leave --gpus"):
        prepare(str(small_slide), str(tmp_path / "out.zarr"), spec, on_event=ignore)
    assert not (tmp_path / "out.zarr").exists()


@pytest.mark.parametrize("reason", ["a disk of this machine", "the file"])
def test_what_one_machine_cannot_read_is_tried_on_another(
    small_slide, tmp_path, monkeypatch, reason
):
    spec = JobSpec(weights="random:0", base=2, tune=False)
    job = prepare(str(small_slide), str(tmp_path / "out.zarr"), spec, on_event=ignore)

    def pread(descriptor, count, offset):
        if reason == "the file":
            return b""  # it ends here
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with context_of(job.ticket) as context, monkeypatch.context() as patch:
        assert context.slide.channels == 3  # it is open
        patch.setattr("tilepipe.slide.segments.os.pread", pread)
        (failed,) = run_units(job.ticket, job.ticket.stages.index((INGEST, 0)), (0,))
    job.held.close()
    forget(job.ticket.output)
    assert ("Input/output error" in failed.error) == (reason != "the file")
    assert failed.permanent == (reason == "the file")
    assert not failed.unfit


@pytest.mark.parametrize("spelled", ["out.zarr", "./out.zarr", "{}/out.zarr"])
def test_what_is_held_of_an_output_is_let_go_of_however_it_is_spelled(
    small_slide, tmp_path, monkeypatch, spelled
):
    """A lane of a job that was broken off may open it again after all was forgotten."""
    monkeypatch.chdir(tmp_path)
    spec = JobSpec(weights="random:0", base=2, tune=False, in_place=True)
    for _ in range(2):
        job = prepare(str(small_slide), spelled.format(tmp_path), spec, on_event=ignore)
        assert job.ticket.output not in {key[0] for key in context_room._contexts}
        (late,) = run_units(job.ticket, job.ticket.stages.index((SEGMENT, 0)), (0,))
        assert late.ok, late.error
        assert job.ticket.output in {key[0] for key in context_room._contexts}
        job.held.close()
    forget(job.ticket.output)


def test_the_network_that_is_at_work_stays(small_slide, tmp_path):
    """Of three slides at once that of the one that is over goes, not that of the largest."""
    spec = JobSpec(weights="random:0", base=2, tune=False, in_place=True)
    tickets = []
    for tile in (364, 380, 396):
        job = prepare(
            str(small_slide), str(tmp_path / f"{tile}.zarr"), spec.replace(tile=tile),
            on_event=ignore,
        )  # fmt: skip
        job.held.close()
        tickets.append(job.ticket)

    def engine(number):
        with context_of(tickets[number]) as context:
            return context.engine()

    large = engine(0)
    engine(1)
    assert engine(0) is large
    engine(2)
    assert engine(0) is large
    for ticket in tickets:
        forget(ticket.output)


@pytest.mark.parametrize(
    ("chosen", "asked", "count", "here"),
    [
        ("cpu", "auto", 0, "cpu"),
        ("cuda:0", "auto", 1, "cuda:0"),
        ("cuda:1", "auto", 2, "cuda:1"),
        ("cuda:1", "cuda:0", 2, "cuda:0"),  # gone on with on another
        ("cuda:1", "cuda:1", 1, "cuda:0"),  # --gpus: a worker sees one
        ("cuda:3", "cuda", 4, "cuda:0"),
        ("cuda:3", "cpu", 4, "cuda:3"),
    ],
)
def test_a_gpus_number_is_nothing_of_a_job(chosen, asked, count, here, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert device_here(chosen, asked) == here


def test_a_job_of_a_gpu_is_refused_at_once_where_there_is_none(small_slide, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    chosen = choice._settings

    def settings(*given):
        return replace(chosen(*given), device="cuda:0")

    monkeypatch.setattr(choice, "_settings", settings)
    spec = JobSpec(weights="random:0", base=2, tune=False)
    out = str(tmp_path / "out.zarr")
    with pytest.raises(ModelError, match="torch finds none here; go on where there is one"):
        prepare(str(small_slide), out, spec, on_event=ignore)
    # What a cluster's GPUs will do is planned on a machine without.
    facts = bill(Request(str(small_slide), str(tmp_path / "other.zarr"), spec))
    assert any("network's time is left out" in note for note in facts["notes"])
    assert facts["settings"]["device"] == "cuda:0"


@pytest.mark.parametrize("output", ["gone.zarr", "s3://slides/gone.zarr"])
def test_a_server_that_does_not_answer_makes_no_worker_unfit(
    small_slide, tmp_path, monkeypatch, output
):
    """It is the same for all of them; a folder may be missing on one machine alone."""
    spec = JobSpec(weights="random:0", base=2, tune=False)
    job = prepare(str(small_slide), str(tmp_path / "out.zarr"), spec, on_event=ignore)
    job.held.close()

    def refuse(location, **_):
        raise StoreError(f"{location}: cannot read zarr.json: no answer")

    monkeypatch.setattr("tilepipe.pipeline.context.open_store", refuse)
    ticket = replace(job.ticket, output=output)
    (failed,) = run_units(ticket, job.ticket.stages.index((INGEST, 0)), (0,))
    assert "no answer" in failed.error
    assert not failed.permanent
    assert failed.unfit == (output == "gone.zarr")
