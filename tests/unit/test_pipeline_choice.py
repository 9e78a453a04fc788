"""How a network is run is chosen where it is run."""

from __future__ import annotations

from pathlib import Path

from tilepipe.pipeline import choice
from tilepipe.pipeline.source import open_source
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
