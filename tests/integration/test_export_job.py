"""Figures of a real job: report, inspect, exports and the viewer tell the same."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from click.testing import CliRunner

from tilepipe.cli.main import main
from tilepipe.export import Result
from tilepipe.view.cache import ByteLRU
from tilepipe.view.source import Source

RUN = [
    "--model", "unet", "--weights", "random:1", "--base", "4", "--classes", "3",
    "--device", "cpu", "--precision", "fp32", "--backend", "torch", "--workers", "1", "--no-tune",
]  # fmt: skip


def write_slide(path, side):
    import tifffile

    rng = np.random.default_rng(0)
    small = rng.integers(0, 255, (-(-side // 16), -(-side // 16), 3), dtype=np.uint8)
    pixels = np.kron(small, np.ones((16, 16, 1), dtype=np.uint8))[:side, :side]
    tifffile.imwrite(
        path,
        np.ascontiguousarray(pixels),
        photometric="rgb",
        tile=(128, 128),
        resolution=(20000, 20000),
        resolutionunit="CENTIMETER",
    )


@pytest.mark.slow
def test_the_report_says_what_inspect_says(tmp_path):
    slide, store = tmp_path / "slide.tif", tmp_path / "slide.zarr"
    write_slide(slide, 300)
    runner = CliRunner()
    ran = runner.invoke(main, ["run", str(slide), "-o", str(store), *RUN, "--unit", "256", "-q"])
    assert ran.exit_code == 0, ran.output
    inspected = json.loads(runner.invoke(main, ["inspect", str(store), "--json"]).output)
    page = tmp_path / "report.html"
    reported = runner.invoke(main, ["report", str(store), "-o", str(page), "--json"])
    (known,) = json.loads(reported.output)["labels"]
    label = inspected["labels"]["unet"]
    rows = re.findall(r'<tr data-value="(\d+)" data-px="(\d+)">', page.read_text())
    names = [one["name"] for one in known["classes"]]
    in_page = {names[int(value)]: int(px) for value, px in rows}
    assert in_page == label["class_px"]
    assert {one["name"]: one["px"] for one in known["classes"]} == label["class_px"]
    for key in ("plan", "model", "settings", "account", "versions", "state"):
        assert known[key] == label[key], key
    result = Result(store, "unet")
    counts = np.bincount(np.asarray(result.labels).reshape(-1), minlength=3)
    assert counts.tolist() == list(label["class_px"].values())


@pytest.mark.slow
def test_a_job_in_another_process_is_seen_as_it_goes(tmp_path):
    slide, store = tmp_path / "slide.tif", tmp_path / "slide.zarr"
    write_slide(slide, 1536)
    job = subprocess.Popen(
        [sys.executable, "-m", "tilepipe", "run", str(slide), "-o", str(store), *RUN]
        + ["--unit", "256", "-q"]
    )
    source, seen = None, []
    try:
        while job.poll() is None:
            time.sleep(0.1)
            if source is None:
                try:
                    source = Source(str(store), ByteLRU(32 << 20))
                except OSError:
                    continue  # the store is still being created
            told = source.progress(0)
            if told["labels"] and told["labels"][0]["done_units"] is not None:
                done = {tuple(unit) for unit in told["labels"][0]["done_units"]}
                pyramid = source.labels[0].pyramid
                grid = pyramid.levels[0].grid
                shown = {
                    key: pyramid.read(0, grid.unit(*key).box).copy() for key in sorted(done)[:6]
                }
                seen.append((done, shown))
    finally:
        job.kill() if job.poll() is None else None
        job.wait()
    assert job.returncode == 0
    partial = [one for one in seen if 0 < len(one[0]) < 36]
    assert partial, "units were seen before the job ended"
    final = np.asarray(Result(store, "unet").labels)
    grid = source.labels[0].pyramid.levels[0].grid
    for _, shown in seen:
        for key, pixels in shown.items():
            assert np.array_equal(pixels, final[grid.unit(*key).box.slices]), "never torn"
