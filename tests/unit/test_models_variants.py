"""What single architectures promise beyond the contract: pruning, the gate, options."""

from __future__ import annotations

import pytest
import torch

from tilepipe.errors import ModelError
from tilepipe.models import build, load_model
from tilepipe.models.seeded import fill_seeded


def noise(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def filled(name, **options):
    net = build(name, in_channels=1, classes=2, base=4, **options)
    fill_seeded(net, 2)
    return net.double().eval()


@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_unetpp_pruned_keeps_its_head_and_drops_the_rest(level):
    full, pruned = filled("unetpp"), filled("unetpp", level=level)
    pruned.load_state_dict(full.state_dict())
    x = noise(1, 1, 32, 32)
    form = pruned.inference()
    with torch.no_grad():
        wanted = full(x)["logits"][4 - level]
    torch.testing.assert_close(form(x), wanted, rtol=0, atol=1e-10)
    kept = sum(parameter.numel() for parameter in form.parameters())
    everything = sum(parameter.numel() for parameter in full.parameters())
    assert kept < everything
    assert form.policy == f"head {level}, pruned"
    assert len(pruned.nodes) == 15  # the training form keeps everything


def test_u2net_sides_are_fused_by_the_head():
    net = filled("u2netp")
    with torch.no_grad():
        fused, *sides = net(noise(1, 1, 64, 64))["logits"]
        torch.testing.assert_close(net.head(torch.cat(sides, dim=1)), fused)


def test_the_gate_reads_the_encoder_alone():
    net = filled("unet3plus-cgm")
    form = net.inference()
    x = noise(2, 1, 64, 64)
    gate = form.gate_map(x)
    assert gate.shape == (2, 2, 4, 4)
    for crop_px, seen in ((0, gate), (16, gate[:, :, 1:3, 1:3])):
        nothing, something = seen.flatten(2).amax(-1).unbind(1)
        torch.testing.assert_close(form.gate_logits(x, crop_px=crop_px), something - nothing)
    torch.testing.assert_close(form.gate(x), net(x)["cls"], rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        for part in form.net.nodes.parameters():
            part.fill_(float("nan"))
    torch.testing.assert_close(form.gate_map(x), gate)


def test_the_gate_is_the_larger_of_two_maxima_as_published():
    """UNet 3+ pools each of the two over the image, then compares, wherever each was largest."""
    net = filled("unet3plus-cgm")
    net.gate_head = torch.nn.Conv2d(net.gate_head.in_channels, 2, 1).double()
    x = noise(8, 1, 64, 96)
    with torch.no_grad():
        deepest = net._encode(x)[-1]
        # What is largest in the one and in the other lies at different places.
        centred = deepest - deepest.mean((0, 2, 3), keepdim=True)
        net.gate_head.weight.copy_(torch.stack([centred.std((0, 2, 3)), -centred.std((0, 2, 3))])
                                   [:, :, None, None])  # fmt: skip
        pooled = torch.nn.AdaptiveMaxPool2d(1)(net.gate_head(deepest))[:, :, 0, 0]
        net.gate_head.bias += torch.stack([pooled[:, 1].mean() - pooled[:, 0].mean(),
                                           torch.zeros(()).double()])  # fmt: skip
        published = torch.sigmoid(torch.nn.AdaptiveMaxPool2d(1)(net.gate_head(deepest)))
        says = published[:, :, 0, 0].argmax(1)
        assert 0 < says.sum() < len(says)
        assert torch.equal(net.inference().gate(x) > 0, says == 1)
        assert torch.equal(net(x)["cls"] > 0, says == 1)


def test_only_cgm_has_a_gate():
    assert load_model("unet3plus-cgm", weights="random:0", base=2).has_gate
    assert not load_model("unet3plus", weights="random:0", base=2).has_gate
    with pytest.raises(ModelError, match="without cgm"):
        filled("unet3plus").gate_map(noise(1, 1, 32, 32))


def test_unet3plus_options_run():
    x = noise(1, 1, 32, 32)
    for options in (
        {"down": "avg"},
        {"down": "conv"},
        {"residual": True},
        {"deep_supervision": False},
        {"head_kernel": 3},
    ):
        net = filled("unet3plus", **options)
        out = net(x)["logits"]
        assert len(out) == (1 if "deep_supervision" in options else 5)
        with torch.no_grad():
            torch.testing.assert_close(net.inference()(x), out[0], rtol=1e-9, atol=1e-9)


def test_unet_bilinear_takes_any_size_when_asked():
    form = filled("unet-bilinear", any_size=True).inference()
    assert form(noise(1, 1, 37, 50)).shape == (1, 2, 37, 50)


def test_a_plain_reduction_before_the_upsampling_equals_one_behind_it():
    net = filled("unet-bilinear", norm="none", reduce_relu=False)
    x = noise(1, 64, 8, 8)
    from tilepipe.models.blocks import upsample

    with torch.no_grad():
        torch.testing.assert_close(
            upsample(net.reduces[3](x), 2), net.reduces[3](upsample(x, 2)), rtol=0, atol=1e-12
        )


def test_unet_dilated_needs_233_px():
    net = filled("unet-dilated")
    assert net.least_px == 233
    assert net.inference()(noise(1, 1, 233, 240)).shape == (1, 2, 233, 240)


def test_sigmoid_ids_are_where_the_logit_is_positive():
    model = load_model("unet-same", weights="random:0", base=2, classes=1)
    logits = torch.tensor([[[[-1.0, 0.0, 2.0]]]])
    assert model.activation == "sigmoid"
    assert len(model.classes) == 2
    assert model.class_ids(logits).tolist() == [[[0, 0, 1]]]
    assert model.class_ids(logits).dtype == torch.uint8
    p = model.probabilities(logits)
    assert p.shape == (1, 2, 1, 3)
    torch.testing.assert_close(p.sum(dim=1), torch.ones(1, 1, 3))


def test_softmax_ids_are_the_arg_max():
    model = load_model("unet-same", weights="random:0", base=2, classes=3)
    logits = torch.tensor([[[[1.0, 0.0]], [[2.0, -1.0]], [[0.0, 5.0]]]])
    assert model.class_ids(logits).tolist() == [[[1, 2]]]
    torch.testing.assert_close(model.probabilities(logits).sum(dim=1), torch.ones(1, 1, 2))
    assert model.next_legal(17) == 32
