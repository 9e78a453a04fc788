"""``--tissue``: glass is background without the network, tissue is what it was."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tifffile
import zarr
from click.testing import CliRunner
from PIL import Image
from scipy import ndimage

from tilepipe.cli.main import main
from tilepipe.pipeline.tissue import tissue_share
from tilepipe.slide import TissueMask
from tilepipe.tiling import Box, plan_tiles

OPTIONS = ["--model", "unet", "--weights", "random:1", "--base", "2", "--no-tune", "--unit", "256",
           "--tile", "316", "--quiet"]  # fmt: skip
SIDE, EDGE = 1200, 330


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    """Tissue on the left, bare glass from x = 330 on."""
    rng = np.random.default_rng(0)
    field = ndimage.gaussian_filter(rng.random((SIDE, SIDE, 3)), (3, 3, 0))
    field = (field - field.min()) / np.ptp(field)
    image = (np.array([150, 60, 130]) + 100 * (field - 0.5)).clip(0, 255)
    image[:, EDGE:] = 243 + rng.normal(0, 1, (SIDE, SIDE - EDGE, 1))
    path = tmp_path_factory.mktemp("slides") / "half.tif"
    tifffile.imwrite(path, image.astype(np.uint8), tile=(256, 256), photometric="rgb")
    return path


def mask_of(slide, out, *options):
    result = CliRunner().invoke(main, ["run", str(slide), "-o", str(out), *OPTIONS, *options])
    assert result.exit_code == 0, result.output
    group = zarr.open_group(str(out), mode="r")["labels/unet"]
    return group["0"][:], group.attrs["tilepipe"]


@pytest.fixture(scope="module")
def everywhere(slide, tmp_path_factory):
    mask, record = mask_of(slide, tmp_path_factory.mktemp("off") / "off.zarr", "--tissue", "off")
    assert record["tissue"]["tiles_skipped"] == 0
    assert 0.01 < mask[:, :EDGE].mean() < 0.99
    return mask


@pytest.mark.parametrize("options", [(), ("--in-place",), ("--workers", "1")])
def test_glass_is_skipped_and_tissue_is_what_it_was(slide, everywhere, tmp_path, options):
    mask, record = mask_of(slide, tmp_path / "auto.zarr", "--tissue", "auto", *options)
    tissue = record["tissue"]
    assert tissue["tiles_skipped"] > 0.4 * tissue["tiles"]
    np.testing.assert_array_equal(mask[:, :EDGE], everywhere[:, :EDGE])
    # Far from tissue nothing is computed: background.
    assert not mask[:, EDGE + 450 :].any()


def test_what_was_skipped_is_that_of_the_whole_mask_after_several_runs(slide, tmp_path):
    _, whole = mask_of(slide, tmp_path / "whole.zarr", "--tissue", "auto")
    for part in ("0/2", "1/2"):
        mask_of(slide, tmp_path / "parts.zarr", "--tissue", "auto", "--part", part)
    _, parts = mask_of(slide, tmp_path / "parts.zarr", "--tissue", "auto")
    assert parts["tissue"] == whole["tissue"]
    assert whole["tissue"]["skipped_checked_px"] > 0


def test_the_bill_counts_what_is_to_be_computed(slide, tmp_path, monkeypatch):
    def bill(tissue):
        result = CliRunner().invoke(
            main,
            ["run", str(slide), "-o", str(tmp_path / "o.zarr"), *OPTIONS, "--tissue", tissue,
             "--dry-run", "--json"],
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        return json.loads(result.output)

    whole, found = bill("off"), bill("auto")
    assert whole["computed_share"] == 1.0
    # Tissue is 0.275 of the slide.
    assert 0.2 < found["computed_share"] < 0.4
    assert any("tissue on" in note for note in found["notes"])
    nothing = Image.fromarray(np.zeros((120, 120), np.uint8))
    nothing.save(tmp_path / "none.png")
    assert bill(str(tmp_path / "none.png"))["computed_share"] == 0.0
    monkeypatch.setattr("tilepipe.pipeline.tissue._MANY_PX", SIDE * SIDE)
    told = bill("auto")
    assert told["computed_share"] == 1.0
    assert any("all counts as tissue" in note for note in told["notes"])
    assert not (tmp_path / "o.zarr").exists()


def test_a_mask_image_says_where(slide, everywhere, tmp_path):
    wanted = np.zeros((120, 120), np.uint8)
    wanted[:40] = 255
    Image.fromarray(wanted).save(tmp_path / "where.png")
    mask, record = mask_of(slide, tmp_path / "out.zarr", "--tissue", str(tmp_path / "where.png"))
    np.testing.assert_array_equal(mask[:400], everywhere[:400])
    assert not mask[800:].any()
    tissue = record["tissue"]
    assert tissue["tiles_skipped"] > 0
    assert json.dumps(tissue)


def test_a_mask_image_that_is_none_is_one_clear_error(slide, tmp_path):
    (tmp_path / "where.png").write_text("no image")
    result = CliRunner().invoke(
        main,
        ["run", str(slide), "-o", str(tmp_path / "o.zarr"), *OPTIONS, "--tissue",
         str(tmp_path / "where.png")],
    )  # fmt: skip
    assert result.exit_code == 1
    assert "not a mask image" in result.output


def test_tissue_is_looked_for_once_a_job_and_kept_beside_the_mask(slide, tmp_path, monkeypatch):
    out = tmp_path / "out.zarr"
    mask, _ = mask_of(slide, out, "--tissue", "auto")
    kept = out / "tilepipe" / "tissue" / "unet.png"
    with Image.open(kept) as image:
        shown = np.asarray(image)
    assert shown[:, : int(0.9 * EDGE * shown.shape[1] / SIDE)].all()
    assert not shown[:, int(1.2 * EDGE * shown.shape[1] / SIDE) :].any()

    looks = []
    monkeypatch.setattr("tilepipe.pipeline.tissue.tissue_mask", lambda s: looks.append(s))
    for record in (out / "tilepipe" / "journal" / "unet" / "segment").rglob("*.json"):
        record.unlink()
    again, _ = mask_of(slide, out, "--tissue", "auto")
    np.testing.assert_array_equal(again, mask)
    assert not looks
    monkeypatch.undo()

    raw = kept.read_bytes()
    for torn in (b"", raw[: len(raw) // 2], b"\0" * len(raw)):
        kept.write_bytes(torn)
        mask_of(slide, out, "--tissue", "auto")
        assert kept.read_bytes() == raw

    mask_of(slide, out, "--tissue", "off", "--overwrite")
    assert not kept.exists()


def test_a_slide_without_glass_is_segmented_everywhere(everywhere, tmp_path):
    path = tmp_path / "full.tif"
    image = np.random.default_rng(1).integers(80, 180, (500, 500, 3)).astype(np.uint8)
    tifffile.imwrite(path, image, tile=(256, 256), photometric="rgb")
    _, record = mask_of(path, tmp_path / "out.zarr", "--tissue", "auto")
    assert record["tissue"]["tiles"] > 0
    assert record["tissue"]["tiles_skipped"] == 0


def test_verify_compares_what_was_computed_and_the_journal_knows_what(slide, tmp_path):
    out = tmp_path / "out.zarr"
    _, record = mask_of(slide, out, "--tissue", "auto", "--tile", "444")
    assert record["settings"]["trims"]
    assert record["tissue"]["skipped_px"] > 0.5 * SIDE * SIDE
    computed, in_part = 0, 0
    for path in (out / "tilepipe" / "journal" / "unet" / "segment").rglob("*.json"):
        unit = json.loads(path.read_text())
        boxes = unit["facts"].get("computed")
        side = min(256, SIDE - 256 * unit["ix"]) * min(256, SIDE - 256 * unit["iy"])
        px = side if boxes is None else sum((b[2] - b[0]) * (b[3] - b[1]) for b in boxes)
        computed += px
        in_part += 0 < px < side
    assert in_part == 5
    assert computed == SIDE * SIDE - record["tissue"]["skipped_px"]
    told = CliRunner().invoke(main, ["verify", str(out), "--json", "--samples", "6"])
    assert told.exit_code == 0, told.output
    certificate = json.loads(told.stdout)
    assert certificate["samples"] == 6
    assert 0 < certificate["sampled_px"] <= 6 * 256 * 256


def test_the_schedule_is_told_how_much_of_a_unit_the_device_computes():
    full = np.zeros((16, 16), bool)
    full[:8, :8] = True
    mask = TissueMask(full, (32.0, 32.0), "")
    plan = plan_tiles(
        (256, 256), unit_px=64, context_px=8, alignment_px=8, margin_px=0, least_input_px=16,
        input_step_px=8, input_px=48,
    )  # fmt: skip
    share = tissue_share(mask, plan=plan, downsample=2)
    assert share(Box(0, 0, 64, 64)) == 1.0
    assert share(Box(192, 192, 256, 256)) == 0.0
    # Its tiles see 8 px of tissue, and one px of the mask around: little, but it is read.
    assert share(Box(0, 128, 64, 192)) == 0.25
    assert 0.25 < share(Box(64, 64, 128, 128)) < 1.0


def test_blended_tiles_beside_skipped_ones_pass_verification(slide, tmp_path):
    out = tmp_path / "out.zarr"
    _, record = mask_of(
        slide, out, "--model", "unet-dilated", "--name", "unet", "--tile", "489", "--halo", "64",
        "--tissue", "auto",
    )  # fmt: skip
    assert record["settings"]["plan"]["mode"] == "blended"
    assert not record["settings"]["trims"]
    assert 0 < record["tissue"]["skipped_px"] < SIDE * SIDE
    told = CliRunner().invoke(main, ["verify", str(out), "--json", "--samples", "12"])
    assert told.exit_code == 0, told.output
    certificate = json.loads(told.stdout)
    assert certificate["flips"] == 0
    assert certificate["sampled_px"] > 0
