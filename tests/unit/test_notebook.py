"""The verbs as Python calls: what a notebook holds goes in as it is."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile

import tilepipe
import tilepipe.models
from tilepipe import infer, notebook
from tilepipe.errors import PlanError, SpecError, StoreError
from tilepipe.spec import default_classes
from tilepipe.store import create_store


def test_numbers_of_numpy_and_paths_are_settings(monkeypatch):
    asked = []

    def keep(request, **_):
        asked.append(request.spec)
        return SimpleNamespace(output="o.zarr", label="unet")

    monkeypatch.setattr(notebook, "run_one", keep)
    monkeypatch.setattr(notebook, "Result", lambda *_: None)
    widths = np.array([2, 4, 8])
    notebook.run(
        Path("s.tif"), tile=np.int64(64), weights=Path("w.safetensors"),
        options={"depth": np.int64(2), "widths": widths, "norm": [np.str_("none")]},
    )  # fmt: skip
    assert asked[0].tile == 64
    assert asked[0].weights == "w.safetensors"
    assert asked[0].options == {"depth": 2, "widths": [2, 4, 8], "norm": ["none"]}


def test_verify_takes_paths(monkeypatch):
    monkeypatch.setattr(infer, "verify", lambda location, **settings: (location, settings))
    moved = {"slide": Path("s.tif"), "weights": Path("w.safetensors"), "samples": np.int64(3)}
    assert notebook.verify(Path("o.zarr"), **moved) == (
        "o.zarr", {"slide": "s.tif", "weights": "w.safetensors", "samples": 3}
    )  # fmt: skip


@pytest.mark.parametrize("samples", [-1, np.int64(-3), 2.5, True, "3", None])
def test_a_number_of_places_that_is_none_is_refused(tmp_path, samples):
    """Nothing would be computed again, and the mask held to be verified."""
    with pytest.raises(SpecError, match=r"samples .*: how many places are computed again, from 0"):
        notebook.verify(tmp_path / "none.zarr", samples=samples)


@pytest.mark.parametrize("verb", [notebook.run, notebook.ingest])
@pytest.mark.parametrize("blank", ["", "  "])
def test_a_place_without_a_name_is_refused(tmp_path, monkeypatch, verb, blank):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    slide = tmp_path / "elsewhere" / "s.tif"
    tifffile.imwrite(slide, np.zeros((64, 64, 3), np.uint8), photometric="rgb")
    with pytest.raises(PlanError, match=r"output '.*': names no place; leave it out for s.zarr"):
        verb(slide, blank)
    with pytest.raises(PlanError, match=r"slide '.*': names no file"):
        verb(blank)
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]


def test_a_tilde_is_the_home_folder_wherever_a_path_is_given(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    bundled = Path(tilepipe.models.__file__).parent / "weights" / "unet.safetensors"
    shutil.copy(bundled, tmp_path / "mine.safetensors")
    for model in (
        tilepipe.load_model("~/mine.safetensors"),
        tilepipe.load_model("unet", weights=Path("~/mine.safetensors")),
    ):
        assert model.source == str(tmp_path / "mine.safetensors")
    result = tiny_result(tmp_path / "s.zarr")
    assert result.to_geojson("~/objects.geojson") == 1
    result.overview().save("~/view.png")
    assert {"objects.geojson", "view.png"} <= {path.name for path in tmp_path.iterdir()}


def test_a_picture_is_told_of_not_spelled_out(tmp_path):
    picture = tiny_result(tmp_path / "s.zarr").overview()
    assert repr(picture) == f"Picture({len(picture)} bytes of PNG)"
    assert picture._repr_png_()[:4] == b"\x89PNG"


def test_a_mask_is_compared_px_by_px(tmp_path):
    labels = tiny_result(tmp_path / "s.zarr").labels
    assert np.count_nonzero(labels == 1) == 32 * 32
    assert np.count_nonzero(labels != 1) == 0
    assert (labels == np.uint8(1)).all()
    assert (labels == labels[:, :]).all()
    assert (labels == labels).shape == (32, 32)
    assert not labels == None  # noqa: E711, SIM201 - no px is
    assert labels in {labels}


def tiny_result(path):
    store = create_store(str(path), channels=1, dtype="uint8", extent=(32, 32), unit_px=32)
    store.image(0).write_unit(store.image(0).grid.unit(0, 0), np.zeros((1, 32, 32), np.uint8))
    level = store.create_label("m", classes=default_classes(2), unit_px=32).level(0)
    level.write_unit(level.grid.unit(0, 0), np.ones((32, 32), np.uint8))
    return tilepipe.open_result(path)


def test_a_store_without_a_mask_says_so(tmp_path):
    create_store(
        str(tmp_path / "s.zarr"), channels=1, dtype=np.dtype("uint8"), extent=(32, 32), mpp=None,
        channel_names=("grey",), channel_colors=(None,), rgb=False, unit_px=32, chunk_px=32,
    )  # fmt: skip
    with pytest.raises(StoreError, match="holds no mask; make one with run"):
        notebook.open_result(tmp_path / "s.zarr")


def test_a_script_that_every_worker_would_run_again_is_told(tmp_path):
    tifffile.imwrite(tmp_path / "s.tif", np.zeros((64, 64, 3), np.uint8))
    (tmp_path / "script.py").write_text(
        "import tilepipe\n"
        "tilepipe.run('s.tif', weights='random:0', base=2, tune=False, workers=1)\n"
    )
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 1
    assert "a worker process loads the script that started it" in done.stderr
    assert "another tilepipe process" not in done.stderr
    assert "outside of `if __name__ == '__main__':`" in done.stderr.splitlines()[-1]
