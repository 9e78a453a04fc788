"""Every file of the real corpora: tifffile's pixels, or one clear message; fast and small.

``corpus_outcomes.json`` holds the outcome of each malformed and variant file: ``ok``, or a part of
the message. A file that is not in the table must still end in pixels or one SlideError.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile

from tilepipe.slide import open_slide
from tilepipe.tiling import Box

HERE = Path(__file__).parent
OUTCOMES = json.loads((HERE / "corpus_outcomes.json").read_text())
FOLDERS = ["malformed", "tiff_variants", "ome_imagej", "geotiff", "wsi"]
NOT_IMAGES = {".md", ".txt", ".xml", ".json", ".license"}
LIMIT_KB = 1_000_000
LIMIT_S = 20
LARGE_PX = dict.fromkeys(FOLDERS, 4000000.0) | {"tiff_variants": 9e6, "wsi": 7e6}


def files_of(folder):
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and path.suffix.lower() not in NOT_IMAGES
    )


@pytest.fixture(scope="module")
def results(data):
    """What became of each file: path below the data folder -> record of corpus_reader."""
    paths = [path for folder in FOLDERS for path in files_of(data / folder)]
    ended = subprocess.run(
        [sys.executable, str(HERE / "corpus_reader.py")],
        input="\n".join(map(str, paths)) + "\n",
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    # Nothing but the records: no warning of a library reaches the user.
    assert ended.stderr == ""
    records = [json.loads(line) for line in ended.stdout.splitlines()]
    assert len(records) == len(paths)
    return {str(Path(record["path"]).relative_to(data)): record for record in records}


def test_only_slide_errors_and_each_names_its_file(results):
    for name, record in results.items():
        assert record["error"] in ("", "SlideError", "DamageError"), (name, record)
        if record["error"]:
            assert record["message"].startswith(f"{record['path']}: "), record
            assert "\n" not in record["message"]
            assert len(record["message"]) < len(record["path"]) + 400


def test_memory_and_time(results):
    for name, record in results.items():
        assert record["peak_kb"] < LIMIT_KB, (name, record["peak_kb"])
        assert record["seconds"] < LIMIT_S, (name, record["seconds"])


def test_outcomes_are_those_of_the_table(results):
    wrong = {}
    for name, wanted in OUTCOMES.items():
        if name not in results:
            continue  # another edition of the corpus
        record = results[name]
        got = record["message"] if record["error"] else "ok"
        if (wanted == "ok") != (got == "ok") or wanted not in got:
            wrong[name] = (wanted, got)
    assert wrong == {}


def test_the_table_is_about_these_files(results):
    known = [name for name in OUTCOMES if name in results]
    assert len(known) > 0.9 * len(OUTCOMES)
    listed = [name for name in results if name.startswith(("malformed/", "tiff_variants/"))]
    assert len([name for name in listed if name in OUTCOMES]) > 0.9 * len(listed)


TURNS = {
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a.swapaxes(0, 1), 2),
    8: lambda a: np.rot90(a, 1),
}


def wanted_pixels(path, shape, n_channels):
    """tifffile's pixels (c, y, x) of the page or overview of this stored size."""
    with tifffile.TiffFile(path) as tiff:
        series = tiff.series[0]
        if series.levels[0].shape == series.shape and _sides(series) == shape:
            chosen = series
        else:
            levels = [level for each in tiff.series for level in each.levels]
            chosen = next(level for level in levels if _sides(level) == shape)
        array, axes = chosen.asarray(), chosen.axes
        keyframe = chosen.keyframe
        value = (
            keyframe.tags.valueof(274, 1)
            if chosen is series
            else series.keyframe.tags.valueof(274, 1)
        )
        if "I" in axes:
            array, axes = np.take(array, 0, axes.index("I")), axes.replace("I", "")
        if "S" in axes:
            array = np.moveaxis(array, axes.index("S"), -1)
        elif "C" in axes:
            array = np.moveaxis(array, axes.index("C"), -1)
        else:
            array = array[..., np.newaxis]
        if int(keyframe.photometric) == 3 and "C" not in axes:
            # The specification: a palette image shows the colours of its indices.
            colors = np.asarray(series.keyframe.colormap)
            colors = colors >> 8 if colors.max() > 255 else colors
            array = np.moveaxis(colors[:, array[..., 0].astype(int)], 0, -1)
    array = array[..., :n_channels]  # alpha is the last sample
    return np.moveaxis(TURNS.get(value, np.asarray)(array), -1, 0)


def _sides(series):
    return series.shape[series.axes.index("Y")], series.shape[series.axes.index("X")]


@pytest.mark.parametrize("folder", FOLDERS)
def test_pixels_are_those_of_tifffile(data, results, folder):
    compared = 0
    for path in files_of(data / folder):
        if results[str(path.relative_to(data))]["error"]:
            continue
        with open_slide(path) as slide:
            turned = any("Orientation" in note and note[-2] in "5678" for note in slide.notes)
            for number, level in enumerate(slide.levels):
                if level.shape[0] * level.shape[1] > LARGE_PX[folder]:
                    continue  # compared by box below
                stored = level.shape[::-1] if turned else level.shape
                wanted = wanted_pixels(path, stored, slide.channels)
                got = slide.read(Box.of_shape(level.shape), level=number)
                assert got.dtype == slide.dtype in (np.uint8, np.uint16, np.float32)
                np.testing.assert_array_equal(got, wanted, err_msg=f"{path} level {number}")
                compared += 1
    assert compared


@pytest.mark.parametrize(
    "name",
    [
        "wsi/test3-DAPI-2-(387).ndpi",
        pytest.param("geotiff/rio-cogeo/image_web_z5_z11.tif", marks=pytest.mark.slow),
        pytest.param("geotiff/large_image/yb10kx5k.zstd.tiff", marks=pytest.mark.slow),
    ],
)
def test_boxes_of_the_large_ones(data, name):
    path = data / name
    whole = np.moveaxis(tifffile.imread(path), -1, 0)
    with open_slide(path) as slide:
        assert slide.levels[0].shape == whole.shape[1:]
        for box in Box.of_shape(whole.shape[1:]).split((1500, 2300)):
            np.testing.assert_array_equal(slide.read(box), whole[(slice(None), *box.slices)])
        assert slide.n_decodes == len(slide._levels[0].pages[0].offsets)
