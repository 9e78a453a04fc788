"""``tilepipe export``, ``report`` and ``view`` from the command line."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
import tifffile
from click.testing import CliRunner

from tilepipe.cli.main import main
from tilepipe.spec import LabelClass, default_classes
from tilepipe.store import create_store, open_store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "slide.zarr"
    made = create_store(
        str(path),
        channels=1,
        dtype="uint8",
        extent=(300, 400),
        mpp=(0.5, 0.5),
        channel_names=("grey",),
        channel_colors=(None,),
        rgb=False,
        unit_px=512,
    )
    made.image(0).write_unit(
        made.image(0).grid.unit(0, 0), np.arange(120000, dtype=np.uint8).reshape(1, 300, 400)
    )
    mask = np.zeros((300, 400), dtype=np.uint8)
    mask[10:20, 10:30] = 1
    mask[200:260, 100:200] = 2
    for name in ("one", "two"):
        label = made.create_label(name, classes=default_classes(3), unit_px=512)
        label.write_record({"state": "done"})
        level = label.level(0)
        level.write_unit(level.grid.unit(0, 0), mask)
    return path


def run(*arguments):
    return CliRunner().invoke(main, [str(part) for part in arguments])


@pytest.mark.parametrize(
    ("form", "suffix", "told"),
    [
        ("geojson", ".geojson", {"features": 2}),
        ("csv", ".csv", {"objects": 2}),
        ("ome-tiff", ".ome.tif", {"levels": 1}),
        ("png", ".png", {"height_px": 300, "width_px": 400}),
        ("ome-zarr-0.4", "-0.4.zarr", {"write_units": 2}),
    ],
)
def test_every_form(store, form, suffix, told):
    if form == "geojson":
        pytest.importorskip("rasterio")
    answer = run("export", store, "--to", form, "--label", "one", "--json")
    assert answer.exit_code == 0, answer.output
    facts = json.loads(answer.output)
    assert facts["output"] == str(store).removesuffix(".zarr") + suffix
    assert os.path.exists(facts["output"])
    assert told.items() <= facts.items()
    again = run("export", store, "--to", form, "--label", "one")
    assert again.exit_code == 1
    assert "overwrite" in again.output
    assert run("export", store, "--to", form, "--label", "one", "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    ("form", "given", "text"),
    [
        (
            "geojson",
            ["--region", "0,0,9,9"],
            "--region is for --to png; leave it out of --to geojson",
        ),
        ("png", ["--image"], "--image is for --to ome-tiff;"),
        ("ome-tiff", ["--classes", "1"], "--classes is for --to geojson and --to csv;"),
        ("csv", ["--simplify", "0"], "--simplify is for --to geojson;"),
        ("ome-zarr-0.4", ["--size", "100"], "--size is for --to png;"),
    ],
)
def test_an_option_of_another_form_is_not_left_alone(store, tmp_path, form, given, text):
    """Who asks for a region gets no file of everything instead."""
    out = tmp_path / "out"
    answer = run("export", store, "--to", form, "--label", "one", "-o", out, *given)
    assert answer.exit_code == 2
    assert text in answer.output
    assert not out.exists()


def test_classes_by_name_or_id(store, tmp_path):
    out = tmp_path / "two.csv"
    answer = run(
        "export", store, "--to", "csv", "--label", "one", "--classes", "class 2", "-o", out
    )
    assert answer.exit_code == 0
    assert answer.output.startswith(f"{out}: 1 objects")
    for name in ("tumor", "3", "1,9"):
        wrong = run("export", store, "--to", "csv", "--label", "one", "--classes", name, "-o", out)
        assert wrong.exit_code == 1
        assert f"no class '{name[-1] if ',' in name else name}'" in wrong.output
        assert "there are: 0 background, 1 class 1, 2 class 2" in wrong.output


def test_classes_whose_names_have_commas(store, tmp_path):
    own = shutil.copytree(store, tmp_path / "own.zarr")
    opened = open_store(str(own), writable=True)
    names = ("outside", "tumor, benign", "tumor", "benign")
    classes = [
        LabelClass(name=name, color=one.color)
        for name, one in zip(names, default_classes(4), strict=True)
    ]
    label = opened.create_label("commas", classes=classes, unit_px=512)
    label.write_record({"state": "done"})
    mask = np.zeros((300, 400), dtype=np.uint8)
    mask[10:20, 10:30], mask[50:60, 10:30], mask[90:99, 10:30] = 1, 2, 3
    label.level(0).write_unit(label.level(0).grid.unit(0, 0), mask)
    out = tmp_path / "commas.csv"

    def kept(*classes):
        given = [part for one in classes for part in ("--classes", one)]
        answer = run(
            "export", own, "--to", "csv", "--label", "commas", "-o", out, "--overwrite", *given
        )
        assert answer.exit_code == 0, answer.output
        with out.open(newline="") as file:
            return {row["class"] for row in csv.DictReader(file)}

    assert kept("tumor, benign") == {"tumor, benign"}
    assert kept("tumor", "benign") == kept("tumor,benign") == {"tumor", "benign"}
    assert kept("tumor, benign", "3") == {"tumor, benign", "benign"}
    assert kept() == set(names[1:])


def test_a_name_of_several_classes_keeps_them_all(store, tmp_path):
    own = tmp_path / "own.zarr"
    shutil.copytree(store, own)
    background, *cells = default_classes(3)
    classes = [background, *(LabelClass(name="cell", color=one.color) for one in cells)]
    opened = open_store(str(own), writable=True)
    label = opened.create_label("twice", classes=classes, unit_px=512)
    mask = np.zeros((300, 400), dtype=np.uint8)
    mask[10:20, 10:20], mask[30:40, 10:20] = 1, 2
    label.level(0).write_unit(label.level(0).grid.unit(0, 0), mask)
    out = tmp_path / "cells.csv"
    answer = run("export", own, "--to", "csv", "--label", "twice", "-o", out, "--classes", "cell")
    assert answer.exit_code == 0, answer.output
    assert [row["class_id"] for row in csv.DictReader(out.open())] == ["1", "2"]


def test_objects_are_kept_by_their_numbers(store, tmp_path):
    own = shutil.copytree(store, tmp_path / "own.zarr")
    opened = open_store(str(own), writable=True)
    label = opened.create_label("many", classes=default_classes(2), unit_px=512, dtype="int32")
    label.write_record({"state": "done"})
    mask = np.zeros((300, 400), dtype=np.int32)
    mask[10:20, 10:30], mask[50:60, 10:30], mask[90:99, 10:30] = 1, 2, 7
    level = label.level(0)
    level.write_unit(level.grid.unit(0, 0), mask)
    out = tmp_path / "objects.csv"
    arguments = ["export", own, "--to", "csv", "--label", "many", "-o", out, "--classes"]
    kept = run(*arguments, "2, 7")
    assert kept.output.startswith(f"{out}: 2 objects")
    for wrong in ("class 1", "0", "background"):
        answer = run(*arguments, wrong, "--overwrite")
        assert answer.exit_code == 1
        assert f"many: holds objects, and '{wrong}' is the number of none" in answer.output


def test_a_region_as_picture(store, tmp_path):
    out = tmp_path / "part.png"
    arguments = ["export", store, "--to", "png", "--label", "one", "-o", out, "--region"]
    assert run(*arguments, "0,0,50,60").exit_code == 0
    from PIL import Image

    assert Image.open(out).size == (60, 50)
    for bad in ("0,0,50", "a,b,c,d", "50,0,0,60", "0,0,999,999"):
        answer = run(*arguments, bad, "--overwrite")
        assert answer.exit_code == 1
        assert "Y0,X0,Y1,X1" in answer.output


def test_an_opacity_that_is_no_number(store, tmp_path):
    out = tmp_path / "part.png"
    answer = run("export", store, "--to", "png", "--label", "one", "-o", out, "--opacity", "nan")
    assert answer.exit_code == 1
    assert "opacity nan" in answer.output
    assert not out.exists()


def test_several_labels_need_a_name(store):
    answer = run("export", store, "--to", "csv")
    assert answer.exit_code == 1
    assert "say which label with --label; there are: one, two" in answer.output


def test_report(store, tmp_path):
    out = tmp_path / "report.html"
    answer = run("report", store, "-o", out)
    assert answer.exit_code == 0
    assert answer.output == f"{out}: one, two\n"
    assert out.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("command", ["export", "report", "view"])
def test_what_is_no_store(command, tmp_path):
    extra = ["--to", "csv"] if command == "export" else []
    answer = run(command, tmp_path / "nothing.zarr", *extra)
    assert answer.exit_code == 1
    assert "nothing.zarr" in answer.output
    assert "Traceback" not in answer.output


def test_view_serves_until_it_is_ended(store):
    process = subprocess.Popen(
        [sys.executable, "-m", "tilepipe", "view", str(store), "--no-browser", "--json"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        url = json.loads(process.stdout.readline())["url"]
        with urllib.request.urlopen(url + "api/describe", timeout=20) as answer:
            assert json.load(answer)[0]["name"] == "slide.zarr"
    finally:
        process.terminate()
        process.wait(timeout=20)
        process.stdout.close()


def test_a_browser_that_is_waited_for_is_answered(store, tmp_path):
    """As those in a terminal are, where nothing else is installed."""
    browser = tmp_path / "browser.py"
    browser.write_text(
        "import sys, urllib.request\n"
        "page = urllib.request.urlopen(sys.argv[1], timeout=10).read()\n"
        "open(sys.argv[2], 'wb').write(page)\n"
    )
    seen = tmp_path / "page.html"
    process = subprocess.Popen(
        [sys.executable, "-m", "tilepipe", "view", str(store), "--quiet"],
        env={**os.environ, "BROWSER": f"{sys.executable} {browser} %s {seen}"},
        stderr=subprocess.DEVNULL,
    )
    try:
        end = time.monotonic() + 60
        while not (seen.is_file() and seen.stat().st_size):
            assert time.monotonic() < end
            assert process.poll() is None
            time.sleep(0.05)
    finally:
        process.terminate()
        process.wait(timeout=20)
    assert b"<title>tilepipe</title>" in seen.read_bytes()


@pytest.mark.parametrize(
    "command",
    [
        ["export", "--to", "csv", "--label", "one"],
        ["export", "--to", "png", "--label", "one"],
        ["export", "--to", "ome-tiff", "--image"],
        ["report"],
    ],
)
@pytest.mark.parametrize("target", ["slide.zarr/zarr.json", "slide.ome.tif"])
def test_no_export_replaces_a_file_of_its_store_or_its_slide(store, tmp_path, command, target):
    copy = tmp_path / "slide.zarr"
    shutil.copytree(store, copy)
    slide = tmp_path / "slide.ome.tif"
    slide.write_bytes(b"the only one")
    open_store(str(copy), writable=True).write_record({"source": {"path": str(slide)}})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    result = run(command[0], copy, *command[1:], "-o", tmp_path / target, "--overwrite")
    assert result.exit_code == 1
    assert "name another --output" in result.output
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_inspect_tells_both_sides_of_a_pixel_that_is_no_square(tmp_path):
    sides = {"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.25}
    image = np.zeros((40, 50), np.uint8)
    tifffile.imwrite(tmp_path / "flat.ome.tif", image, ome=True, metadata={"axes": "YX", **sides})
    told = run("inspect", tmp_path / "flat.ome.tif").output
    assert told.count("0.5 x 0.25 µm/px") == 2
