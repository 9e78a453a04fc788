"""Tiled equals whole: every exact variant, in float64 to 1e-9 and in float32 label by label.

The reference is the level padded once at its true borders by mirror reflection and run as one
tensor (DESIGN.md §4).
"""

from __future__ import annotations

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
from tilepipe.malloc import give_large_back
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
    made = Engine(model, plan=plan, trims=True, **engine)
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
    over_tiles = [engine.gate(reader(image), unit.box) for unit in plan.grid]
    assert tuple(map(max, *over_tiles)) == pytest.approx(expected, abs=1e-4)


def _gate64(model: Model, image, plan: TilePlan) -> tuple[float, ...]:
    found = []
    for unit in plan.grid:
        tiles = list(plan.tiles(unit.box))
        hull = hull_of(tiles)
        pixels = read_mirrored(reader(image), hull, plan.extent)
        found.append(gate_of(model, plan, tiles, hull, pixels, Account(), precision="fp64"))
    return tuple(map(max, *found)) if len(found) > 1 else found[0]


def test_the_gate_is_float32_on_a_gpu_too(monkeypatch):
    """``for_gpu`` has TF32 switched off, which is no float32."""
    model = load_model("unet3plus-cgm", weights="random:1", base=2)
    plan = plan_of(model, (150, 120), unit_px=128, tile_px=288, cgm="slide")
    tiles = list(plan.tiles(Box(0, 0, 128, 120)))
    pixels = np.zeros((3, 600, 600), np.uint8)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    with pytest.raises((AssertionError, RuntimeError)):  # there is no such GPU
        gate_of(model, plan, tiles, hull_of(tiles), pixels, Account(), "cuda:99")
    assert not torch.backends.cudnn.allow_tf32


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


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("name", ["u2net", "u2netp"])
def test_u2net_on_a_real_crop(data, monkeypatch, name):
    """3296 px of halo: tiles of 7104 to 7616 px, a minute and 11 GB each. Every tile of every cut;
    one that two cuts share is computed once.
    """
    monkeypatch.setattr(torch.nn.Conv2d, "forward", by_rows)
    model, image = narrow_u2net(name), crop_of(data, (1500, 1500))
    plans = u2net_plans(model)
    first = plans[0]
    whole = whole_logits(model, image, first, "fp64")
    assert whole.std() > 1e-3
    network = TileNetwork(model, first, dtype=image.dtype, precision="fp64", output="logits")
    tiles: dict[Box, Tile] = {}
    for tile in (t for plan in plans for unit in plan.grid for t in plan.tiles(unit.box)):
        kept = tiles.setdefault(tile.padded, tile)
        if tile.core.contains(kept.core):
            tiles[tile.padded] = tile
    assert len(tiles) == 22
    for tile in tiles.values():
        found = tile_logits(network, image, first, tile)
        difference = found - whole[(slice(None), *tile.core.slices)]
        assert float(difference.abs().max()) < 1e-9
    narrow = replace(first, halo_px=832, input_px=512 + 2 * 832)
    tile = next(iter(narrow.tiles(next(iter(narrow.grid)).box)))
    difference = tile_logits(network, image, narrow, tile) - whole[(slice(None), *tile.core.slices)]
    assert float(difference.abs().max()) > 1e-9


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("name", ["u2net", "u2netp"])
def test_u2net_labels_on_a_real_crop_are_equal_in_float32(data, name):
    model, image = narrow_u2net(name), crop_of(data, (1500, 1500))
    plans = u2net_plans(model)
    whole = whole_logits(model, image, plans[0], "fp32")
    expected = model.class_ids(whole[None])[0].numpy()
    assert 0.005 < expected.mean() < 0.995
    for plan in plans:
        np.testing.assert_array_equal(labels(model, image, plan), expected)


def narrow_u2net(name: str) -> Model:
    """One channel where the paper has 64, to fit the memory; the context is the same.

    With most seeds a ReLU cuts the deep stages of so narrow a U²-Net-p off: it would be tiled right
    with any halo. With these, what lies 800 px away still matters.
    """
    # After a job of a test before, blocks of gigabytes would leave holes in malloc's heap.
    give_large_back()
    weights = {"u2net": "random:1", "u2netp": "random:4"}[name]
    model = load_model(name, weights=weights, base=1)
    assert model.locality.halo_px == 3296
    return model


def u2net_plans(model: Model) -> list[TilePlan]:
    """Three tile sizes in units of two sizes."""
    return [
        plan_of(
            model,
            (1500, 1500),
            unit_px=unit_px,
            tile_px=core + 2 * model.locality.halo_px,
            exact=True,
        )
        for unit_px in (1024, 2048)
        for core in (512, 768, 1024)
    ]


@pytest.mark.parametrize("extent", [(640, 640), (645, 613)])
@pytest.mark.parametrize("reference_px", [600, 588])
def test_blended_tiles_that_miss_no_context_have_no_error(extent, reference_px):
    """Of valid convolutions every output is right: the large tile begins on the alignment, too."""
    model = small("unet", {"depth": 3})
    image = drawn(extent)
    tile = model.next_legal(180)
    plan = plan_of(model, extent, unit_px=640, tile_px=tile, halo=model.locality.halo_px + 8)
    blended = replace(plan, mode="blended")
    assert blended.core_px < blended.output_px
    found = estimate_blend_error(model, blended, reader(image), reference_px=reference_px)
    assert found.reference_px < min(extent)
    assert found.max_probability_error < 1e-4


@pytest.mark.parametrize("corner", [(0, 0), (1200, 1100)])
def test_the_error_is_measured_where_there_is_something(corner):
    """On glass, as in the middle of this slide, blended tiles and large ones are the same."""
    model = small("unet-bilinear", {"align_corners": True})
    glass = np.full((3, 1500, 1400), 240, np.uint8)
    rows, columns = (slice(at, at + 300) for at in corner)
    slide = glass.copy()
    slide[:, rows, columns] = drawn((300, 300))
    plan = plan_of(model, (1500, 1400), unit_px=512, tile_px=320, halo=48)
    assert plan.mode == "blended"
    found, flat = (
        estimate_blend_error(model, plan, reader(image), reference_px=700)
        for image in (slide, glass)
    )
    assert found.flips > 0.01
    assert flat.flips == 0


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
