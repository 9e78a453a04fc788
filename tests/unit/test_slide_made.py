"""The slides that the demo and the benchmarks make: right size, real texture, deterministic."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tilepipe.slide import open_slide, tissue_mask
from tilepipe.tiling import Box

ROOT = Path(__file__).resolve().parents[2]


def load(path):
    found = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module
    found.loader.exec_module(module)
    return module


def whole(path):
    with open_slide(path) as slide:
        return slide.read(Box.of_shape(slide.levels[0].shape)), slide


def test_demo_slide(tmp_path):
    compose = load(ROOT / "workflows" / "demo" / "compose.py").compose
    nuclei = compose(tmp_path / "a.tif", 700, seed=3)
    assert nuclei > 100
    pixels, slide = whole(tmp_path / "a.tif")
    assert (pixels.shape, slide.rgb, slide.mpp) == ((3, 700, 700), True, (0.5, 0.5))
    with open_slide(tmp_path / "a.tif") as again:
        mask = tissue_mask(again)
    assert mask is not None
    assert 0.2 < mask.share < 0.8
    assert pixels.std() > 20
    compose(tmp_path / "b.tif", 700, seed=3)
    assert (tmp_path / "a.tif").read_bytes() == (tmp_path / "b.tif").read_bytes()
    compose(tmp_path / "b.tif", 700, seed=4)
    assert (tmp_path / "a.tif").read_bytes() != (tmp_path / "b.tif").read_bytes()


def test_blocks_of_the_demo_fit_together():
    tissue = load(ROOT / "workflows" / "demo" / "compose.py").Tissue(600, seed=0)
    large = tissue.block(100, 100, 200).astype(int)
    small = tissue.block(200, 200, 100).astype(int)
    # Only the sensor noise differs.
    assert np.abs(large[100:, 100:] - small).mean() < 4


@pytest.mark.parametrize("codec", ["jpeg", "deflate"])
def test_made_slide(tmp_path, codec):
    make = load(ROOT / "benchmarks" / "make_slide.py")
    path = tmp_path / "a.tif"
    make.make_slide(path, (1500, 2111), codec=codec, tile=240, glass=0.5, mpp=0.25, data=tmp_path)
    pixels, slide = whole(path)
    assert pixels.shape == (3, 1500, 2111)
    assert slide.levels[0].tile == (240, 240)
    assert slide.mpp == (0.25, 0.25)
    mosaic = make.plan_mosaic((1500, 2111), 0.5, 0, tmp_path)
    for box in Box(0, 0, 1500, 2111).split((1024, 1024)):
        spread = pixels[(slice(None), *box.slices)].std()
        assert (spread < 3) == mosaic.is_glass[box.y0 // 1024, box.x0 // 1024]


def test_share_of_glass():
    make = load(ROOT / "benchmarks" / "make_slide.py")
    for share in (0.0, 0.3, 0.7, 1.0):
        mosaic = make.plan_mosaic((32768, 32768), share, 0)
        assert mosaic.is_glass.mean() == pytest.approx(share, abs=0.001)


def test_command_line(tmp_path):
    path = tmp_path / "a.tif"
    command = [sys.executable, str(ROOT / "benchmarks" / "make_slide.py"), str(path)]
    ended = subprocess.run(
        [*command, "--side", "700", "--width", "500", "--glass", "0.2"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "700 x 500 px" in ended.stdout
    assert whole(path)[0].shape == (3, 700, 500)
    ended = subprocess.run([*command, "--glass", "2"], capture_output=True, text=True)
    assert ended.returncode == 2


PEAK_KB = """
import re
from pathlib import Path
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""
"""Of the process itself: ru_maxrss begins with the peak of the one it was forked from."""


def peak_kb(code, *arguments):
    """Peak memory of a Python process that runs ``code``."""
    command = [sys.executable, "-c", code + PEAK_KB, *map(str, arguments)]
    ended = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(ended.stdout.split()[-1])


@pytest.mark.slow
def test_memory_does_not_grow_with_the_side(tmp_path):
    path = tmp_path / "a.tif"
    make = (
        "import runpy, sys\n"
        "sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit: pass\n"
    )
    script = ROOT / "benchmarks" / "make_slide.py"
    assert peak_kb(make, script, path, "--side", "16384") < 600_000
    read = (
        "import sys; from tilepipe.slide import open_slide, tissue_mask\n"
        "from tilepipe.tiling import Box\n"
        "s = open_slide(sys.argv[1])\n"
        "for b in Box.of_shape(s.levels[0].shape).split((2048, 2048)): s.read(b)\n"
        "tissue_mask(s)\n"
    )
    assert peak_kb(read, path) < 600_000
