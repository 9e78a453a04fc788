"""The page in a real browser: what it shows is what the arrays hold, and it asks nobody else."""

from __future__ import annotations

import re
import threading
import time

import numpy as np
import pytest

from tilepipe.spec import default_classes
from tilepipe.store import create_store, open_store, reduce_label
from tilepipe.tiling import Box

pytestmark = pytest.mark.timeout(1200)


def test_a_person_looks_at_a_result(visit, slide_store):
    seen = visit(slide_store)
    page = seen.page
    store = open_store(str(slide_store))
    mask = store.label("unet").level(0).read(Box(0, 0, *store.extent))
    seen.settle()
    assert page.title() == "CMU-1-Small-Region.zarr · tilepipe"
    assert "2,220 × 2,967 px · 0.499 µm/px" in page.inner_text("#subtitle")

    # Full resolution at a nucleus.
    ys, xs = np.nonzero(mask[1300:1500, 900:1300] == 1)
    y, x = int(ys[len(ys) // 2]) + 1300, int(xs[len(xs) // 2]) + 900
    page.fill("#goto-text", f"{y}, {x}")
    page.click("#goto button")
    seen.page.wait_for_timeout(1000)
    seen.settle()
    assert abs(seen.app("app.paneA.view().zoom") - 1) < 0.01
    assert "100 %" in page.inner_text("#magnification")
    assert re.fullmatch(r"\d+ µm", page.inner_text("#scalebar span"))

    # The mask drawn is the array, in the class colour, at the opacity of the slider.
    seen.drawn(y, x, (60, 84, 200), 128)
    page.locator("#opacity").fill("80")
    seen.drawn(y, x, (60, 84, 200), 204)
    page.get_by_label("nucleus", exact=True).uncheck()
    seen.drawn(y, x, (0, 0, 0), 0)
    page.get_by_label("nucleus", exact=True).check()
    page.get_by_label("Colour of nucleus").fill("#00ff00")
    seen.drawn(y, x, (0, 255, 0), 204)

    # The pixel under the pointer.
    view = seen.app("app.paneA.view()")
    bounds = page.locator("#pane-a").bounding_box()
    page.mouse.move(
        bounds["x"] + view["left"] + (x + 0.5) * view["zoom"],
        bounds["y"] + view["top"] + (y + 0.5) * view["zoom"],
    )
    seen.until(f"document.getElementById('readout').dataset.y === '{y}'")
    readout = seen.app("({...document.getElementById('readout').dataset})")
    assert (int(readout["x"]), int(readout["value"])) == (x, int(mask[y, x]))
    shown = [int(part) for part in readout["image"].split(",")]
    assert shown == store.image(0).read(Box(y, x, y + 1, x + 1))[:, 0, 0].tolist()
    assert "nucleus (1)" in page.inner_text("#what")

    # The link restores the place and the settings.
    seen.page.wait_for_timeout(500)
    link = page.url
    before = seen.app("app.paneA.place()")
    again = visit(server=seen.server, hash_="#" + link.split("#")[1])
    again.settle()
    after = again.app("app.paneA.place()")
    assert after["zoom"] == pytest.approx(before["zoom"], rel=0.01)
    assert (after["y"], after["x"]) == pytest.approx((before["y"], before["x"]), abs=2)
    assert again.app("app.settings.opacity") == 80
    again.drawn(y, x, (0, 255, 0), 204)

    for one in (seen, again):
        assert one.complaints == []
        assert {url.split("/")[2] for url in one.requests if not url.startswith("blob:")} == {
            f"127.0.0.1:{seen.server.server_address[1]}"
        }


def test_keys_comparison_and_layers(visit, slide_store):
    seen = visit(slide_store, hash_="#y=1200&x=1000&zoom=1")
    page = seen.page
    seen.settle()
    page.keyboard.press("o")
    assert page.locator('input[name="mode"][value="outline"]').is_checked()
    page.keyboard.press("m")
    assert seen.app("app.settings.mode") == "off"
    page.keyboard.press("m")
    page.keyboard.press("]")
    assert page.inner_text("#opacity-value") == "60 %"
    for key, layer in zip("uirk", ("units", "tiles", "state", "certificate"), strict=True):
        page.keyboard.press(key)
        assert page.locator(f"#layer-{layer}").is_checked()
    assert seen.app("app.marks().boxes.length") == 1
    assert page.inner_text("#certificate") == "verified 2026-01-02: 0 of 262,144 px differ"
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("#help").is_visible()
    page.keyboard.press("c")
    assert page.locator("#swipe").is_visible()
    assert page.inner_text("#chip-b") == "unet3+"
    page.locator("#swipe").press("ArrowLeft")
    assert seen.app("app.settings.swipe") == 48
    page.locator("#swipe").blur()
    page.keyboard.press("c")
    page.locator("#pane-b canvas").first.wait_for()
    seen.until("app.paneB && app.paneB.ready")
    page.keyboard.press("+")
    seen.page.wait_for_timeout(1000)
    a, b = seen.app("app.paneA.place(true)"), seen.app("app.paneB.place(true)")
    assert (a["y"], a["x"], a["zoom"]) == pytest.approx((b["y"], b["x"], b["zoom"]), rel=0.02)
    page.keyboard.press("n")
    seen.until("document.getElementById('object-note').textContent.includes('at ')")
    theme = seen.app("document.documentElement.dataset.theme")
    page.keyboard.press("t")
    assert seen.app("document.documentElement.dataset.theme") != theme
    assert seen.complaints == []


def test_every_control_has_a_name(visit, slide_store):
    seen = visit(slide_store)
    nameless = seen.app(
        "[...document.querySelectorAll('button, input, select, [role=slider], canvas[role]')]"
        ".filter((node) => !(node.getAttribute('aria-label') || node.textContent.trim()"
        " || node.labels?.[0]?.textContent.trim())).map((node) => node.outerHTML)"
    )
    assert nameless == []


@pytest.mark.parametrize("size", [(1280, 720), (390, 844)])
def test_nothing_leaves_the_window(visit, slide_store, size):
    seen = visit(slide_store, width=size[0], height=size[1])
    assert seen.app("document.documentElement.scrollWidth") <= size[0]
    assert seen.app("document.documentElement.scrollHeight") <= size[1]
    if size[0] < 700:
        assert not seen.page.locator("#panel").is_visible()
        seen.page.click("#panel-toggle")
        seen.page.locator("#opacity").wait_for()
        box = seen.page.locator("#panel").bounding_box()
        assert box["width"] == size[0]


def test_channels_of_a_16_bit_image(visit, tmp_path):
    rng = np.random.default_rng(0)
    store = create_store(
        str(tmp_path / "two.zarr"),
        channels=2,
        dtype="uint16",
        extent=(700, 600),
        mpp=None,
        channel_names=("DAPI", "GFP"),
        channel_colors=("0000FF", "00FF00"),
        rgb=False,
        unit_px=1024,
    )
    image = rng.integers(100, 3000, (2, 700, 600), dtype=np.uint16)
    for level in range(store.n_levels):
        target = store.image(level)
        height, width = target.shape
        step = 1 << level
        target.write_unit(
            target.grid.unit(0, 0),
            np.ascontiguousarray(image[:, ::step, ::step][:, :height, :width]),
        )
    seen = visit(tmp_path / "two.zarr")
    seen.settle()
    assert seen.page.locator("#channels li").count() == 2
    before = len(seen.requests)
    seen.page.get_by_label("GFP", exact=True).uncheck()
    seen.until("app.panel.channelWindows().length === 1")
    seen.page.wait_for_timeout(1000)
    later = [url for url in seen.requests[before:] if "/image/" in url]
    assert later
    assert all("c=0%3A" in url and "%2C" not in url for url in later), "one channel is left"
    assert "px" in seen.page.inner_text("#scalebar span")
    assert seen.complaints == []


def test_a_running_job_appears(visit, tmp_path):
    from tilepipe.spec import default_classes

    path = tmp_path / "running.zarr"
    store = create_store(
        str(path),
        channels=3,
        dtype="uint8",
        extent=(2000, 2000),
        mpp=(0.5, 0.5),
        channel_names=(),
        channel_colors=(),
        rgb=True,
        unit_px=512,
    )
    for level in range(store.n_levels):
        for unit in store.image(level).grid:
            grey = np.full((3, *unit.box.shape), 200, dtype=np.uint8)
            store.image(level).write_unit(unit, grey)
    label = store.create_label("unet", classes=default_classes(2), unit_px=512)
    label.write_record({"state": "running", "fingerprint": "f" * 16})
    seen = visit(path)
    seen.settle()
    assert seen.overlay(1000, 1000) == (0, 0, 0, 0)

    def work():
        journal = store.journal("unet", "f" * 16)
        level = label.level(0)
        for unit in level.grid:
            checksum = level.write_unit(unit, np.ones(unit.box.shape, dtype=np.uint8))
            if (unit.iy, unit.ix) != (3, 3):  # written, but not recorded: not to be believed
                journal.write("segment", 0, unit, checksum=checksum)

    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    started = time.monotonic()
    seen.until("app.progress && app.progress.labels[0].done === 15")
    seen.drawn(1000, 1000, (230, 75, 53), 128)
    print(f"15 new units seen after {time.monotonic() - started:.2f} s")
    seen.drawn(300, 1900, (230, 75, 53), 128)
    assert seen.overlay(1900, 1900) == (0, 0, 0, 0)
    assert "15 of 16 units" in seen.page.inner_text("#job")

    unit = label.level(0).grid.unit(3, 3)
    checksum = label.level(0).checksum(unit)
    journal = store.journal("unet", "f" * 16)
    journal.write("segment", 0, unit, checksum=checksum)
    fine = label.level(0).read(Box(0, 0, 2000, 2000))
    for index in range(1, label.n_levels):
        fine = reduce_label(fine)
        level = label.level(index)
        for one in level.grid:
            pixels = np.ascontiguousarray(fine[one.box.slices])
            journal.write("label-reduce", index, one, checksum=level.write_unit(one, pixels))
    label.write_record({"state": "done", "fingerprint": "f" * 16})
    seen.until("!app.progress || app.progress.complete")
    seen.drawn(1900, 1900, (230, 75, 53), 128)
    seen.until("document.getElementById('job').hidden")
    assert seen.complaints == []


def written(store, label, pixels, journal):
    """Write and record every unit of the finest level of an image (label None) or a mask."""
    level = store.image(0) if label is None else store.label(label).level(0)
    for unit in level.grid:
        checksum = level.write_unit(unit, np.ascontiguousarray(pixels[(..., *unit.box.slices)]))
        journal.write("ingest" if label is None else "segment", 0, unit, checksum=checksum)


def test_channels_that_are_being_copied_are_not_left_black(visit, tmp_path):
    """Of nothing no window is known; the page that was opened then follows what comes."""
    image = np.full((2, 900, 1000), 1500, np.uint16)
    image[:, :, :300] = 100
    store = create_store(
        str(tmp_path / "running.zarr"), channels=2, dtype="uint16", extent=(900, 1000), mpp=None,
        channel_names=("a", "b"), channel_colors=(), rgb=False, unit_px=512,
    )  # fmt: skip
    store.write_record({"state": "running", "fingerprint": "f" * 16})
    seen = visit(store.location)
    assert seen.app("app.panel.channels[0].high") == 65535
    written(store, None, image, store.journal(None, "f" * 16))
    seen.until("app.panel.channels.every((one) => one.high === 1500)")
    shade = (
        "(() => { const v = app.paneA.view(), c = app.paneA.viewer.drawer.canvas;"
        "return c.getContext('2d').getImageData((v.left + 700 * v.zoom) * c.width / v.width,"
        "(v.top + 450 * v.zoom) * c.height / v.height, 1, 1).data[1]; })()"
    )
    seen.until(f"{shade} > 200")
    # One that somebody has chosen stays.
    seen.page.get_by_label("White of a", exact=True).fill("1200")
    store.write_record({"state": "done", "fingerprint": "f" * 16})
    seen.until("app.source.generation === 2")
    assert seen.app("app.panel.channels.map((one) => one.high)") == [1200, 1500]
    seen.page.click("#channels-auto")
    seen.until("app.panel.channels[0].high === 1500")
    assert seen.complaints == []


def test_a_second_mask_of_another_store_is_followed_too(visit, tmp_path, two_stores):
    path = tmp_path / "running.zarr"
    store = create_store(str(path), channels=3, dtype="uint8", extent=(300, 260), mpp=None,
                         channel_names=(), channel_colors=(), rgb=True, unit_px=512)  # fmt: skip
    label = store.create_label("other", classes=default_classes(2), unit_px=512)
    label.write_record({"state": "running", "fingerprint": "f" * 16})
    seen = visit(two_stores[0], path, hash_="#compare=side&with=1.0")
    seen.settle()
    second = (
        "(() => { const v = app.paneB.view(), r = v.ratio;"
        "return [...app.paneB.context.getImageData((v.left + 130 * v.zoom) * r,"
        "(v.top + 150 * v.zoom) * r, 1, 1).data]; })()"
    )
    assert seen.app(second) == [0, 0, 0, 0]
    written(store, "other", np.ones((300, 260), np.uint8), store.journal("other", "f" * 16))
    seen.until(f"{second}[3] > 100")
    # Another label that comes before it is not taken for it.
    store.create_label("another", classes=default_classes(2), unit_px=512).write_record({})
    seen.until("app.sources[1].labels.length === 2")
    assert seen.app("app.compareTarget().info.name") == "other"
    seen.until(f"{second}[3] > 100")
    assert seen.complaints == []


@pytest.mark.slow
def test_tiles_of_a_large_slide_come_quickly(visit, tmp_path):
    """8448 x 8448 px: the 95th percentile of tile times while a person moves about."""
    import importlib.util
    from pathlib import Path

    where = Path(__file__).with_name("conftest.py")
    spec = importlib.util.spec_from_file_location("browser_stores", where)
    stores = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stores)
    rng = np.random.default_rng(0)
    small = rng.integers(0, 255, (3, 132, 132), dtype=np.uint8)
    image = np.ascontiguousarray(np.kron(small, np.ones((1, 64, 64), dtype=np.uint8)))
    mask = (image[0] > 128).astype(np.uint8) + (image[1] > 200)
    stores.build_store(
        tmp_path / "large.zarr", image, {"unet": mask.astype(np.uint8)}, mpp=0.25, unit_px=4096
    )
    seen = visit(tmp_path / "large.zarr")
    times: list[float] = []
    seen.page.on(
        "requestfinished",
        lambda request: (
            times.append(request.timing["responseEnd"] - request.timing["requestStart"])
            if "/t/0/" in request.url
            else None
        ),
    )
    seen.settle()
    for y, x, zoom in [(4000, 4000, 1), (1000, 7000, 0.5), (8000, 500, 2), (4224, 4224, 0.2)]:
        seen.app(f"app.goTo({y}, {x}, {zoom})")
        seen.page.wait_for_timeout(1000)
        seen.settle()
    assert len(times) > 40
    slowest = float(np.percentile(times, 95))
    print(f"{len(times)} tiles, 95th percentile {slowest:.0f} ms")
    assert slowest < 3000, "a bound for a busy machine; the figure printed is the measure"
    assert seen.complaints == []


def test_a_store_without_a_mask_can_be_chosen(visit, two_stores):
    seen = visit(*two_stores)
    assert seen.page.locator("#label-select option").all_inner_texts() == [
        "a.zarr · unet",
        "b.zarr · no mask",
    ]
    seen.page.select_option("#label-select", "1.0")
    seen.until("document.title.startsWith('b.zarr')")
    seen.settle()
    assert seen.page.locator("#channels li").count() == 2
    seen.page.keyboard.press("Escape")
    seen.page.locator("#label-select").blur()
    seen.page.keyboard.press("l")
    seen.until("document.title.startsWith('a.zarr')")
    assert seen.complaints == []


def test_an_object_is_not_marked_in_another_store(visit, two_stores):
    seen = visit(*two_stores)
    seen.settle()
    seen.page.keyboard.press("n")
    seen.until("app.found && app.found.box")
    seen.until("document.getElementById('object-note').textContent.includes('µm², at')")
    seen.page.keyboard.press("l")
    seen.until("document.title.startsWith('b.zarr')")
    assert seen.app("app.found") is None
    assert seen.page.inner_text("#object-note") == ""


def test_a_link_to_another_store_in_the_same_tab(visit, two_stores):
    seen = visit(*two_stores)
    before = len(seen.requests)
    seen.page.evaluate("location.hash = '#source=1&panel=0'")
    seen.until("document.title.startsWith('b.zarr')")
    seen.settle()
    assert seen.page.locator("#channels li").count() == 2
    assert seen.page.locator("#label-select").input_value() == "1.0"
    assert not seen.page.locator("#panel").is_visible()
    asked = [url for url in seen.requests[before:] if "/t/1/image/" in url]
    assert asked
    assert all("c=0%3A" in url for url in asked), "with the channels of that store"
    assert seen.complaints == []


@pytest.mark.parametrize(
    ("asked", "place"),
    [("40, 30", (40, 30, 1)), ("40 30 2", (40, 30, 2)), ("y 40, x 30 px", (40, 30, 1)),
     ("40, 30, 9999", (40, 30, 24)), ("40, 30, -2", None), ("40, 30, 0", None),
     ("1,000, 2,000", None), ("40", None), ("-1, 30", None), ("300, 30", None)],
)  # fmt: skip
def test_a_place_that_is_typed(visit, two_stores, asked, place):
    seen = visit(two_stores[0])
    seen.settle()
    before = seen.app("app.paneA.place()")
    seen.page.fill("#goto-text", asked)
    seen.page.click("#goto button")
    if place is None:
        assert "Type y and x in px" in seen.page.inner_text("#toast")
        place = (before["y"], before["x"], before["zoom"])
    at = "(({ y, x, zoom }) => [y, x, zoom])(app.paneA.place(true))"
    seen.until(f"{at}.every((part, index) => Math.abs(part - {list(place)}[index]) < 0.01)")
    assert seen.complaints == []


def test_a_link_far_off_shows_the_slide(visit, two_stores):
    seen = visit(two_stores[0], hash_="#y=-900000&x=5&zoom=200")
    seen.settle()
    zoom, y, height = (
        seen.app(f"app.paneA.{one}") for one in ("view().zoom", "place().y", "view().height")
    )
    assert zoom == pytest.approx(24)
    assert y + height / zoom / 2 > 0, "some of it is on the screen"
    assert seen.complaints == []


def test_no_object_is_passed_over_once_other_classes_are_shown(visit, tmp_path):
    image = np.zeros((3, 300, 260), np.uint8)
    path = str(tmp_path / "s.zarr")
    store = create_store(path, channels=3, dtype="uint8", extent=(300, 260), unit_px=512)
    label = store.create_label("m", classes=default_classes(3), unit_px=512)
    mask = np.zeros((300, 260), np.uint8)
    mask[20:24, 20:24] = mask[60:64, 20:24] = 1
    mask[100:104, 20:24] = mask[140:144, 20:24] = 2
    for level, pixels in ((store.image(0), image), (label.level(0), mask)):
        level.write_unit(level.grid.unit(0, 0), pixels)
    seen = visit(store.location)
    seen.settle()
    for row in (22, 62):
        seen.page.keyboard.press("n")
        seen.until(f"app.found && app.found.y === {row}")
    seen.page.get_by_label("class 1", exact=True).uncheck()
    for row in (102, 142):
        seen.page.keyboard.press("n")
        seen.until(f"app.found.y === {row}")


@pytest.mark.parametrize(
    "spoilt",
    ["source=-1", "source=0.5", "label=0.5", "compare=foo", "mode=%22]", "zoom=0", "opacity=900",
     "source=1&channels=0:5:", "source=1&channels=0:1:9:zz:1", "colors=1:zz", "swipe=-9",
     "__proto__=1", "constructor=1", "y=1e300&x=5&zoom=1", "y=5&x=5&zoom=1e-300"],
)  # fmt: skip
def test_what_is_spoilt_of_a_link_is_passed_over(visit, two_stores, spoilt):
    seen = visit(*two_stores, hash_=f"#opacity=70&{spoilt}")
    seen.settle()
    assert seen.app("app.settings.opacity") == 70
    assert not seen.app("document.getElementById('toast').textContent")
    assert re.match(r"[ab].zarr", seen.page.inner_text("#title"))
    assert seen.page.locator('input[name="compare"]:checked').count() == 1
    assert seen.complaints == []


def test_a_class_that_only_full_resolution_shows_is_drawn(visit, tmp_path):
    path = tmp_path / "theirs.zarr"
    store = create_store(
        str(path), channels=1, dtype="uint8", extent=(2600, 300), mpp=None, channel_names=("a",),
        channel_colors=(), rgb=False, unit_px=1024,
    )  # fmt: skip
    label = store.create_label("m", classes=default_classes(2), unit_px=1024)
    mask = np.zeros((2600, 300), np.uint8)
    mask[1300, 150] = 7  # nobody listed it, and no coarser level has it
    for level in (label.level(k) for k in range(label.n_levels)):
        for unit in level.grid:
            level.write_unit(unit, np.ascontiguousarray(mask[unit.box.slices]))
        mask = reduce_label(mask)
    seen = visit(path, hash_="#y=1300&x=150&zoom=8")
    seen.settle()
    seen.drawn(1300, 150, (128, 128, 128), 128)
