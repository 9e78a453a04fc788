"""Long work says where it stands: to a person, and in lines of JSON to a program."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import tifffile
from click.testing import CliRunner
from PIL import Image

from tilepipe.cli import steps
from tilepipe.cli.main import main
from tilepipe.export import copy_store, write_csv, write_geojson, write_ome_tiff
from tilepipe.export.report import write_report
from tilepipe.infer import verify
from tilepipe.pipeline.events import Note
from tilepipe.pipeline.source import open_source
from tilepipe.pipeline.tissue import look_for_tissue
from tilepipe.spec import JobSpec
from tilepipe.store import open_store
from tilepipe.train.evaluate import evaluate, open_labels

RANDOM = ["--model", "unet", "--weights", "random:0", "--base", "4", "--no-tune", "--unit", "256"]


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    path = tmp_path_factory.mktemp("progress") / "noise.tif"
    pixels = np.random.default_rng(0).integers(0, 255, (600, 389, 3), dtype=np.uint8)
    tifffile.imwrite(path, pixels, tile=(128, 128), photometric="rgb")
    return path


@pytest.fixture(scope="module")
def finished(slide):
    out = slide.with_suffix(".zarr")
    done = CliRunner().invoke(
        main, ["run", str(slide), "-o", str(out), *RANDOM, "--instances", "--probabilities"]
    )
    assert done.exit_code == 0, done.output
    return out


@pytest.fixture
def at_once(monkeypatch):
    """Every piece of work is told."""
    monkeypatch.setattr(steps, "EVERY_S", 0.0)


def told_by(*arguments, code=0):
    """Run a command; its answer on stdout, and the lines of JSON on stderr."""
    result = CliRunner().invoke(main, [str(part) for part in arguments])
    assert result.exit_code == code, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("{")]
    return result.stdout, [json.loads(line) for line in lines], result.stderr


def steps_of(call):
    """What a call tells, by step: (done, total) as it came."""
    heard: dict[str, list[tuple[int, int]]] = {}
    call(lambda what, done, total: heard.setdefault(what, []).append((done, total)))
    for seen in heard.values():
        assert len({total for _, total in seen}) == 1
        assert all(0 < one < other for (one, _), (other, _) in pairwise(seen))
        assert seen[-1][0] == seen[-1][1]
    return {what: seen[-1][1] for what, seen in heard.items()}


def test_verify_tells_of_every_pixel_that_it_checks(finished):
    store = open_store(str(finished))
    px = {
        "image": sum(np.prod(store.image(k).shape) for k in range(store.n_levels)),
        "slide": 600 * 389,
    }
    found = steps_of(lambda tell: verify(str(finished), label="unet", samples=2, tell=tell))
    again = found.pop("computed again")
    assert again > 0
    assert found == {
        "label unet": px["image"],
        "probabilities of label unet": px["image"],
        "label unet-instances": px["image"],
        "image": px["image"],
        "the slide": px["slide"],
    }


def test_exports_tell_of_every_pixel_that_they_read(finished, tmp_path):
    store = open_store(str(finished))
    label, objects = store.label("unet"), store.label("unet-instances")
    level, area = label.level(0), 600 * 389
    levels_px = sum(int(np.prod(label.level(k).shape)) for k in range(label.n_levels))
    assert steps_of(
        lambda tell: write_csv(tmp_path / "a.csv", level, label.classes, tell=tell)
    ) == {"objects": area}
    assert steps_of(
        lambda tell: write_csv(tmp_path / "b.csv", objects.level(0), (), instances=True, tell=tell)
    ) == {"pieces of objects": area, "objects": area}
    assert steps_of(
        lambda tell: write_ome_tiff(tmp_path / "a.tif", store, label="unet", tell=tell)
    ) == {"levels": levels_px}
    copied = steps_of(lambda tell: copy_store(store, str(tmp_path / "copy.zarr"), tell=tell))
    assert copied == dict.fromkeys(
        ("image", "label unet", "probabilities of label unet", "label unet-instances"), levels_px
    )
    assert steps_of(
        lambda tell: write_report(tmp_path / "r.html", store, labels=["unet"], tell=tell)
    ) == {"objects": area}
    pytest.importorskip("rasterio")
    assert steps_of(
        lambda tell: write_geojson(tmp_path / "a.geojson", level, label.classes, tell=tell)
    ) == {"objects": area}


def test_evaluate_tells_how_much_it_has_compared(finished):
    mask = open_labels(str(finished), name="unet")
    assert steps_of(lambda tell: evaluate(mask, mask, box_px=256, tell=tell)) == {
        "compared": 600 * 389
    }


@pytest.mark.parametrize(
    "command",
    [
        ("verify", "{store}", "--label", "unet", "--samples", "1"),
        ("export", "{store}", "--to", "csv", "--label", "unet", "-o", "{out}.csv"),
        ("export", "{store}", "--to", "ome-zarr-0.4", "-o", "{out}.zarr"),
        ("report", "{store}", "-o", "{out}.html"),
        ("evaluate", "{store}", "{store}", "--label", "unet", "--truth-label", "unet"),
    ],
    ids=lambda command: "-".join(command[:4:3]).replace("{store}", ""),
)
def test_a_program_is_told_in_lines_of_json_and_quiet_is_quiet(
    finished, tmp_path, at_once, command
):
    out = tmp_path / "out"
    filled = [part.format(store=finished, out=out) for part in command]
    stdout, lines, _ = told_by(*filled, "--json")
    json.loads(stdout)
    assert lines
    for line in lines:
        assert line["event"] == "progress"
        assert line["name"] == str(finished)
        assert 0 < line["done_px"] <= line["total_px"]
        assert line["mpix_per_s"] > 0
        assert line["left_s"] >= 0
    again = [*filled, "--overwrite"] if command[0] in ("export", "report") else filled
    _, lines, stderr = told_by(*again)
    assert not lines
    assert "MPix/s" in stderr
    assert told_by(*again, "--quiet") == ("", [], "")
    stdout, lines, stderr = told_by(*again, "--quiet", "--json")
    json.loads(stdout)
    assert stderr == ""


def test_a_run_tells_a_program_where_it_stands(slide, tmp_path, at_once):
    out = tmp_path / "run.zarr"
    stdout, lines, _ = told_by("run", slide, "-o", out, *RANDOM, "--json")
    assert json.loads(stdout)["state"] == "done"
    assert lines
    done = {stage["name"]: (stage["done"], stage["total"]) for stage in lines[-1]["stages"]}
    assert done["ingest"] == done["segment"] == (6, 6)
    assert {"elapsed_s", "mpix_per_s", "left_s", "failed", "workers"} <= lines[-1].keys()
    out = tmp_path / "quiet.zarr"
    assert told_by("run", slide, "-o", out, *RANDOM, "--quiet") == ("", [], "")


def test_a_training_tells_where_it_stands(tmp_path, at_once):
    for part in ("img", "lab"):
        (tmp_path / part).mkdir()
    for index in range(3):
        pixels = np.zeros((48, 48), np.uint8)
        pixels[10:30, 8 + index : 25] = 1
        Image.fromarray(pixels * 150).save(tmp_path / "img" / f"{index}.png")
        Image.fromarray(pixels).save(tmp_path / "lab" / f"{index}.png")
    command = [
        "train", "--images", tmp_path / "img", "--labels", tmp_path / "lab",
        "-o", tmp_path / "w.safetensors", "--overwrite", "--steps", 3, "--base", 2,
        "--option", "depth=2", "--batch", 1, "--output-px", 24, "--device", "cpu",
        "--precision", "fp32",
    ]  # fmt: skip
    stdout, lines, _ = told_by(*command, "--json")
    json.loads(stdout)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[-1]["progress"] == 1.0
    assert lines[-1]["left_s"] == 0.0
    assert all(line["samples_per_s"] > 0 and line["loss"] is not None for line in lines)
    _, lines, stderr = told_by(*command)
    assert not lines
    assert "step 3, 100%" in stderr
    assert told_by(*command, "--quiet") == ("", [], "")


def test_a_terminal_shows_a_bar(finished):
    """On a pseudo-terminal, as a person has one."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "tilepipe", "export", finished, "--to", "csv", "--label", "unet",
         "-o", finished.with_name("bar.csv")],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # the other side is closed
            break
        if not piece:
            break
        shown += piece
    os.close(ours)
    assert process.wait() == 0
    text = shown.decode()
    assert "objects" in text
    assert "100 %" in text
    assert "MPix/s" in text


def test_the_pace_is_that_of_the_last_seconds():
    pace = steps.Pace(0.0)
    for second in range(1, 21):  # empty glass
        assert pace.of(float(second), 1000 * second) == 1000
    for second in range(21, 41):
        found = pace.of(float(second), 20_000 + 10 * (second - 20))
    assert found == pytest.approx(10, rel=0.2)
    assert steps.Pace(5.0).of(5.0, 0) == 0


def test_a_slide_without_a_coarse_level_is_read_for_tissue_and_that_is_said(
    slide, tmp_path, monkeypatch
):
    def notes():
        heard = []
        source = open_source(str(slide), str(tmp_path / "out.zarr"), JobSpec(tissue="auto"))
        find = look_for_tissue(source, JobSpec(tissue="auto"), heard.append)
        assert find is not None
        find()
        return [event.text for event in heard if isinstance(event, Note)]

    assert notes() == []
    monkeypatch.setattr("tilepipe.pipeline.tissue._MANY_PX", 600 * 389)
    (text,) = notes()
    assert "389 x 600 px" in text
