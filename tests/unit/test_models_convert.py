"""Foreign state dicts: key maps, both sides of a mismatch, and pickles that would run code."""

from __future__ import annotations

import os
import pickle
import re

import pytest
import torch
from safetensors.torch import save_file

from tilepipe.errors import CheckpointError, ModelError, SpecError
from tilepipe.models import Normalisation, build, load_model, locality_of, save_checkpoint
from tilepipe.models.checkpoint import read_header, weights_of
from tilepipe.models.convert import KeyMap, convert
from tilepipe.models.pickles import read_pickle
from tilepipe.spec import LabelClass


@pytest.fixture
def net():
    return build("unet-same", in_channels=1, classes=2, base=2)


def make(tmp_path, net, **changes):
    target = tmp_path / "out.safetensors"
    settings = {"model": "unet-same", "in_channels": 1, "arguments": {"base": 2}}
    return target, convert(tmp_path / "in.pth", target, **{**settings, **changes})


def toml(tmp_path, text):
    path = tmp_path / "map.toml"
    path.write_text(text)
    return KeyMap.from_toml(path)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {"state_dict": state}, "optimizer": {}},
        lambda state: {"epoch": torch.tensor(3), "state_dict": state},
        lambda state: {"model": {"name": "unet"}, "net": state, "best": torch.zeros(1)},
    ],
)
def test_a_state_dict_is_found(tmp_path, net, wrap):
    torch.save(wrap(net.state_dict()), tmp_path / "in.pth")
    target, facts = make(tmp_path, net)
    assert facts["sha256"] == load_model(target).sha256
    assert facts["context_px"] == 95
    with torch.no_grad():
        x = torch.rand(1, 1, 32, 32)
        torch.testing.assert_close(load_model(target).module(x), net.eval().infer(x))


def test_safetensors_with_counts_of_batches(tmp_path, net):
    """Every state dict of a BatchNorm network has them, and they are integers."""
    assert any(not value.is_floating_point() for value in net.state_dict().values())
    save_file(net.state_dict(), str(tmp_path / "in.safetensors"))
    torch.save(net.state_dict(), tmp_path / "in.pth")
    _, wanted = make(tmp_path, net)
    target = tmp_path / "out.safetensors"
    got = convert(
        tmp_path / "in.safetensors", target, model="unet-same", in_channels=1,
        arguments={"base": 2},
    )  # fmt: skip
    assert got["sha256"] == wanted["sha256"] == load_model(target).sha256


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weight: weight.to(torch.complex64), "dtype torch.complex64; weights are floats"),
        (lambda weight: weight.to(torch.int32), "dtype torch.int32; weights are floats"),
        (
            lambda weight: weight.ravel()[:1].as_strided((10**12, 1, 3, 3), (0, 0, 0, 0)),
            r"\(1000000000000, 1, 3, 3\) and fewer numbers; save tensors that are contiguous",
        ),
        (lambda weight: weight.to_sparse(), "layout torch.sparse_coo; save dense tensors"),
        (
            lambda weight: torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8),
            "dtype torch.qint8; weights are floats",
        ),
    ],
)
def test_numbers_that_would_not_survive_are_refused(tmp_path, net, change, message):
    state = {key: value.detach() for key, value in net.state_dict().items()}
    state["head.weight"] = change(state["head.weight"])
    torch.save(state, tmp_path / "in.pth")
    with pytest.raises(CheckpointError, match=rf"in\.pth: head\.weight has .*{message}"):
        make(tmp_path, net)
    # What the map leaves out need not be weights.
    with pytest.raises(CheckpointError, match=r"the network wants \(1\)"):
        make(tmp_path, net, key_map=KeyMap(drop=(r"head\.weight",)))


@pytest.mark.parametrize("mpp", [0.0, -1.0, float("nan"), 1e9])
def test_a_pixel_size_that_is_none(tmp_path, net, mpp):
    torch.save(net.state_dict(), tmp_path / "in.pth")
    with pytest.raises(CheckpointError, match="mpp"):
        make(tmp_path, net, mpp=mpp, key_map=KeyMap(mpp=0.5))
    with pytest.raises(CheckpointError, match=r"class_names\.1"):
        toml(tmp_path, "class_names = ['a', '']")
    with pytest.raises(CheckpointError, match="2 means for 1 channels"):
        make(tmp_path, net, normalisation=Normalisation("mean-std", (0.1, 0.2), (1.0, 1.0)))
    with pytest.raises(ModelError, match="no option 'name'"):
        make(tmp_path, net, arguments={"base": 2, "name": 3})


def test_prefixes_and_expressions_rename(tmp_path, net):
    foreign = {
        "module." + key.replace("encoders.", "down").replace(".conv.", ".0."): value
        for key, value in net.state_dict().items()
    }
    foreign["optimizer_step"] = torch.zeros(1)
    torch.save(foreign, tmp_path / "in.pth")
    rules = toml(
        tmp_path,
        """
        drop = ["optimizer"]
        [prefix]
        "module." = ""
        "module.down" = "encoders."
        [[regex]]
        from = '\\.(\\d)\\.0\\.(weight|bias)$'
        to = '.\\1.conv.\\2'
        """,
    )
    target, facts = make(tmp_path, net, key_map=rules)
    assert facts["tensors"] == len(weights_of(net))
    assert load_model(target).locality.context_px == 95


def test_the_map_says_what_the_weights_cannot(tmp_path, net):
    torch.save(net.state_dict(), tmp_path / "in.pth")
    rules = toml(
        tmp_path,
        """
        in_channels = 1
        outputs = 2
        class_names = ["sky", "ground"]
        mpp = 0.25
        mean = [0.5]
        std = [0.2]
        [arguments]
        base = 2
        """,
    )
    target, _ = make(tmp_path, net, key_map=rules, in_channels=None, arguments=None)
    model = load_model(target)
    assert [entry.name for entry in model.classes] == ["sky", "ground"]
    assert model.mpp == 0.25
    assert model.normalisation.mean == (0.5,)


def test_what_weights_say_of_themselves_is_kept(tmp_path, net):
    path, again = tmp_path / "in.safetensors", tmp_path / "again.safetensors"
    sky, ground = ("sky", (1, 2, 3, 255)), ("ground", (4, 5, 6, 255))
    classes = [LabelClass(name=name, color=color) for name, color in (sky, ground)]
    save_checkpoint(
        path, net, name="unet-same", arguments={"base": 2}, classes=classes, mpp=0.25,
        normalisation=Normalisation("mean-std", (0.5,), (0.2,)), extra={"step": 7},
        locality=locality_of("unet-same", {"base": 2}),
    )  # fmt: skip
    convert(path, again, model="unet-same")
    before, after = read_header(path), read_header(again)
    assert after.pop("extra") == {**before.pop("extra"), "converted_from": "in.safetensors"}
    assert after == before
    assert load_model(again).sha256 == load_model(path).sha256
    rules = toml(tmp_path, 'class_names = ["low", "high"]\nmpp = 0.75\nmean = [0]\nstd = [1]')
    convert(path, again, model="unet-same", key_map=rules, mpp=0.5)
    changed = load_model(again)
    assert [entry.name for entry in changed.classes] == ["low", "high"]
    assert changed.classes[0].color == (1, 2, 3, 255)
    assert changed.normalisation == Normalisation("mean-std", (0,), (1,))
    assert changed.mpp == 0.5


def test_weights_whose_header_cannot_be_read_are_refused(tmp_path, net):
    """What they say of themselves would be lost."""
    path = tmp_path / "in.safetensors"
    save_file(weights_of(net), str(path), metadata={"tilepipe": '{"version": 2}'})
    with pytest.raises(CheckpointError, match="header has version 2"):
        convert(path, tmp_path / "out.safetensors", model="unet-same")


def test_the_input_is_not_written_over(tmp_path, net):
    path = tmp_path / "in.safetensors"
    save_file(net.state_dict(), str(path))
    before = path.read_bytes()
    (tmp_path / "link.safetensors").symlink_to(path)
    for target in (path, tmp_path / "link.safetensors"):
        with pytest.raises(CheckpointError, match="is IN itself"):
            convert(path, target, model="unet-same", in_channels=1, arguments={"base": 2})
    assert path.read_bytes() == before


def test_numbers_beyond_half_precision_are_told_as_such(tmp_path, net):
    state = net.state_dict()
    state["encoders.0.0.norm.running_var"] += 1e6  # of images without a full scale
    torch.save(state, tmp_path / "in.pth")
    with pytest.raises(CheckpointError, match="running_var holds numbers beyond fp16; store fp32"):
        make(tmp_path, net, storage="fp16")
    make(tmp_path, net)


@pytest.mark.parametrize("text", ["std = [0.5]", "mean = [0.5]"])
def test_a_mean_without_a_std_or_the_other_way_round_is_refused(tmp_path, net, text):
    torch.save(net.state_dict(), tmp_path / "in.pth")
    with pytest.raises(ModelError, match="needs as many means as stds"):
        make(tmp_path, net, key_map=toml(tmp_path, text))


def test_a_declared_halo_is_held_against_the_probe(tmp_path, net):
    torch.save(net.state_dict(), tmp_path / "in.pth")
    with pytest.warns(UserWarning, match=r"halo of 32 px .* 108 px around it; using 112 px"):
        make(tmp_path, net, key_map=KeyMap(declared_halo=32))


def test_a_mismatch_prints_both_sides(tmp_path, net):
    state = net.state_dict()
    state["stray.weight"] = torch.zeros(2, 3)
    state["bottom.0.conv.weight"] = torch.zeros(1)
    del state["head.bias"]
    torch.save(state, tmp_path / "in.pth")
    with pytest.raises(CheckpointError) as caught:
        make(tmp_path, net)
    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert "the network wants (1):" in lines
    assert "head.bias (2,)" in lines
    assert "the file has (1):" in lines
    assert "stray.weight (2, 3)" in lines
    assert "bottom.0.conv.weight: wants (32, 16, 3, 3), file (1,)" in lines
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("model", "options", "side"),
    [("unet-same", {"leaky": False}, 32), ("unet-bilinear", {}, 32), ("unet", {"depth": 2}, 44)],
)
def test_maps_that_are_joined_the_other_way_round(tmp_path, monkeypatch, model, options, side):
    net = build(model, in_channels=1, classes=2, base=2, **options).eval()
    torch.save(net.state_dict(), tmp_path / "in.pth")
    x = torch.rand(1, 1, side, side)
    with monkeypatch.context() as patch, torch.no_grad():
        place = f"tilepipe.models.{model.replace('-', '_')}.join"
        patch.setattr(place, lambda skip, up: torch.cat((up, skip), dim=1))
        theirs = net.infer(x)
    arguments = {"base": 2, **options}
    rules = toml(tmp_path, "swap = ['decoders.+0.conv.weight']")
    target, _ = make(tmp_path, net, model=model, arguments=arguments, key_map=rules)
    torch.testing.assert_close(load_model(target).module(x), theirs, rtol=0, atol=1e-5)
    target, _ = make(tmp_path, net, model=model, arguments=arguments)
    assert float((load_model(target).module(x) - theirs).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("decoder", "names no weights, once renamed"),
        ("head.bias", r"names head\.bias \(2,\); wanted the weights of convolutions"),
        (r"encoders\.0\.0\.conv\.weight", r"\(2, 1, 3, 3\); wanted the weights of convolutions"),
    ],
)
def test_weights_that_cannot_be_swapped_are_named(tmp_path, net, pattern, message):
    torch.save(net.state_dict(), tmp_path / "in.pth")
    with pytest.raises(CheckpointError, match=message):
        make(tmp_path, net, key_map=KeyMap(swap=(pattern,)))


def test_what_weights_do_not_say_is_told(tmp_path, net):
    torch.save(net.state_dict(), tmp_path / "in.pth")
    target, facts = make(tmp_path, net)
    assert facts["assumed"] == [
        "leaky = true",
        "the order of joined maps",
        "ReLU behind the norm",
        "epsilon 1e-5",
        "a softmax whose first class is the background",
        "pixels from 0 to 1 without mean and std",
    ]
    again = convert(target, tmp_path / "again.safetensors", model="unet-same")
    assert again["assumed"] == []
    bare = build("unet", in_channels=1, classes=1, base=2)
    torch.save(bare.state_dict(), tmp_path / "in.pth")
    shown = Normalisation("mean-std", (0.5,), (0.2,))
    _, facts = make(tmp_path, net, model="unet", outputs=1, normalisation=shown)
    assert facts["assumed"] == ["the order of joined maps", "ReLU", "a sigmoid"]


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({}, r"Rename with --map\.$"),
        ({"arguments": {"base": 4}}, "23 convolutions of the file are not the network's 23"),
        (
            {"arguments": {"base": 2, "depth": 3}},
            r"the options depth, widths, norm, dropout.*another --model\.$",
        ),
    ],
)
def test_names_are_told_from_other_networks(tmp_path, net, changes, advice):
    state = {f"net.{key}": value for key, value in net.state_dict().items()}
    torch.save(state, tmp_path / "in.pth")
    with pytest.raises(CheckpointError, match=advice):
        make(tmp_path, net, **changes)


@pytest.mark.parametrize("replacement", ["e.\\\\2", "e.\\\\g<level>", "e.\\\\q"])
def test_a_replacement_that_cannot_be_made_is_named(tmp_path, net, replacement):
    torch.save(net.state_dict(), tmp_path / "in.pth")
    rules = toml(tmp_path, f'[[regex]]\nfrom = "^enc(.)"\nto = "{replacement}"\n')
    with pytest.raises(CheckpointError, match="cannot replace from = "):
        make(tmp_path, net, key_map=rules)


def test_convolutions_before_a_norm_may_be_without_a_bias(tmp_path, net):
    """As many are published: the norm's shift takes its place."""
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if name.endswith(("running_mean", "norm.bias", "norm.weight", "running_var")):
                value.uniform_(0.5, 1.5)
            elif name.endswith("conv.bias"):
                value.zero_()
    state = {key: value for key, value in net.state_dict().items() if "conv.bias" not in key}
    assert len(state) < len(net.state_dict())
    torch.save(state, tmp_path / "in.pth")
    target, facts = make(tmp_path, net)
    assert facts["tensors"] == len(weights_of(net))
    x = torch.rand(1, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(load_model(target).module(x), net.eval().infer(x))


@pytest.mark.parametrize("model", ["unet", "unet-same"])
def test_other_biases_that_are_missing_are_missed(tmp_path, model):
    net = build(model, in_channels=1, classes=2, base=2)  # a U-Net of 2015 has no norms
    state = net.state_dict()
    lost = "head.bias" if model == "unet-same" else "bottom.0.conv.bias"
    del state[lost]
    torch.save(state, tmp_path / "in.pth")
    with pytest.raises(CheckpointError, match=rf"the network wants \(1\):\s+{lost}"):
        make(tmp_path, net, model=model)


def test_two_keys_may_not_become_one(tmp_path, net):
    torch.save({"a.head": torch.zeros(1), "b.head": torch.zeros(1)}, tmp_path / "in.pth")
    with pytest.raises(CheckpointError, match=r"a\.head and b\.head both become head"):
        make(tmp_path, net, key_map=KeyMap(prefix={"a.": "", "b.": ""}))


def test_one_channel_weights_can_read_the_blue_of_rgb(tmp_path, net):
    save_file(weights_of(net), str(tmp_path / "in.safetensors"))
    rules = KeyMap(in_channels=3, spread=(0.0, 0.0, 1.0), arguments={"base": 2})
    target = tmp_path / "out.safetensors"
    convert(tmp_path / "in.safetensors", target, model="unet-same", key_map=rules)
    rgb = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            load_model(target).module(rgb), net.eval().infer(rgb[:, 2:]), rtol=1e-4, atol=1e-5
        )
    with pytest.raises(CheckpointError, match="fits no first convolution"):
        convert(
            tmp_path / "in.safetensors",
            target,
            model="unet-same",
            key_map=KeyMap(in_channels=4, spread=(1.0, 1.0), arguments={"base": 2}),
        )


class Evil:
    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(("call", "name"), [(os.system, "system"), (eval, "eval")])
def test_code_is_refused_by_name_and_not_run(tmp_path, call, name, zipped):
    path, proof = tmp_path / "in.pth", tmp_path / "ran"
    argument = f"touch {proof}" if call is os.system else f"open({str(proof)!r}, 'w')"
    torch.save(
        {"w": torch.zeros(1), "x": Evil(call, argument)},
        path,
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(CheckpointError, match=rf"would execute code: it calls \w+\.{name}"):
        read_pickle(path)
    assert not proof.exists()


def test_a_plain_pickle_with_code_is_refused(tmp_path):
    path = tmp_path / "in.pth"
    path.write_bytes(pickle.dumps(Evil(os.system, "true")))
    with pytest.raises(CheckpointError, match=r"would execute code: it calls \w+\.system"):
        read_pickle(path)


def test_a_whole_module_is_refused_by_its_class(tmp_path, net):
    torch.save(net, tmp_path / "in.pth")
    with pytest.raises(CheckpointError, match=r"tilepipe\.models\.unet_same\.UNetSame"):
        read_pickle(tmp_path / "in.pth")


def test_torchscript_is_refused(tmp_path):
    torch.save({"code": 1}, tmp_path / "in.pth")
    with pytest.raises(CheckpointError, match="no tensors in it, only code"):
        read_pickle(tmp_path / "in.pth")
    import zipfile

    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        archive.writestr("x/constants.pkl", b"")
        archive.writestr("x/code/__torch__.py", b"")
    with pytest.raises(CheckpointError, match="TorchScript program"):
        read_pickle(tmp_path / "script.pt")


@pytest.mark.parametrize("content", [b"", b"junk", b"\x80\x02", b"PK\x03\x04"])
def test_what_is_no_pickle(tmp_path, content):
    path = tmp_path / "in.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"in\.pth: cannot be read as a state dict"):
        read_pickle(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"<html>not found</html>", "begins with b'<html>not found</html>'"),
        (b"version https://git-lfs.github.com/spec/v1\n", "begins with b'version https://git-lfs"),
        (b'{"a": 1}', "as nothing does that torch.save writes"),
        (b"hello\n", "give a state dict saved by torch.save"),
    ],
)
def test_what_is_no_weights_file_is_told_by_how_it_begins(tmp_path, content, reason):
    """torch says nothing of such files, or the number of a byte."""
    path = tmp_path / "in.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(reason)):
        read_pickle(path)


def test_a_list_is_no_state_dict(tmp_path):
    torch.save([torch.zeros(1)], tmp_path / "in.pth")
    with pytest.raises(CheckpointError, match="holds a list, not a state dict"):
        read_pickle(tmp_path / "in.pth")
    with pytest.raises(CheckpointError, match="no such file"):
        read_pickle(tmp_path / "gone.pth")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("colour = 1", "colour"),
        ("drop = ['(']", "not a regular expression"),
        ("swap = ['(']", "not a regular expression"),
        ("[[regex]]\nfrom = 'a'", "regex"),
        ("in_channels = 0", "in_channels"),
    ],
)
def test_a_wrong_map_says_what_is_wrong(tmp_path, text, message):
    with pytest.raises(CheckpointError, match=message):
        toml(tmp_path, text)


def test_a_map_that_is_not_toml(tmp_path):
    with pytest.raises(SpecError, match="not TOML"):
        toml(tmp_path, "= =")
