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
