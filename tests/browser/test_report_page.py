"""``report.html`` in a real browser, offline: what it shows is what ``inspect --json`` tells."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner
from scipy import ndimage

from tilepipe.cli.main import main
from tilepipe.store import create_store, open_store, reduce_image, reduce_label

pytestmark = pytest.mark.timeout(600)

SIDES = (1500, 1300)
MPP = (0.5, 0.25)
NAMES = ("background", "nucleus", "stroma")


def write_pyramid(levels, reduce, pixels):
    for level in levels:
        for unit in level.grid:
            level.write_unit(unit, np.ascontiguousarray(pixels[(..., *unit.box.slices)]))
        pixels = reduce(pixels)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """A store with a mask and its objects, some in several pieces, and all that a job records."""
    from tilepipe.spec import LabelClass

    path = tmp_path_factory.mktemp("report") / "slide <1>.zarr"
    rng = np.random.default_rng(0)
    smooth = ndimage.gaussian_filter(rng.random(SIDES), 4)
    mask = np.digitize(smooth, np.quantile(smooth, [0.8, 0.95])).astype(np.uint8)
    image = np.stack([250 - 60 * mask, 240 - 90 * mask, 245 - 40 * mask]).astype(np.uint8)
    store = create_store(
        str(path), channels=3, dtype="uint8", extent=SIDES, mpp=MPP,
        channel_names=("red", "green", "blue"), channel_colors=(), rgb=True, unit_px=1024,
    )  # fmt: skip
    versions = {"tilepipe": "0.1.0", "torch": "2.13.0+cpu"}
    store.write_record(
        {"state": "done", "versions": versions,
         "source": {"path": "/slides/one.svs", "format": "svs"}}
    )  # fmt: skip
    write_pyramid([store.image(k) for k in range(store.n_levels)], reduce_image, image)
    colors = ((0, 0, 0, 0), (0, 160, 135, 255), (230, 75, 53, 255))
    classes = [
        LabelClass(name=name, color=color) for name, color in zip(NAMES, colors, strict=True)
    ]
    label = store.create_label("unet", classes=classes, unit_px=1024)
    write_pyramid([label.level(k) for k in range(label.n_levels)], reduce_label, mask)
    counts = np.bincount(mask.reshape(-1), minlength=3).tolist()
    label.write_record(
        {
            "state": "done",
            "plan": {"mode": "exact", "core_px": 1024, "halo_px": 92, "context_px": 92,
                     "unit_px": 1024, "input_px": 1208},
            "model": {"name": "unet", "source": "bundled", "sha256": "d8b43f3552ac7c8e" * 4},
            "settings": {"device": "cpu", "precision": "bf16", "backend": "torch"},
            "account": {"wall_s": 1953.5614, "lanes": 3, "shares": {
                "read": 2.368, "compute": 66.411, "host-to-device": 0.037, "idle": 31.184}},
            "class_px": dict(zip(NAMES, counts, strict=True)),
            "mpix_per_s": 3.4712, "versions": versions,
            "started": "2026-01-02T03:04:05Z", "finished": "2026-01-02T03:36:39Z",
            "verified": {
                "label": "unet", "passed": True, "date": "2026-01-02T04:00:00Z", "samples": 8,
                "sampled_px": 394240, "flips": 12, "flip_share": 3.0438e-05, "flips_allowed": 0.001,
                "ties": 0, "max_probability_error": 0.0021, "precision": "bf16", "seconds": 12.5,
                "notes": ["a <note>"], "places": [],
            },
        }
    )  # fmt: skip
    pieces, _ = ndimage.label(mask == 2)
    ids = ((pieces + 1) // 2).astype(np.int32)  # two pieces an object
    objects = store.create_label("unet-instances", classes=classes[:1], unit_px=1024, dtype="int32")
    write_pyramid([objects.level(k) for k in range(objects.n_levels)], reduce_label, ids)
    objects.write_record(
        {"state": "done", "instances_of": "unet", "count": int(ids.max()), "versions": versions,
         "rule": {"text": "4-connected regions of each class", "connectivity": 4}}
    )  # fmt: skip
    return path, mask, ids


@pytest.fixture(scope="module")
def page(browser, result, tmp_path_factory):
    """The report of ``result``, open offline, with what it asked for and complained of."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    told = CliRunner().invoke(main, ["report", str(result[0]), "-o", str(path)])
    assert told.exit_code == 0, told.output
    context = browser.new_context(viewport={"width": 1280, "height": 800}, offline=True)
    page = context.new_page()
    page.complaints, page.requests = [], []
    page.on("console", lambda message: page.complaints.append(message.text))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("requestfailed", lambda request: page.complaints.append(request.url))
    page.on("request", lambda request: page.requests.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_load_state("networkidle")
    yield page
    context.close()


@pytest.fixture(scope="module")
def inspected(result):
    told = CliRunner().invoke(main, ["inspect", str(result[0]), "--json"])
    return json.loads(told.output)


def at(facts, path):
    for part in path.split("."):
        facts = facts[int(part)] if isinstance(facts, list) else facts[part]
    return facts


def same(shown, value):
    """Tell whether text on the page says ``value``, to the digits shown."""
    if shown.endswith("…"):
        return len(shown) > 12 and str(value).startswith(shown[:-1])
    if isinstance(value, str):
        return shown in (value, value.replace("T", " ").replace("Z", " UTC"))
    number = shown.replace(",", "").split(" ")
    if number[0] == "<":
        return 0 < value < float(number[1])
    decimals = len(number[0].partition(".")[2]) if "e" not in number[0] else 9
    return abs(float(number[0]) - value) <= 0.51 * 10.0**-decimals


def test_it_opens_offline_and_asks_nobody(page):
    assert page.complaints == []
    assert [url for url in page.requests if not url.startswith("data:")] == [page.url]
    assert page.title() == "slide <1>.zarr · tilepipe report"
    sizes = page.eval_on_selector_all("img", "all => all.map(one => one.naturalWidth)")
    # The overview, and a place without and with outlines, of the mask and of its objects.
    assert sizes == [650, 320, 320] * 2


def test_every_figure_is_what_inspect_tells(page, inspected):
    shown = page.evaluate(
        "() => [...document.querySelectorAll('[data-inspect]')].map((node) => [node.innerText,"
        " node.dataset.inspect, node.closest('[data-label]')?.dataset.label ?? null])"
    )
    wrong = [
        (path, text)
        for text, path, label in shown
        if not same(text, at(inspected if label is None else inspected["labels"][label], path))
    ]
    assert wrong == []
    keys = {path for _, path, label in shown if label == "unet"}
    assert keys >= {
        "state", "plan.core_px", "plan.halo_px", "model.sha256", "settings.precision",
        "mpix_per_s", "finished", "verified.flips", "verified.flip_share", "account.wall_s",
        "account.shares.host-to-device", "versions.torch",
    }  # fmt: skip
    assert {path for _, path, label in shown if label is None} == {
        "extent.0", "extent.1", "mpp.1", "ome_zarr", "source.path",
    }  # fmt: skip
    assert {path for _, path, label in shown if label == "unet-instances"} >= {"count", "rule.text"}


def rows(page, label):
    """Cells of the table of classes as shown: name → column → number, None for a dash."""
    columns, *found = page.eval_on_selector_all(
        f'[data-label="{label}"] table tr',
        "all => all.map(row => [...row.cells].map(cell => cell.innerText.trim()))",
    )
    return {
        name: {
            column: None if cell == "–" else float(cell.replace(",", "").removesuffix(" %"))
            for column, cell in zip(columns[1:], cells, strict=True)
        }
        for name, *cells in found
    }


def test_the_classes_are_those_of_inspect_and_of_the_mask(page, inspected, result):
    _, mask, _ = result
    told = inspected["labels"]["unet"]
    table = rows(page, "unet")
    um2 = MPP[0] * MPP[1]
    assert list(table) == list(told["class_px"])
    for value, (name, row) in enumerate(table.items()):
        px = told["class_px"][name]
        assert row["px"] == px == np.count_nonzero(mask == value)
        assert row["Share"] == pytest.approx(100 * px / mask.size, abs=0.0051)
        assert row["Area, mm²"] == pytest.approx(told["class_mm2"][name], abs=0.000051)
        assert told["class_mm2"][name] == pytest.approx(px * um2 / 1e6)
        objects = ndimage.label(mask == value)[1]
        assert row["Objects"] == (objects if value else None)
        if value:
            assert row["Mean object, µm²"] == pytest.approx(px * um2 / objects, abs=0.0051)


def test_the_objects_are_as_many_as_inspect_counts(page, inspected, result):
    _, _, ids = result
    count = inspected["labels"]["unet-instances"]["count"]
    row = rows(page, "unet-instances")["object"]
    assert row["Objects"] == count == ids.max()
    assert ndimage.label(ids)[1] > count, "objects in pieces are one"
    assert row["px"] == np.count_nonzero(ids)
    bars = page.eval_on_selector_all(
        '[data-label="unet-instances"] svg.chart rect', "all => all.map(one => +one.dataset.count)"
    )
    assert sum(bars) == count


@pytest.mark.parametrize("width", [1280, 360])
def test_nothing_is_wider_than_the_window(page, width):
    page.set_viewport_size({"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    if width < 640:
        names = page.evaluate("getComputedStyle(document.querySelector('td'), '::before').content")
        assert names == '"px"'


def test_it_prints_on_white_paper_two_pages_a_label(page):
    pdf = page.pdf(prefer_css_page_size=True, print_background=True)
    assert 2 <= pdf.count(b"/Type /Page\n") <= 4
    page.emulate_media(media="print")
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == "rgb(255, 255, 255)"
    page.emulate_media(media="screen")


def test_what_is_not_known_is_left_out(browser, result, tmp_path):
    """A mask without any record, on a slide of unknown pixel size, still makes a page."""
    store = create_store(
        str(tmp_path / "bare.zarr"), channels=1, dtype="uint8", extent=(64, 80), mpp=None,
        channel_names=("grey",), channel_colors=(), rgb=False, unit_px=512,
    )  # fmt: skip
    pixels = np.zeros((1, 64, 80), dtype=np.uint8)
    write_pyramid([store.image(k) for k in range(store.n_levels)], reduce_image, pixels)
    from tilepipe.spec import default_classes

    label = store.create_label("m", classes=default_classes(2), unit_px=512)
    write_pyramid([label.level(k) for k in range(label.n_levels)], reduce_label, pixels[0])
    path = tmp_path / "bare.html"
    assert CliRunner().invoke(main, ["report", store.location, "-o", str(path)]).exit_code == 0
    context = browser.new_context(offline=True)
    page = context.new_page()
    page.goto(path.as_uri())
    words = page.inner_text("main").replace("None yet: tilepipe verify", "")
    context.close()
    assert open_store(store.location).mpp is None
    for never in ("None", "nan", "undefined", "µm/px", "{"):
        assert never not in words
    assert "not recorded" in words.lower()
    assert "5,120" in words
