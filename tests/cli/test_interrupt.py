"""An interruption ends every command alike: one line, exit code 130, nothing left behind."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import time

import numpy as np
import pytest
import tifffile
from PIL import Image

INTERRUPTIONS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


def heard():
    """Hear what the tests themselves may have been started deaf to."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture
def start(tmp_path):
    """Start ``tilepipe`` with a temporary folder of its own; wait for a first line on a stream."""

    def call(stream, *arguments):
        scratch = tmp_path / "scratch"
        scratch.mkdir(exist_ok=True)
        process = subprocess.Popen(
            [sys.executable, "-m", "tilepipe", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(scratch)},
            preexec_fn=heard,
        )
        assert getattr(process, stream).readline()
        return process, scratch

    return call


@pytest.mark.parametrize("number", INTERRUPTIONS)
def test_bench_leaves_no_slide_behind(start, number):
    process, scratch = start(
        "stderr", "bench", "--size", 2048, "--base", 4, "--no-tune", "--precision", "fp32"
    )
    assert list(scratch.iterdir())
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "Interrupted."
    assert "Traceback" not in out + err
    assert not list(scratch.glob("tilepipe-bench-*"))


@pytest.mark.parametrize("number", INTERRUPTIONS)
def test_train_says_how_it_goes_on(start, tmp_path, number):
    for part in ("img", "lab"):
        (tmp_path / part).mkdir()
        for index in range(2):
            pixels = np.full((40, 40), index, np.uint8)
            pixels[:20] = 1 - index
            Image.fromarray(pixels).save(tmp_path / part / f"{index}.png")
    process, _ = start(
        "stdout", "train", "--images", tmp_path / "img", "--labels", tmp_path / "lab",
        "-o", tmp_path / "w.safetensors", "--minutes", 9, "--base", 2, "--option", "depth=2",
        "--batch", 1, "--output-px", 24, "--precision", "fp32", "--device", "cpu",
        "--val-share", 0,
    )  # fmt: skip
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "With --resume (not --overwrite) the same command goes on" in err
    assert "Traceback" not in out + err


def test_worker_processes_leave_ctrl_c_to_the_one_that_started_them(tmp_path):
    """A terminal sends it to all of them."""
    slide, out = tmp_path / "slide.tif", tmp_path / "out.zarr"
    pixels = np.random.default_rng(0).integers(0, 256, (2048, 2048, 3)).astype(np.uint8)
    tifffile.imwrite(slide, pixels, tile=(256, 256), photometric="rgb")
    process = subprocess.Popen(
        [
            sys.executable, "-m", "tilepipe", "run", slide, "-o", out, "--weights", "random:0",
            "--base", "16", "--unit", "256", "--no-tune", "--precision", "fp32", "--workers", "2",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    while not list(out.glob("tilepipe/journal/unet/segment/0/*.json")):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Interrupted. What was written is kept" in err
    assert "Traceback" not in err


def test_a_terminal_that_closes_ends_a_run_in_good_order(tmp_path):
    """What would be said there has nobody to hear it, and is no error of its own."""
    slide, out = tmp_path / "slide.tif", tmp_path / "out.zarr"
    pixels = np.random.default_rng(0).integers(0, 256, (2048, 2048, 3)).astype(np.uint8)
    tifffile.imwrite(slide, pixels, tile=(256, 256), photometric="rgb")
    terminal, end = pty.openpty()

    def owned():
        """Be the session that the terminal tells of its end."""
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        heard()

    process = subprocess.Popen(
        [
            sys.executable, "-m", "tilepipe", "run", slide, "-o", out, "--weights", "random:0",
            "--base", "16", "--unit", "256", "--no-tune", "--precision", "fp32",
        ],
        stdin=end,
        stdout=end,
        stderr=end,
        preexec_fn=owned,
    )  # fmt: skip
    os.close(end)
    while not list(out.glob("tilepipe/journal/unet/segment/0/*.json")):
        assert process.poll() is None
        os.read(terminal, 1 << 16)
    os.close(terminal)
    assert process.wait(timeout=60) == 130


@pytest.mark.parametrize("number", INTERRUPTIONS)
def test_what_a_library_makes_of_an_interruption_is_no_bug(number):
    code = f"""
import os, time
import tilepipe.cli.main as room

def load(name):
    try:
        os.kill(os.getpid(), {int(number)})
        time.sleep(60)
    except KeyboardInterrupt:
        raise RuntimeError("Error building a validator: KeyboardInterrupt")

room.importlib.import_module = load
room.main(["run", "slide.tif"])
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, capture_output=True, text=True, preexec_fn=heard, check=False, timeout=60
    )
    assert done.returncode == 130, done.stderr
    assert done.stderr == "Interrupted.\n"
