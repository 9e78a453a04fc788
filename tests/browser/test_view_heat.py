"""The heat map in a real browser: what is drawn and told are the stored probabilities."""

from __future__ import annotations

import numpy as np
import pytest

from tilepipe.spec import LabelClass
from tilepipe.store import create_store, reduce_image, reduce_label

pytestmark = pytest.mark.timeout(1200)

SIDES = (1100, 1300)
CLASSES = (
    LabelClass(name="background", color=(0, 0, 0, 0)),
    LabelClass(name="nucleus", color=(60, 84, 200, 255)),
    LabelClass(name="stroma", color=(230, 75, 53, 255)),
)


def write(pyramid, reduce, pixels):
    for index in range(pyramid.n_levels):
        level = pyramid.level(index)
        for unit in level.grid:
            level.write_unit(unit, np.ascontiguousarray(pixels[(..., *unit.box.slices)]))
        pixels = reduce(pixels)


@pytest.fixture(scope="module")
def planes():
    """Two classes: soft spots, and a slope from left to right."""
    rows, columns = np.mgrid[: SIDES[0], : SIDES[1]]
    spots = (255 * np.exp(-((rows % 110 - 55) ** 2 + (columns % 130 - 65) ** 2) / 700)).round()
    slope = (columns * 255 // (SIDES[1] - 1)) * (spots < 128)
    return np.stack([spots, slope]).astype(np.uint8)


@pytest.fixture(scope="module")
def heat_store(planes, tmp_path_factory):
    path = tmp_path_factory.mktemp("heat") / "slide.zarr"
    rng = np.random.default_rng(0)
    image = (225 - planes[0] // 3 + rng.integers(0, 20, (3, *SIDES))).astype(np.uint8)
    image[1] -= planes[0] // 4
    store = create_store(
        str(path), channels=3, dtype="uint8", extent=SIDES, mpp=(0.5, 0.5), rgb=True, unit_px=512
    )
    for index in range(store.n_levels):
        level = store.image(index)
        for unit in level.grid:
            level.write_unit(unit, np.ascontiguousarray(image[(..., *unit.box.slices)]))
        image = reduce_image(image)
    for name in ("with", "without"):
        label = store.create_label(name, classes=CLASSES, unit_px=512, probabilities=name == "with")
        write(label, reduce_label, (planes[0] > 127).astype(np.uint8))
        if label.probabilities is not None:
            write(label.probabilities, reduce_image, planes)
        label.write_record({"state": "done"})
    return path


VIRIDIS = {0: (68, 1, 84), 255: (253, 231, 37)}


def test_the_heat_map_is_the_stored_probabilities(visit, heat_store, planes):
    seen = visit(heat_store, hash_="#y=605&x=715&zoom=4&mode=off")
    page = seen.page
    seen.settle()
    assert page.locator("#heat-section").is_visible()
    assert not page.locator("#heat-rows").is_visible()
    seen.drawn(605, 715, (0, 0, 0), 0)

    page.locator("body").press("h")
    assert page.get_by_label("Heat map", exact=True).is_checked()
    seen.settle()
    y, x = 605, 715  # the middle of a spot
    assert planes[0, y, x] == 255
    seen.drawn(y, x, VIRIDIS[255], round(255 * 0.7))
    page.get_by_label("Heat map opacity").fill("100")
    seen.drawn(y, x, VIRIDIS[255], 255)
    # As the table has it, wherever one looks; what is improbable fades.
    rng = np.random.default_rng(1)
    for y, x in rng.integers((550, 620), (660, 770), (12, 2)).tolist():
        value = int(planes[0, y, x])
        color = seen.page.evaluate(
            "async (value) => (await import(new URL('static/heat.js', location.href)))"
            ".heatColor(value)",
            value,
        )
        alpha = min(255, round(255 * value / 32))
        *shown, strength = seen.overlay(y, x)
        assert abs(strength - alpha) <= 2, (y, x, value)
        if alpha > 128:
            assert np.abs(np.subtract(shown, color)).max() <= 3, (y, x, value, shown, color)

    # Another class, and the percent under the pointer.
    page.get_by_label("Class of the heat map").select_option(label="stroma")
    y, x = 560, 790
    value = int(planes[1, y, x])
    assert 128 < value < 255
    view = seen.app("app.paneA.view()")
    bounds = page.locator("#pane-a").bounding_box()
    page.mouse.move(
        bounds["x"] + view["left"] + (x + 0.5) * view["zoom"],
        bounds["y"] + view["top"] + (y + 0.5) * view["zoom"],
    )
    seen.until(f"document.getElementById('readout').dataset.y === '{y}'")
    assert int(seen.app("document.getElementById('readout').dataset.probability")) == value
    assert f"stroma {value / 2.55:.1f} %" in page.inner_text("#what")
    seen.settle()

    # The link restores it, on a page of its own.
    page.wait_for_timeout(500)
    again = visit(server=seen.server, hash_="#" + page.url.split("#")[1])
    again.settle()
    settings = again.app("app.settings")
    assert (settings["heat"], settings["heatclass"], settings["heatopacity"]) == (1, 2, 100)
    assert again.page.locator("#heat-class").input_value() == "2"
    assert again.overlay(y, x)[3] == 255

    # A label that has none: nothing to switch on, and the key does nothing.
    again.page.locator("#label-select").select_option(label="without")
    assert not again.page.locator("#heat-section").is_visible()
    again.drawn(y, x, (0, 0, 0), 0)
    again.page.keyboard.press("h")
    again.drawn(y, x, (0, 0, 0), 0)
    for one in (seen, again):
        assert one.complaints == []


def test_the_key_is_listed_and_every_control_has_a_name(visit, heat_store):
    seen = visit(heat_store, hash_="#heat=1")
    seen.settle()
    seen.page.keyboard.press("?")
    assert "Heat map of the probabilities" in seen.page.inner_text("#keys")
    nameless = seen.app(
        "[...document.querySelectorAll('button, input, select, canvas[role]')]"
        ".filter((node) => !(node.getAttribute('aria-label') || node.textContent.trim()"
        " || node.labels?.[0]?.textContent.trim())).map((node) => node.outerHTML)"
    )
    assert nameless == []
    assert seen.complaints == []
