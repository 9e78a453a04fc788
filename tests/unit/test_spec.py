"""Settings: what a job file and the options that win over it make together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from click.testing import CliRunner

from tilepipe.cli import run
from tilepipe.cli.main import main
from tilepipe.errors import CheckpointError, SpecError
from tilepipe.models.header import Header
from tilepipe.pipeline.source import open_source
from tilepipe.slide import open_slide
from tilepipe.spec import JobSpec
from tilepipe.train.spec import TrainSpec


@pytest.fixture
def spec_of(monkeypatch):
    """What ``tilepipe run`` makes of its options, without running."""
    seen = []

    def keep(slides, output, manifest, spec):
        seen.append(spec)
        return []

    monkeypatch.setattr(run, "requests_of", keep)

    def call(*arguments):
        result = CliRunner().invoke(main, ["run", "s.tif", "--dry-run", *map(str, arguments)])
        assert result.exit_code == 0, result.output
        return seen.pop()

    return call


def test_auto_on_the_command_line_wins_over_a_number_in_the_file(tmp_path, spec_of):
    job = tmp_path / "job.toml"
    job.write_text("tile = 572\nbatch = 3\n")
    spec = spec_of("--job", job, "--tile", "auto")
    assert (spec.tile, spec.batch) == (None, 3)


def test_an_option_of_the_network_leaves_the_others_of_the_file(tmp_path, spec_of):
    job = tmp_path / "job.toml"
    job.write_text('[options]\ndepth = 2\nnorm = "batch"\n')
    flags = ("--job", job, "--option", "norm=none", "--option", "dropout=0.1")
    assert spec_of(*flags).options == {"depth": 2, "norm": "none", "dropout": 0.1}
    paths = 'images = "i"\nlabels = "l"\nout = "w.safetensors"\n'
    job.write_text(paths + "steps = 1\n[options]\ndepth = 2\n")
    spec = TrainSpec.from_toml(job, options={"dropout": 0.1})
    assert spec.options == {"depth": 2, "dropout": 0.1}


def test_a_job_file_may_say_auto(tmp_path):
    job = tmp_path / "job.toml"
    job.write_text('tile = "auto"\nbatch = "auto"\n')
    spec = JobSpec.from_toml(job)
    assert (spec.tile, spec.batch) == (None, None)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("weights", "w.safetensors"),
        ("model", "w.safetensors"),
        ("tissue", "mask.png"),
        ("scheduler", "scheduler.json"),
    ],
)
def test_a_path_in_a_job_file_is_seen_from_the_file(tmp_path, monkeypatch, key, value):
    (tmp_path / "jobs").mkdir()
    job = tmp_path / "jobs" / "job.toml"
    job.write_text(f'{key} = "{value}"\n')
    monkeypatch.chdir(tmp_path)
    assert getattr(JobSpec.from_toml(job), key) == str(tmp_path / "jobs" / value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("weights", "random:0"),
        ("model", "unet"),
        ("tissue", "auto"),
        ("scheduler", "local"),
        ("scheduler", "tcp://host:8786"),
    ],
)
def test_a_word_in_a_job_file_stays_a_word(tmp_path, key, value):
    job = tmp_path / "job.toml"
    job.write_text(f'{key} = "{value}"\n')
    assert getattr(JobSpec.from_toml(job), key) == value


def test_two_classes_of_one_name_are_refused_before_a_step_is_learnt():
    given = {"images": "i", "labels": "l", "out": "w.safetensors", "steps": 1}
    with pytest.raises(SpecError, match="two classes are called 'cell'"):
        TrainSpec.checked({**given, "class_names": ("cell", "cell")})


def test_weights_with_two_classes_of_one_name_are_refused():
    classes = [{"name": "cell", "color": (0, 0, 0, 0)}] * 2
    values = {"architecture": "unet", "in_channels": 1, "outputs": 2, "classes": classes}
    with pytest.raises(CheckpointError, match="two classes are called 'cell'"):
        Header.checked(values, source="w.safetensors")


def test_what_is_wrong_between_settings_is_said_without_all_of_them():
    arguments = ("train", "--images", "i", "--labels", "l", "-o", "w.safetensors")
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert "one of steps, epochs, minutes is needed: when to stop\n" in result.output


def test_a_tilde_is_the_home_folder_in_calls_and_job_files_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    tifffile.imwrite(tmp_path / "s.tif", np.zeros((32, 32), np.uint8))
    assert open_slide("~/s.tif").path == str(tmp_path / "s.tif")
    source = open_source("~/s.tif", "~/out.zarr", JobSpec())
    assert (source.slide.path, source.output) == (
        str(tmp_path / "s.tif"),
        str(tmp_path / "out.zarr"),
    )
    assert JobSpec(weights="~/w.safetensors").weights == str(tmp_path / "w.safetensors")
    (tmp_path / "jobs").mkdir()
    job = tmp_path / "jobs" / "job.toml"
    job.write_text('weights = "~/w.safetensors"\ntissue = "t.png"\n')
    spec = JobSpec.from_toml(job)
    assert spec.weights == str(tmp_path / "w.safetensors")
    assert spec.tissue == str(tmp_path / "jobs" / "t.png")


def test_a_name_that_begins_with_a_tilde_is_a_name(tmp_path, monkeypatch):
    """No user is called so, and a shell leaves it as it is."""
    monkeypatch.chdir(tmp_path)
    tifffile.imwrite("~old.tif", np.zeros((32, 32), np.uint8))
    arguments = ("run", "~old.tif", "--weights", "random:0", "--base", "2", "--no-tune", "-q")
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "~old.zarr" / "zarr.json").exists()
    for rest in (
        ("inspect", "~old.zarr"),
        ("export", "~old.zarr", "--to", "png", "-o", "~old.png"),
        ("run", "~old.tif", "./~old.tif", "-o", "~results", "--dry-run"),
    ):
        said = CliRunner().invoke(main, rest).output
        assert "home directory" not in said


def test_a_tilde_is_the_home_folder_for_a_training_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    job = tmp_path / "job.toml"
    job.write_text('images = "~/i"\nlabels = "l"\nout = "~/w.safetensors"\nsteps = 1\n')
    spec = TrainSpec.from_toml(job)
    assert (spec.images, spec.labels) == (tmp_path / "i", tmp_path / "l")
    assert spec.out == tmp_path / "w.safetensors"
    called = TrainSpec(images="~/i", labels="l", out="w.safetensors", kinds="~/k.csv", steps=1)
    assert (called.images, called.kinds) == (tmp_path / "i", tmp_path / "k.csv")


@pytest.mark.parametrize("key", ["level", "tile", "batch", "mpp", "retries"])
def test_true_is_no_number(tmp_path, key):
    job = tmp_path / "job.toml"
    job.write_text(f"{key} = true\n")
    with pytest.raises(SpecError, match=f"{key}: .*a number is wanted, not true or false"):
        JobSpec.from_toml(job)


@pytest.mark.parametrize("key", ["model", "weights", "tissue", "scheduler"])
def test_an_empty_name_is_told(key):
    with pytest.raises(SpecError, match=f"{key}: .*names nothing"):
        JobSpec.checked({key: ""})


@pytest.mark.parametrize("option", ["--job", "--trace"])
def test_an_option_that_is_empty_is_not_one_left_out(option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("s.tif").write_bytes(b"")
    result = CliRunner().invoke(main, ["run", "s.tif", option, ""])
    assert result.exit_code == 1
    assert "s.tif" not in result.output


def test_a_name_leaves_room_for_that_of_the_objects():
    JobSpec.checked({"instances": True, "name": "n" * 90})
    JobSpec.checked({"name": "n" * 100})
    with pytest.raises(SpecError, match="name of 91 letters is too long; give one of at most 90"):
        JobSpec.checked({"instances": True, "name": "n" * 91})


@pytest.mark.parametrize("local", [{"workers": 2}, {"gpus": "all"}])
def test_workers_are_not_asked_for_where_the_cluster_has_its_own(local):
    """Told before anything is written, not when the store is there."""
    with pytest.raises(SpecError, match="has workers of its own; leave one of them out"):
        JobSpec.checked({"scheduler": "tcp://127.0.0.1:9", **local})


def test_a_job_has_one_part_at_least():
    with pytest.raises(SpecError, match="part 0/0: there is 1 share at least, 0/1"):
        JobSpec.checked({"part": "0/0"})
