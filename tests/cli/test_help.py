"""Every command has help, loads nothing heavy for it, and stands in the README."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from PIL import Image

from tilepipe.cli.main import COMMANDS, main

README = Path(__file__).resolve().parents[2] / "README.md"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_help_and_is_in_the_readme(name):
    result = CliRunner().invoke(main, [name, "--help"])
    assert result.exit_code == 0, result.output
    assert "Usage: " in result.output
    assert "\\b" not in result.output
    assert f"tilepipe {name}" in README.read_text()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained(name):
    command = main.get_command(click.Context(main), name)
    options = [one for one in command.params if isinstance(one, click.Option)]
    assert options
    assert [one.opts for one in options if not one.help] == []


@pytest.mark.parametrize("name", ["run", "train"])
def test_many_options_stand_under_headings(name):
    command = main.get_command(click.Context(main), name)
    told = CliRunner().invoke(main, [name, "--help"], terminal_width=200).output
    assert [told.count(f"\n{heading}:\n") for heading in command.sections] == [1] * len(
        command.sections
    )
    for option in command.params:
        if isinstance(option, click.Option):
            longest = max(option.opts, key=len)
            assert len(re.findall(rf"^  (-\w, )?{longest}\b(?!-)", told, re.MULTILINE)) == 1
    others = re.findall(r"^  (?:-\w, )?--([\w-]+)", told.split("\nOther:\n")[1], re.MULTILINE)
    assert others == ["json", "quiet", "debug", "help"]


def test_help_lists_every_command():
    result = CliRunner().invoke(main, ["--help"])
    assert all(name in result.output for name in COMMANDS)


def test_help_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from tilepipe.cli.main import main, COMMANDS\n"
        "import importlib\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'dask', 'distributed', 'zarr', 'tifffile', 'numpy', 'rich'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "for module, _ in COMMANDS.values(): importlib.import_module(module)\n"
        "heavy = {'torch', 'dask', 'distributed', 'zarr'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_wrong_usage_exits_with_2():
    assert CliRunner().invoke(main, ["run", "--nonsense"]).exit_code == 2
    assert CliRunner().invoke(main, ["fly"]).exit_code == 2


def test_a_misspelt_command_is_told_what_is_like_it():
    result = CliRunner().invoke(main, ["--", "ingset", "s.tif"])
    assert result.exit_code == 2
    assert "No such command 'ingset'. Did you mean ingest or inspect?" in result.output
    assert "Did you mean" not in CliRunner().invoke(main, ["xyzzy"]).output


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
def test_a_full_disk_under_stdout_is_one_message(tmp_path, unbuffered):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    Image.new("L", (64, 64)).save(tmp_path / "s.tif")
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "tilepipe", "inspect", str(tmp_path / "s.tif"), "--json"],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )  # fmt: skip
    assert result.returncode == 1
    assert result.stderr == "Error: No space left on device\n"


@pytest.mark.parametrize("command", ["run /s.tif -o /s.zarr", "inspect s.tif", "models"])
def test_a_current_folder_that_was_removed_is_told(tmp_path, command):
    gone = tmp_path / "gone"
    gone.mkdir()
    script = f'rmdir ../gone && exec "$@" {command}'
    result = subprocess.run(
        ["sh", "-c", script, "sh", sys.executable, "-m", "tilepipe"],
        cwd=gone, env={**os.environ, "PYTHONPATH": str(README.parent)},
        stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 1
    assert "Error: the current folder cannot be found" in result.stderr


def test_a_configuration_of_dask_that_is_broken_is_told(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "s.tif")
    (tmp_path / "dask.yaml").write_text("distributed: [1, 2\n")
    result = subprocess.run(
        [sys.executable, "-m", "tilepipe", "ingest", "s.tif", "-o", "s.zarr"],
        cwd=tmp_path, env={**os.environ, "DASK_CONFIG": str(tmp_path)},
        stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 1
    assert "Error: Dask cannot read its configuration: " in result.stderr
    assert f"{tmp_path}/dask.yaml" in result.stderr


@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", "2>&-"])
def test_closed_streams_change_nothing(tmp_path, closed):
    """Started by what gives it no stderr, every run failed before it had begun."""
    Image.new("RGB", (64, 64)).save(tmp_path / "s.tif")
    command = [sys.executable, "-m", "tilepipe", "ingest", "s.tif", "-o"]
    for output, code in (("s.zarr", 0), ("s.tif", 1)):
        done = subprocess.run(
            ["sh", "-c", f'exec "$@" {closed}', "sh", *command, output], cwd=tmp_path, check=False
        )
        assert done.returncode == code
    assert (tmp_path / "s.zarr").is_dir()
