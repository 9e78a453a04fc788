"""What fuzzing found in job files and manifests, held for good."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from tilepipe.cli.main import main
from tilepipe.errors import SpecError
from tilepipe.spec import JobSpec


@pytest.mark.parametrize("key", ["model", "weights", "tissue", "scheduler"])
@pytest.mark.parametrize("value", ["a\\u0000b", "x" * 300, "y/" * 3000])
def test_a_name_that_no_file_can_have_is_a_wrong_setting(tmp_path, key, value):
    job = tmp_path / "job.toml"
    job.write_text(f'{key} = "{value}"\n')
    with pytest.raises(SpecError, match=rf"{key}: .*no file can have such a name"):
        JobSpec.from_toml(job)


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
