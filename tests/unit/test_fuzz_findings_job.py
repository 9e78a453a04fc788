"""What fuzzing found in job files and manifests, held for good."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from tilepipe.cli.main import main
from tilepipe.errors import CheckpointError, SpecError
from tilepipe.models import read_header
from tilepipe.spec import JobSpec
from tilepipe.train.spec import TrainSpec


@pytest.mark.parametrize("key", ["model", "weights", "tissue", "scheduler"])
@pytest.mark.parametrize("value", ["a\\u0000b", "x" * 300, "y/" * 3000])
def test_a_name_that_no_file_can_have_is_a_wrong_setting(tmp_path, key, value):
    job = tmp_path / "job.toml"
    job.write_text(f'{key} = "{value}"\n')
    with pytest.raises(SpecError, match=rf"{key}: .*no file can have such a name"):
        JobSpec.from_toml(job)


@pytest.mark.parametrize("value", ["nan", "[1, inf]", "1979-05-27"])
def test_options_that_no_record_can_hold_are_wrong(tmp_path, value):
    job = tmp_path / "job.toml"
    job.write_text(f"[options]\ndepth = {value}\n")
    with pytest.raises(SpecError, match="options are finite numbers, words and lists"):
        JobSpec.from_toml(job)


@pytest.mark.parametrize("key", ["images", "labels", "out"])
def test_a_training_file_with_an_impossible_name_is_refused(tmp_path, key):
    job = tmp_path / "job.toml"
    job.write_text(f'{key} = "a\\u0000b"\n')
    with pytest.raises(SpecError, match=f"{key}: no file can have such a name"):
        TrainSpec.from_toml(job)


def test_the_message_about_a_broken_weights_file_is_short(tmp_path):
    head = json.dumps({"a": {"dtype": "y" * 5000, "shape": [1], "data_offsets": [0, 4]}}).encode()
    path = tmp_path / "w.safetensors"
    path.write_bytes(len(head).to_bytes(8, "little") + head + bytes(4))
    with pytest.raises(CheckpointError, match="not a safetensors file") as caught:
        read_header(path)
    assert len(str(caught.value)) < 1000


def test_what_is_wrong_with_settings_is_said_shortly():
    with pytest.raises(SpecError) as caught:
        JobSpec.checked({"k" * 5000: 1, "part": "1/" + "9" * 4000, "name": "n" * 5000})
    assert len(str(caught.value)) < 2000


def test_a_manifest_with_a_null_byte_is_refused(tmp_path):
    manifest = tmp_path / "m.csv"
    manifest.write_bytes(b"slide,output,mpp,label\na.tif,a\0.zarr,,\n")
    result = CliRunner().invoke(main, ["run", "--manifest", str(manifest), "-o", str(tmp_path)])
    assert result.exit_code == 1
    assert "m.csv: holds a null byte" in result.output


@pytest.mark.parametrize("command", ["run", "ingest", "inspect", "view", "verify", "finish"])
def test_a_path_too_long_for_the_file_system_is_one_clear_error(command):
    result = CliRunner().invoke(main, [command, "x" * 300])
    assert result.exit_code == 1, result.output
    assert result.output.startswith("Error: ")
    assert "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit)
