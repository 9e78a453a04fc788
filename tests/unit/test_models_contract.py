"""What every registered architecture promises, held for all nine at tiny widths."""

from __future__ import annotations

import copy
import json
import re

import numpy as np
import pytest
import torch

from tilepipe.errors import ModelError, ShapeError
from tilepipe.models import ARCHITECTURES, build, from_net, load_model, parameters_of
from tilepipe.models.blocks import ConvBlock
from tilepipe.models.checkpoint import read_checkpoint, save_checkpoint
from tilepipe.models.listing import list_models
from tilepipe.models.locality import recorded_localities
from tilepipe.models.registry import option_names
from tilepipe.models.seeded import fill_seeded

NAMES = list(ARCHITECTURES)
BATCH_NORMED = [name for name in NAMES if name not in ("unet", "unet-dilated")]
# Outputs of the training form: the main one and the deep supervision's.
N_LOGITS = {"unetpp": 4, "u2net": 7, "u2netp": 7, "unet3plus": 5, "unet3plus-cgm": 5}


def tiny(name, *, in_channels=2, classes=3, **options):
    net = build(name, in_channels=in_channels, classes=classes, base=4, **options)
    fill_seeded(net, 1)
    return net


def noise(net, side, *, batch=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(side)
    return torch.rand(batch, net.in_channels, side, side, generator=generator, dtype=dtype)


def shake_norms(net):
    """Give BatchNorms statistics that matter, as training would."""
    generator = torch.Generator().manual_seed(3)
    for part in net.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.running_mean.copy_(torch.rand(part.num_features, generator=generator) - 0.5)
            part.running_var.copy_(torch.rand(part.num_features, generator=generator) + 0.5)
            with torch.no_grad():
                part.weight.copy_(torch.rand(part.num_features, generator=generator) + 0.5)
                part.bias.copy_(torch.rand(part.num_features, generator=generator) - 0.5)


def incoming(conv):
    """Count the numbers that an output px in the middle is summed from: all weights 1, input 1."""
    counted = copy.deepcopy(conv).double()
    torch.nn.init.ones_(counted.weight)
    if counted.bias is not None:
        torch.nn.init.zeros_(counted.bias)
    side = 4 * max(counted.kernel_size) * max(counted.dilation)
    with torch.no_grad():
        out = counted(torch.ones(1, counted.in_channels, side, side, dtype=torch.float64))
    return float(out[0, 0, out.shape[2] // 2, out.shape[3] // 2])


@pytest.mark.parametrize("name", NAMES)
def test_weights_to_train_are_drawn_as_the_paper_draws_them(name):
    """Gaussian, deviation sqrt(2 / N), N the incoming nodes of one neuron (2015 U-Net, §3)."""
    torch.manual_seed(5)
    net = build(name, in_channels=3, classes=4, base=16)
    convolutions = [
        (path, part)
        for path, part in net.named_modules()
        if isinstance(part, torch.nn.Conv2d | torch.nn.ConvTranspose2d)
        and part.weight.numel() > 2000
    ]
    assert convolutions
    for path, part in convolutions:
        expected = (2.0 / incoming(part)) ** 0.5
        assert part.weight.std().item() == pytest.approx(expected, rel=0.1), path


def test_there_are_nine():
    assert NAMES == [
        "unet",
        "unet-same",
        "unet-bilinear",
        "unet-dilated",
        "unetpp",
        "u2net",
        "u2netp",
        "unet3plus",
        "unet3plus-cgm",
    ]


@pytest.mark.parametrize(
    ("name", "in_channels", "classes", "published"),
    [
        ("unet", 1, 2, 31_030_658),
        ("unet", 3, 2, 31.03e6),
        ("u2net", 3, 1, 44.0e6),
        ("u2netp", 3, 1, 1.13e6),
        ("unet3plus", 3, 1, 26.97e6),
        ("unetpp", 3, 2, 9.04e6),
    ],
)
def test_parameters_are_the_papers(name, in_channels, classes, published):
    assert parameters_of(name, in_channels, classes) == pytest.approx(published, rel=0.01)


def test_the_original_has_exactly_its_parameters():
    assert parameters_of("unet", 1, 2) == 31_030_658


@pytest.mark.parametrize("name", NAMES)
def test_legal_sides_give_their_shapes(name):
    net = tiny(name)
    form = net.inference()
    for side in (net.least_px, net.next_legal(net.least_px + 1)):
        wanted = (2, 3, side - 2 * net.margin_px, side - 2 * net.margin_px)
        assert form(noise(net, side, batch=2)).shape == wanted
    tall = torch.zeros(1, 2, net.least_px + net.step_px, net.least_px)
    assert form(tall).shape[2:] == (
        net.least_px + net.step_px - 2 * net.margin_px,
        net.least_px - 2 * net.margin_px,
    )


def test_the_papers_tile():
    net = tiny("unet")
    assert net.inference()(torch.zeros(1, 2, 572, 572)).shape == (1, 3, 388, 388)


@pytest.mark.parametrize("name", NAMES)
def test_an_illegal_side_names_the_next_legal_one(name):
    net = tiny(name)
    side = net.least_px - 1 if net.step_px == 1 else net.least_px + 1
    wanted = net.least_px if net.step_px == 1 else net.least_px + net.step_px
    for form in (net, net.inference()):
        with pytest.raises(ShapeError, match=rf"cannot take {side} px .* side is {wanted} px"):
            form(torch.zeros(1, 2, side, side))
    with pytest.raises(ShapeError, match="takes 2 channels; got 5"):
        net.inference()(torch.zeros(1, 5, net.least_px, net.least_px))
    with pytest.raises(ShapeError, match="got 3 axes"):
        net(torch.zeros(2, net.least_px, net.least_px))


@pytest.mark.parametrize("name", NAMES)
def test_training_form_returns_its_outputs(name):
    net = tiny(name).train()
    side = net.next_legal(64)
    out = net(noise(net, side, batch=2))
    assert len(out["logits"]) == N_LOGITS.get(name, 1)
    assert {tuple(part.shape) for part in out["logits"]} == {
        (2, 3, side - 2 * net.margin_px, side - 2 * net.margin_px)
    }
    assert ("cls" in out) == (name == "unet3plus-cgm")
    if "cls" in out:
        assert out["cls"].shape == (2,)


@pytest.mark.parametrize("name", NAMES)
def test_inference_is_the_first_training_output(name):
    net = tiny(name).double().eval()
    x = noise(net, net.next_legal(64), dtype=torch.float64)
    with torch.no_grad():
        logits = net(x)["logits"]
    wanted = torch.stack(logits).mean(dim=0) if name == "unetpp" else logits[0]
    torch.testing.assert_close(net.inference()(x), wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_eval_is_deterministic_and_leaves_the_net_alone(name):
    net = tiny(name).train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    form = net.inference()
    x = noise(net, net.next_legal(48))
    assert torch.equal(form(x), form(x))
    assert net.training
    assert not form.training
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert not any(parameter.requires_grad for parameter in form.parameters())


@pytest.mark.parametrize("name", BATCH_NORMED)
def test_folding_changes_nothing(name):
    net = tiny(name).double().eval()
    shake_norms(net)
    x = noise(net, net.next_legal(64), dtype=torch.float64)
    with torch.no_grad():
        plain = net.infer(x)
    form = net.inference()
    assert not any(isinstance(part, torch.nn.BatchNorm2d) for part in form.modules())
    assert float(plain.std()) > 0
    torch.testing.assert_close(form(x), plain, rtol=1e-10, atol=1e-10)


def test_a_norm_that_cannot_be_folded_is_an_error():
    net = tiny("unet-same")
    net.stray = torch.nn.BatchNorm2d(3)
    with pytest.raises(ModelError, match="stray"):
        net.inference()


@pytest.mark.parametrize("name", NAMES)
def test_gradient_reaches_every_parameter(name):
    # In eval mode: dropout off, and a bias before BatchNorm has a gradient only there.
    net = tiny(name).double().eval()
    out = net(noise(net, net.next_legal(96), batch=2, dtype=torch.float64))
    loss = sum((part * (1 + index)).pow(2).mean() for index, part in enumerate(out["logits"]))
    if "cls" in out:
        loss = loss + out["cls"].pow(2).mean()
    loss.backward()
    silent = [
        key
        for key, parameter in net.named_parameters()
        if parameter.grad is None or not torch.isfinite(parameter.grad).all()
    ]
    assert silent == []
    reached = sum(bool(p.grad.abs().sum() > 0) for p in net.parameters())
    # A thin ReLU may be dead; nearly all are not, and each has a gradient tensor.
    assert reached >= 0.9 * len(list(net.parameters()))


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_round_trip_gives_the_same_logits(name, tmp_path):
    net = tiny(name)
    shake_norms(net)
    model = from_net(net, name=name, arguments={"base": 4}, source="here")
    path = tmp_path / "weights.safetensors"
    sha256 = save_checkpoint(
        path,
        net,
        name=name,
        arguments={"base": 4},
        classes=model.classes,
        normalisation=model.normalisation,
        mpp=0.5,
        locality=model.locality,
        extra={"note": "made by a test"},
    )
    back = load_model(str(path))
    assert back.sha256 == sha256 == model.sha256
    assert (back.name, back.mpp, back.classes) == (name, 0.5, model.classes)
    assert back.locality == recorded_localities()[name]
    assert back.extra["note"] == "made by a test"
    x = noise(net, net.next_legal(48))
    assert torch.equal(back.module(x), model.module(x))
    _, training = read_checkpoint(path)
    assert all(parameter.requires_grad for parameter in training.parameters())
    training.train()(noise(net, net.next_legal(64), batch=2))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("u2net", "u2netp")])
def test_a_tile_with_the_full_context_equals_the_whole(name):
    locality = recorded_localities()[name]
    if not locality.exact:
        pytest.skip("never exact")
    net = build(name, in_channels=1, classes=2, base=2)
    fill_seeded(net, 0)
    form = net.double().inference()
    halo, step = locality.halo_px, locality.alignment_px
    core = 2 * step
    side = locality.next_legal(2 * halo + core)
    whole_side = locality.next_legal(side + 3 * step)
    x = noise(net, whole_side, dtype=torch.float64)
    crop = halo - locality.margin_px
    whole = form(x)

    def error(start, cut):
        """Largest difference of the core that a tile with ``cut`` px less halo writes."""
        tile = x[..., start + cut : start + side - cut, start + cut : start + side - cut]
        out = form(tile.contiguous())
        at = crop - cut
        mine = out[..., at : at + core, at : at + core]
        there = start + crop
        return float((mine - whole[..., there : there + core, there : there + core]).abs().max())

    assert error(step, 0) < 1e-12
    if locality.margin_px == 0:
        assert error(step, 2 * step) > 0  # the check can fail: with less halo it is not the same
    if side % step == 0 or locality.margin_px:
        assert error(step + step // 2, 0) > 1e-9  # nor off the alignment


def test_numbers_of_numpy_make_the_same_network():
    options = {"depth": np.int64(2), "widths": np.array([2, 4, 8])}
    got = load_model(
        "unet", weights="random:0", in_channels=np.int64(1), classes=np.int64(3),
        base=np.int64(2), options=options,
    )  # fmt: skip
    wanted = load_model(
        "unet", weights="random:0", in_channels=1, classes=3, base=2,
        options={"depth": 2, "widths": [2, 4, 8]},
    )  # fmt: skip
    assert got.identity == wanted.identity
    assert json.dumps(got.to_json()) == json.dumps(wanted.to_json())


def test_options_are_listed_when_one_is_unknown():
    with pytest.raises(ModelError, match=r"unet has no option 'wdth'; it takes depth, widths"):
        build("unet", in_channels=3, classes=2, wdth=3)
    with pytest.raises(ModelError, match=r"called 'vnet'; there are unet, unet-same"):
        build("vnet", in_channels=3, classes=2)
    assert "cgm" not in option_names("unet3plus")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("unet", {"depth": 0}, "depth 0"),
        ("unet", {"widths": [2, 4]}, "name 2 levels; the network has 5"),
        ("unet", {"widths": [0] * 5}, "each level takes"),
        ("unet-same", {"norm": "group"}, "norm 'group'"),
        ("unet-same", {"head_kernel": 2}, "head_kernel 2"),
        ("unet-bilinear", {"encoder_convs": 9}, "encoder_convs 9"),
        ("unetpp", {"level": 5}, "level 5"),
        ("unet-same", {"leaky": "False"}, "leaky 'False'; the choices are true and false"),
        ("unet-bilinear", {"align_corners": "no"}, "align_corners 'no'"),
        ("unet3plus", {"deep_supervision": []}, "deep_supervision []"),
        ("unet-same", {"leaky": 2}, "leaky 2; the choices are true and false"),
        ("unet", {"dropout": float("nan")}, "dropout nan; a number is wanted, such as 0.5"),
        ("unet", {"dropout": True}, "dropout True; a number is wanted"),
        ("unet", {"dropout": "0.5x"}, "dropout '0.5x'; a number is wanted"),
        ("unet", {"depth": True}, "depth True; a number is wanted, such as 4"),
        ("unet3plus", {"down": "sum"}, "down 'sum'"),
        ("unet3plus", {"widths": "abc"}, "widths"),
    ],
)
def test_wrong_options_are_refused(name, options, message):
    with pytest.raises(ModelError, match=re.escape(message)):
        build(name, in_channels=1, classes=2, base=2, **options)


@pytest.mark.parametrize(
    ("in_channels", "classes", "base"), [(0, 2, 4), (1, 0, 4), (1, 256, 4), (1, 2, 0)]
)
def test_wrong_counts_are_refused(in_channels, classes, base):
    with pytest.raises(ModelError):
        build("unet", in_channels=in_channels, classes=classes, base=base)


def test_norm_none_has_none():
    for name in BATCH_NORMED:
        net = tiny(name, norm="none")
        assert all(
            isinstance(part.norm, torch.nn.Identity)
            for part in net.modules()
            if isinstance(part, ConvBlock)
        )


def test_a_network_that_is_not_in_the_table_is_measured(monkeypatch):
    listed = list_models()
    table = {name: one for name, one in recorded_localities().items() if name != "unet-same"}
    for room in ("model", "listing"):
        monkeypatch.setattr(
            f"tilepipe.models.{room}.recorded_localities", lambda: table, raising=False
        )
    assert list_models() == listed
