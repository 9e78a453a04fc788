"""What torch runs on a processor computes what the plain network computes."""

import os
import subprocess
import sys
from importlib.util import find_spec
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from tilepipe.infer import fusion
from tilepipe.infer.fusion import ConvBiasRelu, FusedConv, can_fuse, fuse
from tilepipe.infer.network import TileNetwork
from tilepipe.infer.plans import plan_for
from tilepipe.models import load_model
from tilepipe.models.blocks import ConvBlock, max_pool
from tilepipe.spec import JobSpec

NAMES = ["unet", "unet-same", "unet-bilinear", "unet-dilated", "unetpp", "unet3plus", "u2netp"]


def networks(name, precision, *, dtype=np.uint8):
    model = load_model(name, weights="random:3", in_channels=3, base=4)
    plan, _ = plan_for(model, (4096, 4096), JobSpec(tile=model.next_legal(300)), unit_px=1024)
    make = {"dtype": np.dtype(dtype), "precision": precision, "output": "logits"}
    plain = TileNetwork(model, plan, **make).channels_last()
    quick = TileNetwork(model, plan, **make).for_processor()
    top = 255 if dtype == np.uint8 else 1
    rng = np.random.default_rng(0)
    pixels = (rng.random((1, 3, plan.input_px, plan.input_px)) * top).astype(dtype)
    return plain, quick, torch.from_numpy(pixels)


@pytest.mark.parametrize("name", NAMES)
def test_every_network_gives_the_same_logits(name):
    plain, quick, pixels = networks(name, "fp32")
    fused = [part for part in quick.modules() if isinstance(part, FusedConv)]
    assert (
        len(fused)
        == sum(
            isinstance(part, ConvBlock) and isinstance(part.act, nn.ReLU)
            for part in plain.modules()
        )
        > 3
    )
    with torch.inference_mode():
        wanted, sums = plain(pixels)
        found, other = quick(pixels)
    scale = wanted.abs().max()
    torch.testing.assert_close(found / scale, wanted / scale, rtol=0, atol=2e-5)
    torch.testing.assert_close(other, sums, rtol=1e-3, atol=1e-2)


@pytest.mark.skipif(not can_fuse(torch.bfloat16), reason="no bf16 convolutions here")
def test_bf16_too():
    plain, quick, pixels = networks("unet", "bf16")
    with torch.inference_mode():
        torch.testing.assert_close(quick(pixels)[0], plain(pixels)[0], rtol=0, atol=0)


def test_what_onednn_does_not_have_stays_as_it_is(monkeypatch):
    assert not can_fuse(torch.float64)
    plain, quick, pixels = networks("unet", "fp64")
    with torch.inference_mode():
        torch.testing.assert_close(quick(pixels)[0], plain(pixels)[0], rtol=0, atol=0)
    monkeypatch.setattr(fusion, "can_fuse", lambda dtype: False)
    block = nn.Sequential(ConvBlock(3, 4, norm="none"))
    fuse(block, torch.float32)
    assert isinstance(block[0], ConvBlock)


@pytest.mark.parametrize("name", NAMES)
def test_what_overflows_in_float16_is_seen_in_the_sums(name):
    _, quick, pixels = networks(name, "fp16", dtype=np.float32)
    with torch.inference_mode():
        assert torch.isfinite(quick(pixels)[1]).all()
        assert not torch.isfinite(quick(pixels * 1e9)[1]).any()


def test_an_operator_that_computes_something_else_is_not_used(monkeypatch):
    monkeypatch.setattr(FusedConv, "forward", lambda self, x: self.conv(x))  # forgets the ReLU
    assert not can_fuse.__wrapped__(torch.float32)


def test_only_a_bare_convolution_with_relu_is_fused():
    parts = nn.Sequential(
        ConvBlock(3, 4, norm="none"),
        ConvBlock(4, 4, norm="batch"),
        ConvBlock(4, 4, norm="none", relu=False),
        nn.Sequential(ConvBlock(4, 4, norm="none", dilation=2)),
    ).eval()
    x = torch.randn((1, 3, 20, 20), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = parts(x)
        fuse(parts, torch.float32)
        torch.testing.assert_close(parts(x), wanted, rtol=1e-5, atol=1e-5)
    kinds = [type(part) for part in parts]
    assert kinds == [FusedConv, ConvBlock, ConvBlock, nn.Sequential]
    assert isinstance(parts[3][0], FusedConv)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("kind", ["mean-std", "scale"])
def test_pixels_are_normalised_to_the_same_bits(dtype, kind):
    plain, quick, pixels = networks("unet", "fp32", dtype=dtype)
    for network in (plain, quick):
        network.mean_std = kind == "mean-std"
        network.mean = torch.tensor([0.7, 0.5, 0.6]).view(1, 3, 1, 1)
        network.std = torch.tensor([0.2, 0.3, 0.1]).view(1, 3, 1, 1)
    before = pixels.clone()
    found = quick.normalise(pixels)
    assert torch.equal(found, plain.normalise(pixels))
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(pixels, before)  # the staging buffer is not worked in
    for network in (plain, quick):  # one value for all channels
        network.mean, network.std = torch.full((1, 1, 1, 1), 0.4), torch.full((1, 1, 1, 1), 0.3)
    assert torch.equal(quick.normalise(pixels), plain.normalise(pixels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 3, 12, 20), (2, 5, 7, 8), (1, 4, 6, 6), (1, 1, 8, 8)])
@pytest.mark.parametrize("factor", [2, 3, 4, 6])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_max_pool_is_torchs(dtype, shape, factor, layout):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    x[0, 0, 0, 0] = float("nan")
    x = x.contiguous(memory_format=layout)
    wanted = functional.max_pool2d(x, factor)
    with torch.inference_mode():
        found = max_pool(x, factor)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    assert torch.isnan(found[0, 0, 0, 0])


def test_max_pool_can_be_trained_through():
    x = torch.randn(1, 2, 8, 8, requires_grad=True)
    max_pool(x.contiguous(memory_format=torch.channels_last)).sum().backward()
    assert x.grad.sum() == 2 * 16


def stand_in(monkeypatch, add_bias_relu):
    """Put a function in the place of the GPU's kernel."""
    module = ModuleType("tilepipe.infer.bias_relu")
    module.add_bias_relu = add_bias_relu
    monkeypatch.setitem(sys.modules, module.__name__, module)


def torch_layers(x, bias):
    return torch.relu_(x.add_(bias.view(1, -1, 1, 1)))


@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_gets_bias_and_relu_in_one_pass_and_the_same_bits(name, monkeypatch):
    calls = []

    def counted(x, bias):
        assert x.is_contiguous(memory_format=torch.channels_last)
        calls.append(x.shape)
        return torch_layers(x, bias)

    stand_in(monkeypatch, counted)
    monkeypatch.setattr(fusion, "can_fuse_on_gpu", fusion.can_fuse_on_gpu.__wrapped__)
    model = load_model(name, weights="random:3", in_channels=3, base=4)
    plan, _ = plan_for(model, (4096, 4096), JobSpec(tile=model.next_legal(300)), unit_px=1024)
    make = {"dtype": np.dtype(np.uint8), "precision": "fp32", "output": "logits"}
    plain = TileNetwork(model, plan, **make).channels_last()
    quick = TileNetwork(model, plan, **make).for_gpu("cpu")
    relus = [p for p in plain.modules() if isinstance(p, ConvBlock) and isinstance(p.act, nn.ReLU)]
    assert sum(isinstance(part, ConvBiasRelu) for part in quick.modules()) == len(relus) > 3
    del calls[:]
    side = (1, 3, plan.input_px, plan.input_px)
    pixels = torch.randint(0, 255, side, dtype=torch.uint8)
    with torch.inference_mode():
        found, wanted = quick(pixels)[0], plain(pixels)[0]
    assert len(calls) >= len(relus)
    # The convolution adds the bias before it rounds or after: a last bit in float32.
    scale = wanted.abs().max()
    torch.testing.assert_close(found / scale, wanted / scale, rtol=0, atol=2e-5)


def lies_channels_last(x):
    """As torch judges it, which decides how cuDNN answers: by the strides, even of one channel."""
    strides = [x.stride(axis) for axis in (1, 3, 2, 0)]
    return strides == sorted(strides) and x.stride(0) > x.stride(1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_gpu_is_given_pixels_that_lie_channels_last(channels, precision):
    model = load_model("unet", weights="random:3", in_channels=channels, base=2)
    plan, _ = plan_for(model, (4096, 4096), JobSpec(tile=model.next_legal(300)), unit_px=1024)
    network = TileNetwork(
        model, plan, dtype=np.dtype(np.uint8), precision=precision, output="logits"
    )
    for batch in (1, 2):
        pixels = torch.zeros((batch, channels, 17, 19), dtype=torch.uint8)
        assert lies_channels_last(network.normalise(pixels))


def test_a_map_that_a_convolution_lays_out_otherwise_is_laid_out_anew(monkeypatch):
    def counted(x, bias):
        assert x.is_contiguous(memory_format=torch.channels_last)
        return torch_layers(x, bias)

    stand_in(monkeypatch, counted)
    conv = nn.Conv2d(2, 3, 3)
    plain = functional.conv2d
    monkeypatch.setattr(functional, "conv2d", lambda *given: plain(*given).contiguous())
    with torch.inference_mode():
        x = torch.randn(1, 2, 9, 9)
        torch.testing.assert_close(ConvBiasRelu(conv)(x), torch.relu(conv(x)))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, bias: torch.relu_(x),
        lambda x, bias: x.add_(bias.view(1, -1, 1, 1)),
        lambda x, bias: torch_layers(x, bias).nan_to_num_(0),
        lambda x, bias: 1 / 0,
    ],
)
def test_a_kernel_that_computes_something_else_or_fails_is_not_used(wrong, monkeypatch):
    can_fuse_on_gpu = fusion.can_fuse_on_gpu.__wrapped__
    stand_in(monkeypatch, torch_layers)
    assert can_fuse_on_gpu(torch.float32, "cpu")
    stand_in(monkeypatch, wrong)
    assert not can_fuse_on_gpu(torch.float32, "cpu")


KERNEL = """
import torch
from tilepipe.infer.bias_relu import add_bias_relu
draw = torch.Generator().manual_seed(0)
for dtype in (torch.float32, torch.float16):  # Triton's interpreter cuts bfloat16, it rounds not
    for shape in ((1, 48, 37, 53), (2, 3, 7, 5), (1, 64, 16, 16)):
        x, bias = (torch.randn(s, generator=draw).to(dtype) for s in (shape, shape[1]))
        x = x.contiguous(memory_format=torch.channels_last)
        x[0, :2, 0, 0] = torch.tensor([torch.nan, torch.inf])
        wanted = torch.relu(x + bias.view(1, -1, 1, 1))
        torch.testing.assert_close(add_bias_relu(x, bias), wanted, rtol=0, atol=0, equal_nan=True)
try:
    add_bias_relu(torch.zeros(1, 4, 8, 8), torch.zeros(4))
except ValueError as error:
    assert "not channels-last" in str(error)
    print("fine")
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton comes with torch's GPU builds")
def test_the_kernel_by_tritons_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = [sys.executable, "-c", KERNEL]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "fine", done.stderr
