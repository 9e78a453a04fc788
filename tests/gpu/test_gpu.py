"""On a real GPU (`make test-gpu`): the same labels as elsewhere, by the quick ways, end to end."""

from __future__ import annotations

import json
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from tilepipe.cli.main import main
from tilepipe.infer import Account, Engine
from tilepipe.infer.backends import make_backend, supported_precisions
from tilepipe.infer.cuda import CudaBackend
from tilepipe.infer.fusion import ConvBiasRelu, can_fuse_on_gpu
from tilepipe.infer.network import TORCH_DTYPES, TileNetwork
from tilepipe.infer.plans import plan_for
from tilepipe.models import load_model
from tilepipe.spec import JobSpec
from tilepipe.tiling import Box
from tilepipe.train.ahead import batches
from tilepipe.train.augment import AugmentSpec
from tilepipe.train.dataset import Samples, Teaching
from tilepipe.train.images import find_pairs

HAS_GPU = torch.cuda.is_available()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_GPU, reason="torch finds no CUDA device here"),
]
DEVICE = "cuda:0"
PRECISIONS = supported_precisions(DEVICE) if HAS_GPU else ("fp32",)
UINT8 = np.dtype(np.uint8)
LAST = torch.channels_last


def planned(name="unet", *, base=8, tile=572, extent=(700, 900), channels=3):
    model = load_model(name, weights="random:0", base=base, in_channels=channels)
    plan, _ = plan_for(model, extent, JobSpec(tile=model.next_legal(tile)), unit_px=1024)
    return model, plan


def image_of(extent, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (3, *extent)).astype(np.uint8)


def segment(model, plan, image, **options):
    engine = Engine(model, plan=plan, **options)
    try:
        return engine.segment(
            lambda box: image[(slice(None), *box.slices)], Box.of_shape(plan.extent)
        )
    finally:
        engine.close()


@pytest.mark.skipif(find_spec("triton") is None, reason="no Triton beside this torch")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_bias_and_relu_go_in_one_pass_here(precision):
    assert can_fuse_on_gpu(TORCH_DTYPES[precision], DEVICE)
    model, plan = planned()
    network = TileNetwork(model, plan, dtype=UINT8, precision=precision, output="logits").for_gpu(
        DEVICE
    )
    assert any(isinstance(part, ConvBiasRelu) for part in network.modules())
    plain = TileNetwork(model, plan, dtype=UINT8, precision=precision, output="logits")
    plain = plain.to(DEVICE).channels_last()
    pixels = torch.from_numpy(image_of((plan.input_px, plan.input_px))[None]).to(DEVICE)
    with torch.inference_mode():
        assert torch.equal(network(pixels)[0], plain(pixels)[0])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_one_channel_lies_as_three_do(precision):
    model, plan = planned(channels=1)
    image = image_of(plan.extent)[:1]
    here = segment(model, plan, image, device=DEVICE, precision=precision).ids
    there = segment(model, plan, image).ids
    assert (here != there).mean() < (1e-4 if precision == "fp32" else 1e-2)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", ["unet", "unetpp", "unet3plus"])
def test_batches_under_way_are_not_mixed_and_a_record_gives_the_networks_bits(
    name, batch, precision
):
    model, plan = planned(name, base=8, tile=400)
    backend = make_backend(
        "torch", model, plan, batch=batch, dtype=UINT8, device=DEVICE, precision=precision
    )
    assert isinstance(backend, CudaBackend)
    assert backend.is_recorded
    network = TileNetwork(model, plan, dtype=UINT8, precision=precision, output="ids")
    network = network.to(DEVICE).channels_last()
    batches = [
        [image_of((plan.input_px, plan.input_px), seed=10 * n + k) for k in range(batch)]
        for n in range(7)
    ]
    account, under_way, found = Account(), [], []
    for tiles in batches:
        under_way.append(backend.submit(tiles, account))
        if len(under_way) >= backend.depth:
            found.append(backend.collect(under_way.pop(0), account).values.clone())
    found += [backend.collect(ticket, account).values.clone() for ticket in under_way]
    for tiles, ids in zip(batches, found, strict=True):
        with torch.inference_mode():
            wanted = network(torch.from_numpy(np.stack(tiles)).to(DEVICE))[0]
        assert torch.equal(ids, wanted.cpu())
    assert account.device_s > 0
    backend.close()


def test_float32_labels_are_the_processors_but_for_ties():
    model, plan = planned(base=16)
    image = image_of(plan.extent)
    here = segment(model, plan, image, device=DEVICE).ids
    there = segment(model, plan, image).ids
    differ = here != there
    # Sums in another order: only where two classes are as good as equal.
    assert differ.mean() < 1e-4
    exact = segment(model, plan, image, precision="fp64").ids
    assert (here != exact).mean() < 1e-4


@pytest.mark.parametrize("precision", PRECISIONS)
def test_another_tile_gives_the_same_labels_but_for_ties(precision):
    model, small = planned(base=16, tile=400)
    _, large = planned(base=16, tile=700)
    image = image_of(small.extent)
    one, other = (
        segment(model, plan, image, device=DEVICE, precision=precision).ids
        for plan in (small, large)
    )
    assert (one != other).mean() < (1e-4 if precision == "fp32" else 1e-2)


def differing(network, pixels, side):
    """Share of px whose class is another one in a tile of ``side`` px at the end of the last."""
    x = network.normalise(pixels)
    with torch.inference_mode():
        whole = network.network(x)[-1:]
        part = network.network(x[-1:, :, -side:, -side:].contiguous(memory_format=LAST))
    px = part.shape[-1]
    return (whole[..., -px:, -px:].argmax(1) != part.argmax(1)).float().mean().item()


@pytest.mark.parametrize("precision", [name for name in PRECISIONS if name != "fp16"])
@pytest.mark.parametrize(("batch", "side"), [(1, 4284), (4, 2236)])
def test_maps_of_more_than_2_to_31_numbers_are_computed_as_smaller_ones(batch, side, precision):
    """The last join of the U-Net has 2.16e9: 128 channels of 4104 x 4104 px, or of 4 x 2056 x 2056.

    Layers that count in 32 bits would begin anew, or read what is not theirs.
    """
    needed = 1100 * batch * side**2 * (1 if precision == "fp32" else 0.5) * 1.5
    if torch.cuda.mem_get_info(DEVICE)[0] < needed:
        pytest.skip(f"takes {needed / 1e9:.0f} GB of the device")
    model, plan = planned(base=64)
    network = TileNetwork(model, plan, dtype=UINT8, precision=precision, output="logits")
    draw = torch.Generator(DEVICE).manual_seed(0)
    shape = (batch, 3, side, side)
    pixels = torch.randint(0, 256, shape, generator=draw, device=DEVICE, dtype=torch.uint8)
    share = differing(network.for_gpu(DEVICE), pixels, 1212)
    assert share < (1e-4 if precision == "fp32" else 1e-2)


def test_a_tile_of_maps_that_torch_cannot_count_is_halved():
    """At base 64 UNet 3+ enlarges 1024 channels, and torch counts no more than 2**31 numbers."""
    if torch.cuda.mem_get_info(DEVICE)[0] < 40 << 30:
        pytest.skip("takes 40 GB of the device")
    model = load_model("unet3plus", weights="random:0", base=64, in_channels=3)
    plan, _ = plan_for(model, (2048, 2048), JobSpec(), unit_px=2048, device=DEVICE)
    assert plan.input_px == 2272
    result = segment(model, plan, image_of(plan.extent), device=DEVICE, precision=PRECISIONS[-1])
    assert result.facts.get("oom_events", []) in ([], ["tile 2272 -> 1248 px"])
    assert result.ids.shape == plan.extent


def test_blended_tiles_and_probabilities():
    model, plan = planned("unet-dilated", base=4, tile=400)
    assert plan.mode == "blended"
    image = image_of(plan.extent)
    here = segment(model, plan, image, device=DEVICE, probabilities=True)
    there = segment(model, plan, image, probabilities=True)
    assert (here.ids != there.ids).mean() < 1e-4
    apart = np.abs(here.probabilities.astype(int) - there.probabilities.astype(int))
    assert apart.max() <= 1


def test_a_job_from_slide_to_verified_mask(small_slide, tmp_path):
    out = tmp_path / "gpu.zarr"
    flags = ["--model", "unet", "--weights", "random:0", "--base", "8", "--device", "cuda"]
    runner = CliRunner(env={"TILEPIPE_CACHE": str(tmp_path / "cache")})
    done = runner.invoke(main, ["run", str(small_slide), "-o", str(out), *flags, "--json"])
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout.strip().splitlines()[-1])
    assert facts["state"] == "done"
    assert 0 < facts["account"]["device_busy"] <= 1
    checked = runner.invoke(main, ["verify", str(out), "--json"])
    assert checked.exit_code == 0, checked.output


def test_samples_made_ahead_are_those_that_one_thread_makes(tmp_path):
    for folder, values in (("img", 256), ("lab", 3)):
        (tmp_path / folder).mkdir()
        for number in range(3):
            drawn = np.random.default_rng(number).integers(0, values, (300, 400), dtype=np.uint8)
            Image.fromarray(drawn).save(tmp_path / folder / f"{number}.png")
    samples = Samples(
        find_pairs(tmp_path / "img", tmp_path / "lab"),
        teaching=Teaching(target="classes", n_classes=3, weighted=True),
        channels=3, input_px=252, output_px=68, augment=AugmentSpec(),
    )  # fmt: skip
    asked = {"first": 5, "size": 4, "device": torch.device(DEVICE)}
    alone, ahead = (batches(samples, **asked, threads=threads) for threads in (0, 6))
    busy = torch.randn(4096, 4096, device=DEVICE)
    for _ in range(20):
        busy = busy @ busy / 64  # the network's stream is behind while samples change hands
        wanted, found = next(alone), next(ahead)
        for one, other in ((wanted.images, found.images), (wanted.targets, found.targets)):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
        torch.testing.assert_close(wanted.weights, found.weights, rtol=0, atol=1e-5)
    ahead.close()
