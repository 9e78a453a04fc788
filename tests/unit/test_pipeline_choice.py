"""How a network is run is chosen where it is run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tilepipe.pipeline import choice
from tilepipe.pipeline.context import forget
from tilepipe.pipeline.events import ignore
from tilepipe.pipeline.job import SEGMENT
from tilepipe.pipeline.prepare import prepare
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
