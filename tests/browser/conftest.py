"""A browser, and a store to look at made straight with ``tilepipe.store``."""

from __future__ import annotations

import shutil
import threading

import numpy as np
import pytest

from tilepipe.spec import LabelClass
from tilepipe.store import create_store, reduce_image, reduce_label

CLASSES = (
    LabelClass(name="background", color=(0, 0, 0, 0)),
    LabelClass(name="nucleus", color=(60, 84, 200, 255)),
    LabelClass(name="stroma", color=(230, 75, 53, 255)),
)


def write_pyramid(levels, reduce, pixels):
    for level in levels:
        for unit in level.grid:
            level.write_unit(unit, np.ascontiguousarray(pixels[(..., *unit.box.slices)]))
        pixels = reduce(pixels)


def build_store(path, image, masks, *, mpp, unit_px=1024, rgb=True, records=None):
    store = create_store(
        str(path),
        channels=image.shape[0],
        dtype=image.dtype,
        extent=image.shape[1:],
        mpp=(mpp, mpp) if mpp else None,
        channel_names=(),
        channel_colors=(),
        rgb=rgb,
        unit_px=unit_px,
    )
    write_pyramid([store.image(k) for k in range(store.n_levels)], reduce_image, image)
    for name, mask in masks.items():
        label = store.create_label(name, classes=CLASSES, unit_px=unit_px, dtype=str(mask.dtype))
        write_pyramid([label.level(k) for k in range(label.n_levels)], reduce_label, mask)
        label.write_record((records or {}).get(name, {}))
    return store


def stain_mask(image):
    """Classes of a stained RGB image by darkness: enough to look at, nothing more."""
    red, green, blue = (plane.astype(np.int32) for plane in image)
    mask = np.zeros(image.shape[1:], dtype=np.uint8)
    mask[(green < 170) & (red > 140)] = 2
    mask[(red < 130) & (blue > green)] = 1
    return mask


@pytest.fixture(scope="module")
def browser():
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("no chromium on PATH")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path,
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
            ],
        )
        yield browser
        browser.close()


@pytest.fixture
def serve():
    """Start a view server over stores; returns it, running."""
    from tilepipe.view.server import ViewServer

    running = []

    def start(*stores):
        server = ViewServer([str(store) for store in stores])
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        running.append((server, thread))
        return server

    yield start
    for server, thread in running:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="session")
def slide_store(data, tmp_path_factory):
    """CMU-1-Small-Region with two masks of it."""
    import tifffile

    pixels = tifffile.imread(data / "wsi" / "CMU-1-Small-Region.svs", series=0, level=0)
    image = np.ascontiguousarray(np.moveaxis(pixels[..., :3], -1, 0))
    mask = stain_mask(image)
    path = tmp_path_factory.mktemp("view") / "CMU-1-Small-Region.zarr"
    second = np.roll(mask, 6, axis=1)
    plan = {"mode": "exact", "core_px": 512, "halo_px": 96, "unit_px": 1024}
    record = {
        "state": "done",
        "plan": plan,
        "model": {"name": "unet", "source": "bundled"},
        "settings": {"precision": "bf16", "device": "cpu"},
        "verified": {
            "passed": True,
            "flips": 0,
            "sampled_px": 262144,
            "date": "2026-01-02T03:04:05Z",
            "places": [{"box": [400, 600, 912, 1112], "differing": 0}],
        },
    }
    build_store(path, image, {"unet": mask, "unet3+": second}, mpp=0.499, records={"unet": record})
    return path
