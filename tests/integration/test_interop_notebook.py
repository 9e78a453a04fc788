"""The notebook runs from top to bottom, and its pictures are pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tilepipe.store import open_store
from tilepipe.tiling import Box

NOTEBOOK = Path(__file__).resolve().parents[2] / "workflows" / "notebook" / "slide.ipynb"


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("rasterio")
    import tifffile

    rng = np.random.default_rng(0)
    slide = tmp_path / "slide.tif"
    pixels = np.kron(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8), np.ones((8, 8, 1)))
    tifffile.imwrite(
        slide,
        pixels.astype(np.uint8),
        photometric="rgb",
        tile=(64, 64),
        resolution=(20000, 20000),
        resolutionunit="CENTIMETER",
    )
    book = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = [cell for cell in book.cells if "parameters" in cell.metadata.get("tags", [])]
    parameters.source = (
        f"slide = {str(slide)!r}\noutput = 'slide.zarr'\n"
        "settings = {'model': 'unet', 'weights': 'random:0', 'base': 4, 'classes': 3,"
        " 'device': 'cpu', 'precision': 'fp32', 'backend': 'torch', 'tune': False}"
    )
    client = nbclient.NotebookClient(
        book, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    pictures = [
        output
        for cell in book.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) >= 3
    mask = open_store(str(tmp_path / "slide.zarr")).label("unet").level(0)
    assert mask.read(Box.of_shape(mask.shape)).max() > 0
    found = json.loads((tmp_path / "objects.geojson").read_text())
    assert len(found["features"]) > 0


def test_the_notebook_is_stored_without_results():
    book = json.loads(NOTEBOOK.read_text())
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert code
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
