"""The verbs as Python calls: what a notebook holds goes in as it is."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tilepipe import infer, notebook
from tilepipe.errors import StoreError
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


def test_a_store_without_a_mask_says_so(tmp_path):
    create_store(
        str(tmp_path / "s.zarr"), channels=1, dtype=np.dtype("uint8"), extent=(32, 32), mpp=None,
        channel_names=("grey",), channel_colors=(None,), rgb=False, unit_px=32, chunk_px=32,
    )  # fmt: skip
    with pytest.raises(StoreError, match="holds no mask; make one with run"):
        notebook.open_result(tmp_path / "s.zarr")
