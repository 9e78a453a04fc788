"""Checkpoints as untrusted input, seeded weights, and what ``load_model`` refuses."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from tilepipe.errors import CheckpointError, ModelError
from tilepipe.models import (
    Normalisation,
    build,
    checkpoint,
    load_model,
    read_header,
    save_checkpoint,
)
from tilepipe.models.checkpoint import read_checkpoint, weights_of
from tilepipe.models.header import Header
from tilepipe.models.seeded import fill_seeded, parse_seed
from tilepipe.spec import LabelClass, default_classes

BASE = {"base": 2}


@pytest.fixture
def net():
    return build("unet-same", in_channels=1, classes=2, **BASE)


def header(**changes):
    values = {
        "version": 1,
        "architecture": "unet-same",
        "arguments": BASE,
        "in_channels": 1,
        "outputs": 2,
        "classes": [entry.model_dump() for entry in default_classes(2)],
    }
    return {**values, **changes}


def write(path, net, values):
    text = values if isinstance(values, str) else json.dumps(values)
    save_file(weights_of(net), str(path), metadata={"tilepipe": text})
    return path


def save(path, net, **changes):
    settings = {
        "name": "unet-same",
        "arguments": BASE,
        "classes": default_classes(2),
        "normalisation": Normalisation(),
    }
    return save_checkpoint(path, net, **{**settings, **changes})


def test_a_header_is_read_as_plain_values(tmp_path, net):
    path = tmp_path / "a.safetensors"
    classes = (
        LabelClass(name="no", color=(0, 0, 0, 0)),
        LabelClass(name="yes", color=(1, 2, 3, 255)),
    )
    save(
        path,
        net,
        classes=classes,
        normalisation=Normalisation("mean-std", (0.5,), (0.25,)),
        mpp=0.5,
        extra={"step": 7},
    )
    read = read_header(path)
    assert read["architecture"] == "unet-same"
    assert read["classes"][1] == {"name": "yes", "color": [1, 2, 3, 255]}
    assert read["normalisation"] == {"kind": "mean-std", "mean": [0.5], "std": [0.25]}
    assert (read["mpp"], read["extra"], read["version"]) == (0.5, {"step": 7}, 1)
    assert load_model(path).classes == classes


def test_half_precision_storage_is_read_as_float32(tmp_path, net):
    full, half = tmp_path / "full.safetensors", tmp_path / "half.safetensors"
    save(full, net)
    sha256 = save(half, net, storage="fp16")
    assert half.stat().st_size < 0.7 * full.stat().st_size
    model = load_model(half)
    assert model.sha256 == sha256
    assert all(part.dtype == torch.float32 for part in model.module.parameters())


def test_no_partial_file_is_left(tmp_path, net):
    save(tmp_path / "a.safetensors", net)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]
    with pytest.raises(CheckpointError, match="cannot be written"):
        save(tmp_path / "missing" / "a.safetensors", net)


def test_two_that_write_one_file_at_once_do_not_write_into_each_others(tmp_path, net, monkeypatch):
    path, begun = tmp_path / "a.safetensors", []
    other = build("unet-same", in_channels=1, classes=2, base=3)

    def written_meanwhile(tensors, name, metadata):
        save_file(tensors, name, metadata=metadata)
        if not begun:
            begun.append(name)
            save(path, other, arguments={"base": 3})
            assert read_header(path)["arguments"] == {"base": 3}

    monkeypatch.setattr(checkpoint, "save_file", written_meanwhile)
    sha256 = save(path, net)
    assert load_model(path).sha256 == sha256
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_half_written_goes_after_a_while(tmp_path, net):
    path = tmp_path / "a.safetensors"
    old, new, of_others = (
        tmp_path / name
        for name in (".a.safetensors.1.partial", ".a.safetensors.2.partial", ".b.csv.1.partial")
    )
    for left in (old, new, of_others):
        left.touch()
    for left in (old, of_others):
        os.utime(left, (0, 0))
    save(path, net)
    assert set(tmp_path.iterdir()) == {path, new, of_others}


def test_nan_is_neither_written_nor_read(tmp_path, net):
    with torch.no_grad():
        net.head.bias[0] = float("nan")
    with pytest.raises(CheckpointError, match=r"head\.bias holds NaN"):
        save(tmp_path / "a.safetensors", net)
    with pytest.raises(CheckpointError, match=r"head\.bias holds NaN"):
        load_model(write(tmp_path / "b.safetensors", net, header()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version 2; this tilepipe reads 1"),
        ({"version": None}, "version None"),
        ({"architecture": "vnet"}, "called 'vnet'"),
        ({"architecture": ""}, "architecture"),
        ({"in_channels": 0}, "in_channels"),
        ({"in_channels": 10**9}, "in_channels"),
        ({"outputs": 3}, "2 classes for 3 outputs"),
        ({"classes": []}, "classes"),
        ({"classes": [{"name": "x"}] * 2}, "color"),
        ({"arguments": {"base": 10**6}}, "base 1000000"),
        ({"arguments": {"base": "big"}}, "cannot be built"),
        ({"arguments": {"widths": [1, {}]}}, "arguments"),
        ({"arguments": {"in_channels": 4}}, "no option 'in_channels'"),
        ({"arguments": {"depth": 40}}, "depth 40"),
        ({"mpp": -1}, "mpp"),
        ({"normalisation": {"kind": "guess"}}, "wanted kind unit or mean-std"),
        ({"normalisation": {"kind": "mean-std", "mean": [1], "std": [0]}}, "above 0"),
        ({"normalisation": {"kind": "mean-std", "mean": [1, 2], "std": [1, 1]}}, "2 means"),
        ({"locality": {"kind": "local"}}, "locality"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_wrong_header_is_one_clear_error(tmp_path, net, changes, message):
    path = write(tmp_path / "a.safetensors", net, header(**changes))
    with pytest.raises(CheckpointError) as caught:
        load_model(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "nul", '"text"', "[" * 100_000])
def test_a_header_that_is_not_an_object(tmp_path, net, text):
    path = write(tmp_path / "a.safetensors", net, text)
    with pytest.raises(CheckpointError, match="header"):
        load_model(path)


def test_an_endless_header_is_not_parsed():
    with pytest.raises(CheckpointError, match="bytes; at most"):
        Header.from_metadata({"tilepipe": " " * (2 << 20)}, source="x")


def test_plain_safetensors_are_sent_to_convert(tmp_path, net):
    save_file(weights_of(net), str(tmp_path / "a.safetensors"))
    with pytest.raises(CheckpointError, match="tilepipe convert"):
        load_model(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"junk",
        struct.pack("<Q", 2**60) + b"{}",
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 4) + b"{,,}",
    ],
)
def test_what_is_not_safetensors(tmp_path, content):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        load_model(path)


def test_a_truncated_file(tmp_path, net):
    path = tmp_path / "a.safetensors"
    save(path, net)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load_model(path)


def test_weights_that_do_not_fit_name_both_sides(tmp_path, net):
    weights = weights_of(net)
    weights["spare.weight"] = torch.zeros(3)
    del weights["head.bias"]
    weights["head.weight"] = torch.zeros(5, 2, 3, 3)
    path = tmp_path / "a.safetensors"
    save_file(weights, str(path), metadata={"tilepipe": json.dumps(header())})
    with pytest.raises(CheckpointError) as caught:
        load_model(path)
    text = str(caught.value)
    assert "head.bias (2,)" in text
    assert "spare.weight (3,)" in text
    assert "head.weight: wants (2, 2, 3, 3), file (5, 2, 3, 3)" in text


def test_integer_weights_are_refused(tmp_path, net):
    weights = {key: value.to(torch.int32) for key, value in weights_of(net).items()}
    path = tmp_path / "a.safetensors"
    save_file(weights, str(path), metadata={"tilepipe": json.dumps(header())})
    with pytest.raises(CheckpointError, match="weights are floats"):
        load_model(path)


def test_what_is_asked_must_agree_with_the_file(tmp_path, net):
    path = tmp_path / "a.safetensors"
    save(path, net)
    assert load_model("unet-same", weights=path, base=2, classes=2, in_channels=1).source == str(
        path
    )
    for asked, message in (
        ({"base": 8}, "have base 2; 8 was asked for"),
        ({"classes": 5}, "have outputs 2; 5 was asked for"),
        ({"in_channels": 3}, "have in_channels 1; 3 was asked for"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_model("unet-same", weights=path, **asked)
    with pytest.raises(CheckpointError, match="holds weights of unet-same, not unet"):
        load_model("unet", weights=path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 3}, "have depth 2; 3 was asked for; leave it out, or give other weights"),
        ({"depth": 99}, "99 was asked for; leave it out, or give other weights"),
        (
            {"align_corners": True},
            "have align_corners False; True was asked for; leave it out, or ",
        ),
        (
            {"reduce_relu": False},
            r"make such .*`tilepipe convert \S+a\.safetensors OUT.safetensors "
            "--model unet-bilinear --option reduce_relu=false`",
        ),
        ({"widths": [4, 8, 16]}, "have widths None"),
        ({"nonsense": 5}, "unet-bilinear has no option 'nonsense'; it takes depth"),
        ({"name": "x"}, "has no option 'name'"),
    ],
)
def test_options_asked_beside_weights_are_never_ignored(tmp_path, options, message):
    path = tmp_path / "a.safetensors"
    arguments = {"base": 2, "depth": 2}
    net = build("unet-bilinear", in_channels=1, classes=2, **arguments)
    save(path, net, name="unet-bilinear", arguments=arguments)
    # What the header does not say, and what it does.
    agreed = {"align_corners": False, "depth": 2, "relu_between": True}
    assert load_model("unet-bilinear", weights=path, options=agreed).arguments == arguments
    with pytest.raises(ModelError, match=message):
        load_model("unet-bilinear", weights=path, options=options)


def test_lists_in_a_header_are_what_was_asked(tmp_path):
    path = tmp_path / "a.safetensors"
    arguments = {"widths": [2, 3], "depth": 1}
    save(path, build("unet-same", in_channels=1, classes=2, **arguments), arguments=arguments)
    assert load_model(path, options={"widths": (2, 3)}).in_channels == 1


@pytest.mark.parametrize("option", ["name", "in_channels", "classes", "nonsense"])
def test_seeded_weights_take_no_option_that_is_none(option):
    with pytest.raises(ModelError, match=f"unet has no option '{option}'"):
        load_model("unet", weights="random:0", options={option: 3})


def test_a_value_that_torch_refuses_is_a_clear_error():
    with pytest.raises(ModelError, match=r"cannot be built with .*dropout"):
        build("unet-same", in_channels=1, classes=2, base=2, dropout=7)


@pytest.mark.parametrize("mpp", [-1.0, 0.0, 1e9, float("nan"), float("inf")])
def test_a_header_is_checked_before_anything_is_written(tmp_path, net, mpp):
    path = tmp_path / "a.safetensors"
    with pytest.raises(CheckpointError, match=r"a\.safetensors: .*mpp"):
        save(path, net, mpp=mpp)
    with pytest.raises(CheckpointError, match="2 means for 1 channels"):
        save(path, net, normalisation=Normalisation("mean-std", (0.1, 0.2), (1.0, 1.0)))
    assert not list(tmp_path.iterdir())


def test_no_header_is_written_that_would_not_be_read(tmp_path, net):
    path = tmp_path / "a.safetensors"
    save(path, net, extra={"notes": "x" * 1_000_000})
    assert len(read_header(path)["extra"]["notes"]) == 1_000_000
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=r"a\.safetensors: the header would have .* at most"):
        save(path, net, extra={"notes": "x" * (1 << 20)})
    assert path.read_bytes() == before


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_weights_are_as_open_as_the_umask_says(tmp_path, net, umask):
    (tmp_path / "a.safetensors.partial").touch(mode=0o600)  # of one that was killed
    before = os.umask(umask)
    try:
        save(tmp_path / "a.safetensors", net)
        (tmp_path / "other").touch()
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode for path in tmp_path.iterdir()}
    assert modes["a.safetensors"] == modes["other"]


def test_only_regular_files_are_written_over(tmp_path, net):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        with pytest.raises(CheckpointError, match=f"{name}: is not a regular file"):
            save(tmp_path / name, net)
    assert (tmp_path / "pipe").is_fifo()
    save(tmp_path / "a.safetensors", net)
    save(tmp_path / "a.safetensors", net)


def test_what_cannot_be_loaded_says_what_to_do(tmp_path):
    with pytest.raises(CheckpointError, match=r"tilepipe train.*random:0"):
        load_model("u2netp")
    with pytest.raises(ModelError, match="there are unet, unet-same"):
        load_model("unett")
    with pytest.raises(CheckpointError, match="no such weights file"):
        load_model(tmp_path / "gone.safetensors")
    with pytest.raises(CheckpointError, match="is a pickle"):
        load_model("unet", weights=tmp_path / "a.pth")


def test_how_plain_weights_are_converted_names_the_network_if_it_is_known(tmp_path):
    plain = tmp_path / "plain.safetensors"
    save_file({"a": torch.zeros(1)}, str(plain))
    (tmp_path / "a.pth").touch()
    for path in (plain, tmp_path / "a.pth"):
        with pytest.raises(CheckpointError, match=r"OUT\.safetensors --model unet-same`$"):
            load_model("unet-same", weights=path)
        with pytest.raises(CheckpointError, match=r"--model NAME`, NAME being a line of `tilepipe"):
            load_model(path)


@pytest.mark.parametrize("text", ["random:", "random:x", "random:-1", "random:1.5", "random:²"])
def test_a_seed_is_a_whole_number(text):
    with pytest.raises(CheckpointError, match="whole number"):
        load_model("unet", weights=text)


def test_seeds_are_parsed():
    assert parse_seed("random:12") == 12
    assert parse_seed("file.safetensors") is None


def test_a_seed_gives_the_same_weights_everywhere():
    # Pinned: a worker on another machine must draw the same numbers.
    model = load_model("unet", weights="random:0", base=2)
    assert model.sha256 == SHA256_OF_UNET_0
    assert model.sha256 == load_model("unet", weights="random:0", base=2).sha256
    assert model.sha256 != load_model("unet", weights="random:1", base=2).sha256
    assert model.source == "random:0"


def test_a_seed_does_not_touch_the_global_generator():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    net = build("unet", in_channels=1, classes=2, base=2)
    torch.set_rng_state(before)
    fill_seeded(net, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_reading_gives_a_net_that_can_go_on_training(tmp_path, net):
    path = tmp_path / "a.safetensors"
    save(path, net)
    _, training = read_checkpoint(path)
    training.train()
    training(torch.rand(2, 1, 32, 32))["logits"][0].sum().backward()
    norms = [part for part in training.modules() if isinstance(part, torch.nn.BatchNorm2d)]
    assert all(int(part.num_batches_tracked) == 1 for part in norms)


SHA256_OF_UNET_0 = "92d2ca3eaddf93a2db26d0d551ef62d1527b133c7fff2d8c1fdaa4b6f22921f0"


def test_weights_are_read_without_torchs_compiler():
    """It takes a second and 70 MB; torch loads it to draw numbers for a network without data."""
    code = (
        "import sys\n"
        "from tilepipe.models import load_model\n"
        "load_model('unet')\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
