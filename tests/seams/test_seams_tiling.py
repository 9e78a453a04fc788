"""Tiled equals whole: every exact variant, in float64 to 1e-9 and in float32 label by label.

The reference is the level padded once at its true borders by mirror reflection and run as one
tensor (DESIGN.md §4).
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tilepipe.infer import Engine
from tilepipe.infer.account import Account
from tilepipe.infer.blend_error import estimate_blend_error
from tilepipe.infer.cutting import hull_of
from tilepipe.infer.gate import gate_of
from tilepipe.infer.network import TileNetwork
from tilepipe.infer.openvino import openvino_fits
from tilepipe.infer.plans import plan_for
from tilepipe.models import Model, load_model
from tilepipe.spec import JobSpec
from tilepipe.tiling import Box, Tile, TilePlan, read_mirrored, round_up

EXACT = [
    ("unet", {}),
    ("unet-same", {}),
    ("unet-bilinear", {"align_corners": False}),
    ("unetpp", {}),
    ("unet3plus", {}),
]
NEVER = [("unet-dilated", {}), ("unet-bilinear", {"align_corners": True})]


def crop_of(data: Path, shape) -> NDArray[np.uint8]:
    import tifffile

    image = tifffile.imread(data / "wsi" / "CMU-1-Small-Region.svs")
    rows, columns = shape
    return np.ascontiguousarray(image[700 : 700 + rows, 600 : 600 + columns].transpose(2, 0, 1))


def drawn(shape) -> NDArray[np.uint8]:
    """Texture without the real data: waves and noise."""
    rng = np.random.default_rng(1)
    rows, columns = np.mgrid[0 : shape[0], 0 : shape[1]]
    waves = 128 + 70 * np.sin(rows / 9) * np.cos(columns / 13)
    return np.clip(waves + rng.normal(0, 25, (3, *shape)), 0, 255).astype(np.uint8)


def reader(image):
    return lambda box: image[(slice(None), *box.slices)]


def whole_logits(model: Model, image, plan: TilePlan, precision: str) -> torch.Tensor:
    """(K, y, x): the level padded once and run as one tensor."""
    height, width = image.shape[1:]
    locality = model.locality
    halo = plan.halo_px
    sides = [
        locality.next_legal(round_up(side, plan.alignment_px) + 2 * halo)
        for side in (height, width)
    ]
    padded = read_mirrored(
        reader(image), Box(-halo, -halo, sides[0] - halo, sides[1] - halo), (height, width)
    )
    network = TileNetwork(model, plan, dtype=image.dtype, precision=precision, output="logits")
    with torch.inference_mode():
        logits = network.network(network.normalise(torch.from_numpy(padded)[None]))[0]
    crop = plan.crop_px
    return logits[:, crop : crop + height, crop : crop + width]


def plan_of(model: Model, extent, *, unit_px: int, tile_px: int | None, **spec) -> TilePlan:
    plan, _ = plan_for(model, extent, JobSpec(tile=tile_px, **spec), unit_px=unit_px)
    return plan


def small(name: str, options, base: int = 2) -> Model:
    return load_model(name, weights="random:1", base=base, options=options)


@pytest.mark.parametrize(("name", "options"), EXACT)
def test_tiled_is_whole_in_float64(name, options):
    model = small(name, options)
    image = drawn((187, 150))
    tile = model.next_legal(64 + 2 * model.locality.halo_px)
    plan = plan_of(model, (187, 150), unit_px=128, tile_px=tile)
    assert plan.mode == "exact"
    whole = whole_logits(model, image, plan, "fp64")
    tiled = tiled_logits(model, image, plan)
    assert whole.std() > 1e-3
    assert float((tiled - whole).abs().max()) < 1e-9


def tiled_logits(model: Model, image, plan: TilePlan) -> torch.Tensor:
    """The same in float64 to the end."""
    network = TileNetwork(model, plan, dtype=image.dtype, precision="fp64", output="logits")
    out = torch.full((model.n_outputs, *plan.extent), torch.nan, dtype=torch.float64)
    for unit in plan.grid:
        for tile in plan.tiles(unit.box):
            out[(slice(None), *tile.core.slices)] = tile_logits(network, image, plan, tile)
    return out


def tile_logits(network: TileNetwork, image, plan: TilePlan, tile: Tile) -> torch.Tensor:
    """(K, y, x) of the tile's core."""
    pixels = read_mirrored(reader(image), tile.padded, plan.extent)
    start, (height, width) = plan.crop_px, tile.core.shape
    with torch.inference_mode():
        logits = network.network(network.normalise(torch.from_numpy(pixels)[None]))[0]
    return logits[:, start : start + height, start : start + width]


def labels(model: Model, image, plan: TilePlan, **engine) -> NDArray[np.uint8]:
    made = Engine(model, plan=plan, **engine)
    out = np.full(plan.extent, 255, np.uint8)
    for unit in plan.grid:
        out[unit.box.slices] = made.segment(reader(image), unit.box).ids
    made.close()
    return out


@pytest.mark.parametrize(("name", "options"), EXACT)
def test_labels_are_byte_equal_for_any_cut_in_float32(name, options):
    model = small(name, options, base=4)
    extent = (211, 173)
    image = drawn(extent)
    plan = plan_of(model, extent, unit_px=512, tile_px=None)
    expected = model.class_ids(whole_logits(model, image, plan, "fp32")[None])[0].numpy()
    assert 0.005 < expected.mean() < 0.995
    halo = model.locality.halo_px
    for unit_px, core, batch, threads in ((256, None, 1, 2), (128, 64, 2, 1)):
        tile = None if core is None else model.next_legal(core + 2 * halo)
        cut = plan_of(model, extent, unit_px=unit_px, tile_px=tile)
        found = labels(model, image, cut, batch=batch, threads=threads)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.skipif(bool(openvino_fits("cpu", "fp32")), reason="no OpenVINO here")
@pytest.mark.parametrize(
    ("name", "options"), [EXACT[0], *(pytest.param(*e, marks=pytest.mark.slow) for e in EXACT[1:])]
)
def test_openvino_gives_the_same_labels_for_any_cut(name, options):
    model = small(name, options, base=4)
    extent = (160, 150)
    image = drawn(extent)
    cuts = []
    for unit_px, core, batch in ((256, 160, 1), (128, 64, 2)):
        tile = model.next_legal(core + 2 * model.locality.halo_px)
        plan = plan_of(model, extent, unit_px=unit_px, tile_px=tile)
        cuts.append(labels(model, image, plan, backend="openvino", batch=batch, threads=1))
    np.testing.assert_array_equal(cuts[0], cuts[1])
    on_torch = labels(model, image, plan)
    # Another back-end has other last bits: labels may differ where two classes tie.
    assert (cuts[0] != on_torch).mean() < 1e-4


def test_a_halo_one_alignment_too_small_shows():
    model = small("unet-same", {})
    image = drawn((128, 128))
    plan = plan_of(model, (128, 128), unit_px=128, tile_px=model.next_legal(64 + 192))
    narrow = replace(plan, halo_px=plan.halo_px - 48, input_px=plan.input_px - 96)
    whole = whole_logits(model, image, plan, "fp64")
    assert float((tiled_logits(model, image, narrow) - whole).abs().max()) > 1e-9


def test_blended_is_the_same_for_any_unit():
    model = small("unet-dilated", {})
    image = drawn((300, 220))
    masks = []
    for unit_px in (512, 100):
        plan = plan_of(model, (300, 220), unit_px=unit_px, tile_px=260, halo=40)
        assert plan.mode == "blended"
        masks.append(labels(model, image, plan, batch=1 + unit_px % 3))
    np.testing.assert_array_equal(masks[0], masks[1])


def test_the_gate_over_tiles_is_the_gate_of_the_whole():
    model = load_model("unet3plus-cgm", weights="random:1", base=2)
    assert model.has_gate
    image = drawn((150, 120))
    spec = {"cgm": "slide"}
    plan = plan_of(model, (150, 120), unit_px=128, tile_px=288, **spec)
    assert plan.mode == "two-pass"
    whole = plan_of(model, (150, 120), unit_px=256, tile_px=160 + 224, **spec)
    expected = _gate64(model, image, whole)
    assert _gate64(model, image, plan) == pytest.approx(expected, abs=1e-9)
    engine = Engine(model, plan=plan)
    over_tiles = max(engine.gate(reader(image), unit.box) for unit in plan.grid)
    assert over_tiles == pytest.approx(expected, abs=1e-4)


def _gate64(model: Model, image, plan: TilePlan) -> float:
    found = []
    for unit in plan.grid:
        tiles = list(plan.tiles(unit.box))
        hull = hull_of(tiles)
        pixels = read_mirrored(reader(image), hull, plan.extent)
        found.append(gate_of(model, plan, tiles, hull, pixels, Account(), precision="fp64"))
    return max(found)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("name", "options"), EXACT)
def test_a_real_crop_of_1500_px(data, name, options):
    model = small(name, options, base=4)
    image = crop_of(data, (1500, 1500))
    halo = model.locality.halo_px
    first = plan_of(model, (1500, 1500), unit_px=512, tile_px=None)
    whole = whole_logits(model, image, first, "fp64")
    expected = model.class_ids(whole_logits(model, image, first, "fp32")[None])[0].numpy()
    for unit_px in (512, 1024):
        for core in (128, 384, 512):
            tile = model.next_legal(core + 2 * halo)
            plan = plan_of(model, (1500, 1500), unit_px=unit_px, tile_px=tile)
            difference = (tiled_logits(model, image, plan) - whole).abs().max()
            assert float(difference) < 1e-9
            np.testing.assert_array_equal(labels(model, image, plan), expected)


def by_rows(self: torch.nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """``Conv2d.forward`` 256 rows at a time: float64 unfolds its input nine times in memory."""
    reach = self.dilation[0] * (self.kernel_size[0] - 1)
    (above, _), height = self.padding, x.shape[2]
    out = x.new_empty((len(x), self.out_channels, height + 2 * above - reach, x.shape[3]))
    for start in range(0, out.shape[2], 256):
        stop = min(out.shape[2], start + 256)
        first, last = start - above, stop - above + reach
        sides = (above, above, max(0, -first), max(0, last - height))
        piece = torch.nn.functional.pad(x[:, :, max(0, first) : min(last, height)], sides)
        out[:, :, start:stop] = torch.nn.functional.conv2d(
            piece, self.weight, self.bias, dilation=self.dilation
        )
    return out


def strip_logits(model: Model, image, rows: range, halo: int) -> torch.Tensor:
    """(K, y, x) in float64 of the rows, with ``halo`` rows of mirrored context and no more columns
    than the strip has.
    """
    height, width = image.shape[1:]
    bottom = rows.start - halo + model.next_legal(len(rows) + 2 * halo)
    box = Box(rows.start - halo, 0, bottom, width)
    pixels = torch.from_numpy(read_mirrored(reader(image), box, (height, width)))[None]
    with torch.inference_mode():
        return model.module(model.normalise(pixels / 255))[0, :, halo : halo + len(rows)]


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", ["u2net", "u2netp"])
def test_u2net_on_a_strip_of_a_real_crop(data, name):
    """3296 px of halo all round fit no small machine; along one axis, with 64 px of the other in
    every tensor, they do: all tiles of all cuts. Rows and columns in turn.
    """
    model = small(name, {}, base=8)
    model.module.double()
    halo = model.locality.halo_px
    assert halo == 3296
    image = crop_of(data, (1500, 1500)).astype(np.float64)
    for strip in (image[:, :, 700:764], image[:, 300:364].transpose(0, 2, 1)):
        whole = strip_logits(model, strip, range(1500), halo)
        assert whole.std() > 1e-3
        for unit, core in itertools.product((512, 1024), (128, 384, 512)):
            for first in range(0, 1500, unit):
                last = min(first + unit, 1500)
                for start in range(first, last, core):
                    rows = range(start, min(start + core, last))
                    tile = strip_logits(model, strip, rows, halo)
                    assert float((tile - whole[:, rows.start : rows.stop]).abs().max()) < 1e-9
        narrow = strip_logits(model, strip, range(512, 640), halo // 8)
        assert float((narrow - whole[:, 512:640]).abs().max()) > 1e-9


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", ["u2net", "u2netp"])
def test_u2net_labels_on_a_strip_are_equal_in_float32(data, name):
    model = small(name, {}, base=8)
    halo = model.locality.halo_px
    image = crop_of(data, (1500, 1500)).astype(np.float32)
    for strip in (image[:, :, 700:764], image[:, 300:364].transpose(0, 2, 1)):
        whole = strip_logits(model, strip, range(1500), halo).argmax(0)
        assert 0.005 < float(whole.float().mean()) < 0.995
        for core in (128, 384, 512):
            for start in range(0, 1500, core):
                rows = range(start, min(start + core, 1500))
                tile = strip_logits(model, strip, rows, halo).argmax(0)
                assert torch.equal(tile, whole[rows.start : rows.stop])


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_u2net_on_a_real_crop(data, monkeypatch):
    """In both directions at once, one tile of each cut: 7104 px a side, minutes and 9 GB each."""
    monkeypatch.setattr(torch.nn.Conv2d, "forward", by_rows)
    model = load_model("u2net", weights="random:1", base=2, classes=1)
    image = crop_of(data, (1500, 1500))
    halo = model.locality.halo_px
    first = plan_of(model, (1500, 1500), unit_px=512, tile_px=512 + 2 * halo, exact=True)
    assert first.mode == "exact"
    whole = whole_logits(model, image, first, "fp64")
    assert whole.std() > 1e-3
    for unit_px, core, at in ((512, 128, 1), (512, 384, 17), (1024, 512, 4)):
        tile_px = model.next_legal(core + 2 * halo)
        plan = plan_of(model, (1500, 1500), unit_px=unit_px, tile_px=tile_px, exact=True)
        tile = [tile for unit in plan.grid for tile in plan.tiles(unit.box)][at]
        network = TileNetwork(model, plan, dtype=image.dtype, precision="fp64", output="logits")
        found = tile_logits(network, image, plan, tile)
        difference = found - whole[(slice(None), *tile.core.slices)]
        assert float(difference.abs().max()) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), NEVER)
def test_the_error_estimate_brackets_the_true_error(data, name, options):
    model = small(name, options, base=4)
    image = crop_of(data, (1500, 1500))
    plan = plan_of(model, (1500, 1500), unit_px=512, tile_px=None)
    estimate = estimate_blend_error(model, plan, reader(image))
    whole = whole_logits(model, image, plan, "fp32")
    expected = model.class_ids(whole[None])[0].numpy()
    true = float((labels(model, image, plan) != expected).mean())
    assert true > 0
    assert true / 2 <= estimate.flips <= true * 2
