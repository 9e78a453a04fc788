"""``tilepipe models`` and ``tilepipe convert`` as typed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner

from tilepipe.cli import options
from tilepipe.cli.main import main
from tilepipe.models import build


def call(*args):
    return CliRunner().invoke(main, [str(arg) for arg in args])


def test_models_json_lists_the_nine():
    result = call("models", "--json")
    assert result.exit_code == 0, result.output
    rows = {row["name"]: row for row in json.loads(result.stdout)}
    assert len(rows) == 9
    for row in rows.values():
        assert {"parameters", "context_px", "alignment_px", "exact", "reason"} <= set(row)
        assert row["paper"]
        assert row["reason"]
    assert rows["unet"]["parameters"] == 31_031_810
    assert (rows["unet"]["context_px"], rows["unet"]["alignment_px"]) == (92, 16)
    assert rows["u2net"]["context_px"] == 3295
    assert rows["unet-dilated"]["context_px"] is None
    assert not rows["unet-dilated"]["exact"]


def test_models_as_a_table():
    result = call("models")
    assert result.exit_code == 0
    assert "unet3plus-cgm" in result.stdout
    assert "3295 px" in result.stdout


@pytest.fixture
def state(tmp_path):
    net = build("unet-same", in_channels=1, classes=1, base=2)
    path = tmp_path / "in.pth"
    torch.save({f"net.{key}": value for key, value in net.state_dict().items()}, path)
    (tmp_path / "map.toml").write_text('[prefix]\n"net." = ""\n')
    return path


def test_convert(tmp_path, state):
    out = tmp_path / "out.safetensors"
    flags = ("--model", "unet-same", "--map", tmp_path / "map.toml", "--in-channels", 1)
    result = call("convert", state, out, *flags, "--classes", 1, "--option", "base=2", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert (facts["context_px"], facts["outputs"], facts["exact"]) == (95, 1, True)
    assert out.is_file()
    text = call("convert", state, out, *flags, "--classes", 1, "--base", 2, "--fp16")
    assert "Next: tilepipe run" in text.stdout
    assert "do not say, so this is taken: leaky = true" in text.stdout
    assert call("convert", state, out, *flags, "--classes", 1, "--base", 2, "-q").output == ""


def test_convert_says_what_does_not_fit(tmp_path, state):
    result = call("convert", state, tmp_path / "out.safetensors", "--model", "unet-same")
    assert result.exit_code == 1
    assert "the network wants" in result.output
    assert "net.head.bias (1,)" in result.output
    assert "Traceback" not in result.output


def test_convert_refuses_other_endings_and_bad_pairs(tmp_path, state):
    result = call("convert", state, tmp_path / "out.pth", "--model", "unet")
    assert result.exit_code == 1
    assert "rename OUT" in result.output
    result = call("convert", state, tmp_path / "o.safetensors", "--model", "unet", "--option", "x")
    assert result.exit_code == 2


@pytest.mark.parametrize(
    "value", ["nan", "NaN", "inf", "-Infinity", "1e999", "[NaN]", "2020-01-01"]
)
@pytest.mark.parametrize(
    "command",
    [
        ("run", "slide.tif", "--weights", "random:0"),
        ("train", "--images", "i", "--labels", "l", "-o", "w.safetensors", "--steps", "1"),
        ("convert", "in.pth", "out.safetensors", "--model", "unet"),
    ],
)
def test_numbers_that_are_none_are_refused_where_they_are_given(command, value):
    result = call(*command, "--option", f"dropout={value}")
    assert result.exit_code == 2
    assert f"--option dropout={value}: " in result.output
    assert "finite numbers are taken" in result.output


def test_what_an_option_says():
    pairs = ("a=1", "b=0.5", "c=true", "d=[1, 2]", "e=batch", "f='x'", "g=null", "h=1_0", "i=a=b")
    assert options.key_values(pairs) == {
        "a": 1, "b": 0.5, "c": True, "d": [1, 2], "e": "batch", "f": "x", "g": None, "h": 10,
        "i": "a=b",
    }  # fmt: skip


def test_help_does_not_import_torch():
    code = (
        "import sys\n"
        "import tilepipe.cli.models, tilepipe.cli.convert\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_inspect_knows_weights_by_any_suffix_that_convert_writes(tmp_path):
    torch.save(build("unet", in_channels=1, classes=2, base=2).state_dict(), tmp_path / "in.pth")
    out = tmp_path / "W.SAFETENSORS"
    flags = ("--model", "unet", "--base", 2, "--in-channels", 1)
    assert call("convert", tmp_path / "in.pth", out, *flags).exit_code == 0
    result = call("inspect", out, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["kind"] == "weights"
