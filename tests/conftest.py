"""Shared fixtures: where the real data lies, and the rule that a test uses few threads."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Two cores are shared by the test process and its workers.
os.environ.setdefault("OMP_NUM_THREADS", "2")

# A busy machine must not fail a property: seconds are measured in benchmarks/. The same examples
# every time, so that a red run can be repeated; `make fuzz` is what looks for new ones.
settings.register_profile(
    "tilepipe",
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("tilepipe")

_DATA = Path(
    os.environ.get("TILEPIPE_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")
)


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real slides; tests that need it are skipped where it is absent."""
    if not _DATA.is_dir():
        pytest.skip(f"no real data at {_DATA}; set TILEPIPE_DATA")
    return _DATA


@pytest.fixture(scope="session")
def small_slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiled RGB TIFF of 700 x 500 px with real-looking texture and a pixel size."""
    path = tmp_path_factory.mktemp("slides") / "small.tif"
    write_slide(path, (700, 500))
    return path


def write_slide(path: Path, shape: tuple[int, int], *, seed: int = 0, tile: int = 128) -> None:
    """Write a tiled RGB TIFF: blobs over a gradient over noise, 0.5 µm/px, deflate."""
    import numpy as np
    import tifffile
    from scipy import ndimage

    generator = np.random.default_rng(seed)
    height, width = shape
    blobs = ndimage.gaussian_filter(generator.random(shape), 6)
    blobs = (blobs > np.quantile(blobs, 0.7)) * 90.0
    slope = np.linspace(0, 60, width)[None, :] + np.linspace(0, 40, height)[:, None]
    pixels = np.stack([blobs + slope * k + generator.random(shape) * 30 for k in (0.5, 1, 1.5)])
    tifffile.imwrite(
        path,
        np.moveaxis(np.clip(pixels, 0, 255).astype(np.uint8), 0, -1),
        tile=(tile, tile),
        photometric="rgb",
        compression="adobe_deflate",
        resolution=(20000, 20000),
        resolutionunit="CENTIMETER",
    )
