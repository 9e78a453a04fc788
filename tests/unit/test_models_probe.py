"""The locality probe: the committed table, hand-made networks of known context, causes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from tilepipe.errors import ModelError
from tilepipe.models import Locality, check_halo, from_module, locality_of
from tilepipe.models.legal import LegalSizes, find_legal_sizes
from tilepipe.models.locality import recorded_localities
from tilepipe.models.probe import probe, probe_architecture

WIDE = ("u2net", "u2netp")
TABLE = {
    "unet": (92, 16),
    "unet-same": (95, 16),
    "unet-bilinear": (77, 16),
    "unetpp": (94, 16),
    "u2net": (3295, 32),
    "u2netp": (3295, 32),
    "unet3plus": (109, 16),
    "unet3plus-cgm": (109, 16),
}


@pytest.mark.parametrize("name", [*TABLE, "unet-dilated"])
def test_the_recorded_context_is_the_design_s(name):
    locality = recorded_localities()[name]
    if name == "unet-dilated":
        assert locality.kind == "never"
        assert locality.least_input_px == 233
        return
    context, alignment = TABLE[name]
    assert locality.context == (context,) * 4
    assert locality.alignment_px == alignment
    assert locality.kind == "local"


@pytest.mark.parametrize("name", [name for name in recorded_localities() if name not in WIDE])
def test_the_probe_finds_what_is_recorded(name):
    assert probe_architecture(name) == recorded_localities()[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", WIDE)
def test_the_probe_finds_what_is_recorded_of_wide_ones(name):
    assert probe_architecture(name) == recorded_localities()[name]


def test_width_changes_nothing():
    wide = probe_architecture("unet-bilinear", {"widths": [6, 5, 4, 3, 7]})
    assert wide == recorded_localities()["unet-bilinear"]


@pytest.mark.parametrize(
    ("name", "options", "context", "alignment"),
    [
        ("unet-same", {"head_kernel": 1}, 94, 16),
        ("unet-bilinear", {"encoder_convs": 2}, 109, 16),
        ("unet-bilinear", {"depth": 2}, 17, 4),
        ("unetpp", {"level": 2}, 22, 4),
        ("unet3plus", {"head_kernel": 3}, 110, 16),
        ("unet-same", {"depth": 7}, 767, 128),
    ],
)
def test_options_change_the_context(name, options, context, alignment):
    locality = locality_of(name, options)
    assert (locality.context_px, locality.alignment_px) == (context, alignment)
    assert locality.exact


@pytest.mark.parametrize(("depth", "reach"), [(2, 23), (5, 219)])
def test_what_a_valid_network_consumes_does_not_shorten_its_reach(depth, reach):
    """A px in the worst place lies a whole step, less one px, farther away than the context."""
    locality = locality_of("unet", {"depth": depth})
    assert locality.context_px == locality.margin_px
    assert locality.reach_px == locality.context_px + 2**depth - 1 == reach


def test_align_corners_is_never_exact_and_says_why():
    locality = locality_of("unet-bilinear", {"align_corners": True})
    assert locality.kind == "never"
    assert locality.reason == "position dependent: bilinear resize with align_corners=True"


def test_a_checkpoints_word_counts_only_beyond_the_table():
    lie = Locality("local", "", (0, 0, 0, 0), 0, 1, 0, 16, 16)
    assert locality_of("unet-same", {"base": 4}, lie) == recorded_localities()["unet-same"]
    assert locality_of("unet-same", {"depth": 2}, lie) == lie


def conv(kernel, **kwargs):
    layer = nn.Conv2d(1, 2, kernel, **kwargs)
    nn.init.uniform_(layer.weight, 0.1, 1.0)
    return layer


def test_one_convolution():
    found = probe(conv((3, 7), padding=(1, 3)), in_channels=1)
    assert found.kind == "local"
    assert found.context == (1, 1, 3, 3)
    assert (found.alignment_px, found.margin_px, found.input_step_px) == (1, 0, 1)
    assert (found.reach_px, found.least_input_px) == (3, 1)


def test_a_lopsided_network():
    class Shifted(nn.Module):
        def forward(self, x):
            return functional.pad(x, (2, 0, 5, 0))[..., : x.shape[2], : x.shape[3]]

    assert probe(Shifted(), in_channels=1).context == (5, 0, 2, 0)


def test_a_valid_convolution_has_a_margin():
    found = probe(conv(5), in_channels=1)
    assert (found.margin_px, found.context_px, found.least_input_px) == (2, 2, 5)
    assert found.halo_px == 2


def test_pooling_gives_the_alignment():
    class Pooled(nn.Module):
        def forward(self, x):
            small = functional.max_pool2d(x, 4)
            return functional.interpolate(small, scale_factor=4, mode="nearest")

    found = probe(Pooled(), in_channels=1)
    assert (found.alignment_px, found.context_px, found.input_step_px) == (4, 0, 4)
    assert found.reach_px == 3  # cut anywhere, a pool reaches 3 px further


def test_an_alignment_of_three():
    class Thirds(nn.Module):
        def forward(self, x):
            return functional.interpolate(functional.avg_pool2d(x, 3), scale_factor=3)

    found = probe(Thirds(), in_channels=1)
    assert (found.kind, found.alignment_px, found.input_step_px) == ("local", 3, 3)


class Normed(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = norm

    def forward(self, x):
        return self.norm(self.conv(x))


class SqueezeExcite(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(functional.adaptive_avg_pool2d(x, 1))


class Attention(nn.Module):
    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        mixed = torch.softmax(tokens @ tokens.transpose(1, 2), dim=-1) @ tokens
        return mixed.transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize(
    ("module", "cause"),
    [
        (Normed(nn.InstanceNorm2d(4)), "instance norm"),
        (Normed(nn.GroupNorm(2, 4)), "group norm"),
        (SqueezeExcite(), "global pooling"),
        (Attention(), "attention"),
    ],
)
def test_global_networks_name_their_cause(module, cause):
    found = probe(module, in_channels=1)
    assert found.kind == "global"
    assert cause in found.reason


def test_a_network_that_adds_positions_is_never_exact():
    class Positions(nn.Module):
        def forward(self, x):
            ramp = torch.linspace(0, 1, x.shape[-1], dtype=x.dtype, device=x.device)
            return x + ramp

    found = probe(Positions(), in_channels=1)
    assert found.kind == "never"
    assert "does not repeat" in found.reason


def test_a_network_that_cannot_be_probed_says_so():
    with pytest.raises(ModelError, match="takes no square input"):
        probe(nn.Conv2d(3, 2, 3), in_channels=1)
    with pytest.raises(ModelError, match="constant"):
        probe(nn.Threshold(1e9, 0.0), in_channels=1)
    with pytest.raises(ModelError, match="larger than its input"):
        probe(nn.Upsample(scale_factor=2), in_channels=1)


def test_sides_are_found_by_running_where_shapes_alone_do_not_work():
    class Stubborn(nn.Module):
        def forward(self, x):
            if x.is_meta:
                raise NotImplementedError
            if x.shape[-1] % 8 != 4:
                raise ValueError("wants 8k + 4")
            return {"out": [x[..., 2:-2, 2:-2]]}

    assert find_legal_sizes(Stubborn(), 1) == LegalSizes(12, 8, 2)


def test_a_halo_that_is_too_small_is_corrected_with_both_numbers():
    nuclei = locality_of(
        "unet-bilinear",
        {"depth": 3, "encoder_convs": 2, "relu_between": False, "reduce_relu": False},
    )
    assert nuclei.reach_px == 58
    with pytest.warns(UserWarning, match=r"halo of 32 px .* depends on 58 px .* using 64 px"):
        assert check_halo(32, nuclei, name="nuclei") == 64
    assert check_halo(58, nuclei) == 58


def test_any_module_becomes_a_model_and_its_halo_is_checked():
    module = nn.Sequential(conv(5, padding=2), nn.Conv2d(2, 3, 3, padding=1))
    with pytest.warns(UserWarning, match=r"mine declares a halo of 1 px .* depends on 3 px"):
        model = from_module(module, name="mine", in_channels=1, outputs=3, declared_halo_px=1)
    assert (model.locality.context_px, model.locality.exact) == (3, True)
    assert model.activation == "softmax"
    assert len(model.classes) == 3
    x = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    assert model.class_ids(model.module(model.normalise(x))).shape == (1, 8, 8)


def test_a_locality_is_read_back_and_held_in_bounds():
    locality = recorded_localities()["unet"]
    assert Locality.from_json(locality.to_json()) == locality
    assert locality.halo_px == 92
    for wrong in (
        {},
        {**locality.to_json(), "context": [1, 2, 3]},
        {**locality.to_json(), "alignment_px": 0},
        {**locality.to_json(), "reach_px": -1},
        {**locality.to_json(), "kind": "perhaps"},
        {**locality.to_json(), "margin_px": 1.5},
        {**locality.to_json(), "more": 1},
    ):
        with pytest.raises(ModelError, match="recorded locality"):
            Locality.from_json(wrong)
