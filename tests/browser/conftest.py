"""A browser, and a store to look at made straight with ``tilepipe.store``."""

from __future__ import annotations

import shutil
import threading
import time

import numpy as np
import pytest

from tilepipe.spec import LabelClass
from tilepipe.store import create_store, reduce_image, reduce_label

READY = 'body[data-ready="1"]'
PATIENCE_S = 150
"""A busy machine draws slowly; what is checked is what it draws."""

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


class Visit:
    """A page with its requests and complaints on record."""

    def __init__(self, browser, url, *, hash_="", width=1280, height=720, **options):
        self.context = browser.new_context(
            viewport={"width": width, "height": height}, bypass_csp=False, **options
        )
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE_S * 1000)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on(
            "console",
            lambda message: (
                self.complaints.append(message.text) if message.type == "error" else None
            ),
        )
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(url + hash_)
        self.page.wait_for_selector(READY)

    def app(self, expression):
        return self.page.evaluate(f"() => {{ const app = window.tilepipe; return {expression}; }}")

    def until(self, expression, seconds=PATIENCE_S):
        """Wait for a condition on the page (its policy forbids waiting inside the page)."""
        end = time.monotonic() + seconds
        while not (value := self.app(expression)):
            assert time.monotonic() < end, f"never true: {expression}"
            self.page.wait_for_timeout(50)
        return value

    def settle(self):
        """Wait until nothing moves and every tile asked for is drawn."""
        layers = "[...app.layers.values(), ...app.heat.layers.values()]"
        quiet = f"{layers}.every((layer) => layer.loading === 0)"
        self.until(f"app.paneA.image.getFullyLoaded() && {quiet}")
        self.page.wait_for_timeout(700)
        self.until(f"app.paneA.image.getFullyLoaded() && {quiet}")

    def overlay(self, y, x):
        """Colour (r, g, b, a) of the mask drawn over a level-0 pixel."""
        return tuple(
            self.app(
                f"(() => {{ const v = app.paneA.view(), r = v.ratio;"
                f"return [...app.paneA.context.getImageData("
                f"Math.floor((v.left + ({x} + .5) * v.zoom) * r),"
                f"Math.floor((v.top + ({y} + .5) * v.zoom) * r), 1, 1).data]; }})()"
            )
        )

    def drawn(self, y, x, color, alpha):
        """Wait until the mask over a level-0 pixel has a colour and an opacity (0-255)."""
        end = time.monotonic() + PATIENCE_S
        while True:
            *shown, strength = self.overlay(y, x)
            near = all(abs(a - b) <= 2 for a, b in zip(shown, color, strict=True))
            if abs(strength - alpha) <= 2 and (near or alpha == 0):
                return
            assert time.monotonic() < end, f"drawn as {shown} {strength}, not {color} {alpha}"
            self.page.wait_for_timeout(50)

    def close(self):
        self.context.close()


@pytest.fixture
def visit(browser, serve):
    visits = []

    def open_page(*stores, server=None, **options):
        server = server or serve(*stores)
        visit = Visit(browser, server.url, **options)
        visit.server = server
        visits.append(visit)
        return visit

    yield open_page
    for one in visits:
        one.close()


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


@pytest.fixture
def two_stores(tmp_path):
    """A stained image with a mask, and a fluorescence image without."""
    rng = np.random.default_rng(0)
    stained = rng.integers(0, 255, (3, 300, 260), dtype=np.uint8)
    build_store(tmp_path / "a.zarr", stained, {"unet": stain_mask(stained)}, mpp=0.5)
    build_store(
        tmp_path / "b.zarr", rng.integers(0, 900, (2, 200, 240), np.uint16), {}, mpp=None, rgb=False
    )
    return tmp_path / "a.zarr", tmp_path / "b.zarr"
