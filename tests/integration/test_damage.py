"""``--on-damage fill``: what was filled is counted and recorded, whatever becomes of the units."""

from __future__ import annotations

import errno
import json
import subprocess
import sys

import pytest
import tifffile
from click.testing import CliRunner

from tilepipe.cli.main import main
from tilepipe.pipeline.run import Request, run_one
from tilepipe.spec import JobSpec
from tilepipe.store.level import Level

RANDOM = ["--model", "unet", "--weights", "random:0", "--base", "4", "--no-tune"]


def tilepipe(*args):
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout) if "--json" in args else result.output


@pytest.fixture
def hurt(make_slide, tmp_path):
    """A slide of 80 tiles of which 30, in the middle, hold zeros."""
    path = make_slide(tmp_path / "hurt.tif")
    raw = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as tif:
        page = tif.pages[0]
        for index in range(25, 55):
            offset, count = page.dataoffsets[index], page.databytecounts[index]
            raw[offset : offset + count] = bytes(count)
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("how", [["--unit", "1024"], ["--unit", "96"], ["--in-place"]])
def test_every_filled_tile_is_counted(hurt, tmp_path, how):
    """However many there are, and whoever reads the slide: what copies it, or the mask's units."""
    out = tmp_path / "out.zarr"
    facts = tilepipe("run", hurt, "-o", out, *RANDOM, "--on-damage", "fill", *how, "--json")
    assert (facts["state"], facts["damaged_tiles"]) == ("done", 30)
    told = tilepipe("inspect", out, "--json")
    holds = told["labels"]["unet"] if "--in-place" in how else told["image"]
    assert holds["n_damaged"] == 30
    assert 20 <= len(holds["damaged"]) <= 30
    assert "damaged: DamagedTile(level=0, index=25" in tilepipe("inspect", out)


def test_what_was_filled_when_the_image_was_copied_is_told_of_each_mask(hurt, tmp_path):
    out = tmp_path / "out.zarr"
    facts = tilepipe("ingest", hurt, "-o", out, "--on-damage", "fill", "--json")
    assert facts["damaged_tiles"] == 30
    again = ["run", hurt, "-o", out, *RANDOM, "--on-damage", "fill", "--json"]
    for command in (
        again,
        again,
        [*again, "--name", "b"],
        ["run", out, *RANDOM, "--name", "c", "--json"],
    ):
        assert tilepipe(*command)["damaged_tiles"] == 30
    told = tilepipe("run", out, *RANDOM, "--name", "d")
    assert "30 damaged tiles of the slide were filled" in told


@pytest.mark.parametrize("number", range(2))
def test_a_job_that_ends_before_its_network_is_built_ends_in_order(make_slide, tmp_path, number):
    """The thread that builds it was cut off in C++, and the command ended with SIGABRT."""
    path = make_slide(tmp_path / "ruined.tif", shape=(300, 200))
    raw = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as tif:
        for offset, count in zip(
            tif.pages[0].dataoffsets, tif.pages[0].databytecounts, strict=True
        ):
            raw[offset : offset + count] = bytes(count)
    path.write_bytes(raw)
    command = ["run", path, "-o", tmp_path / f"{number}.zarr", *RANDOM, "--base", "16", "--quiet"]
    done = subprocess.run(
        [sys.executable, "-m", "tilepipe", *map(str, command)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith(f"Error: {path}: ")
    assert "terminate" not in done.stderr


def test_what_was_filled_is_told_of_when_its_unit_is_tried_again(hurt, tmp_path, monkeypatch):
    write, failed = Level.write_unit, []

    def fails_once(level, unit, pixels):
        if not failed:
            failed.append(unit)
            raise OSError(errno.EIO, "once")
        return write(level, unit, pixels)

    monkeypatch.setattr(Level, "write_unit", fails_once)
    out = str(tmp_path / "out.zarr")
    result = run_one(Request(str(hurt), out, JobSpec(on_damage="fill", unit=1024)), segment=False)
    assert failed
    assert result.summary["damaged_tiles"] == 30
