"""Training end to end on tiny images: it learns, resumes to the same weights, says why not."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tilepipe.errors import SpecError, TilepipeError, TrainError
from tilepipe.models import load_model, read_header
from tilepipe.train.augment import NO_AUGMENT
from tilepipe.train.events import Started, Stepped, Validated
from tilepipe.train.loop import train
from tilepipe.train.spec import TrainSpec


def draw(rng, side=64):
    """Bright discs on dark noise, and their instance labels."""
    image = rng.integers(0, 40, (side, side)).astype(np.uint8)
    labels = np.zeros((side, side), np.uint16)
    yy, xx = np.mgrid[:side, :side]
    for number in range(1, 5):
        y, x = rng.integers(8, side - 8, 2)
        disc = (yy - y) ** 2 + (xx - x) ** 2 <= 36
        image[disc] = rng.integers(170, 230)
        labels[disc] = number
    return image, labels


@pytest.fixture
def folders(tmp_path):
    rng = np.random.default_rng(1)
    for part in ("img", "lab"):
        (tmp_path / part).mkdir()
    for index in range(5):
        image, labels = draw(rng)
        Image.fromarray(image).save(tmp_path / "img" / f"{index}.png")
        Image.fromarray(labels).save(tmp_path / "lab" / f"{index}.png")
    return tmp_path


def spec_of(folders, **changes):
    values = {
        "images": folders / "img", "labels": folders / "lab", "out": folders / "w.safetensors",
        "model": "unet", "target": "foreground", "base": 2,
        "options": {"norm": "batch", "depth": 2, "dropout": 0.2},
        "steps": 4, "batch": 2, "output_px": 24, "val_share": 0.2, "precision": "fp32",
        "device": "cpu", "validate_every": 2, "save_every_s": 0.0, "seed": 3,
    }  # fmt: skip
    return TrainSpec.checked({**values, **changes})


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Killed(Exception):
    pass


def kill_after(step):
    def on_event(event):
        if isinstance(event, Stepped) and event.step == step:
            raise Killed

    return on_event


def test_it_learns_and_says_how(folders):
    events = []
    spec = spec_of(
        folders, steps=60, base=4, augment=NO_AUGMENT, validate_every=30, lr=0.01, val_share=0.2,
        options={"norm": "batch", "depth": 2, "dropout": 0.0}, class_names=("outside", "disc"),
        mpp=0.5, batch=3, freeze_norm=0.5, ema=0.9,
    )  # fmt: skip
    result = train(spec, on_event=events.append)
    assert result.scores[0].dice > 0.9
    assert isinstance(events[0], Started)
    assert (events[0].training, events[0].validation) == (4, 1)
    losses = [e.loss for e in events if isinstance(e, Stepped)]
    assert len(losses) == 60
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10])
    assert [e.step for e in events if isinstance(e, Validated)] == [30, 60]
    header = read_header(spec.out)
    assert [c["name"] for c in header["classes"]] == ["outside", "disc"]
    assert header["mpp"] == 0.5
    assert header["locality"]["kind"] == "local"
    assert header["extra"]["settings"]["steps"] == 60
    assert len(header["extra"]["data_sha256"]) == 64
    assert str(folders) not in json.dumps(header)
    with spec.out.with_suffix(".csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["30", "60"]
    with Image.open(spec.out.with_suffix(".png")) as curve:
        assert min(curve.size) > 100
    assert not (folders / "w.safetensors.state").exists()
    model = load_model("unet", weights=str(spec.out))
    assert model.sha256 == result.sha256
    with pytest.raises(TrainError, match="that training is finished"):
        train(spec, resume=True)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_resumed_weights_equal_uninterrupted_ones(folders, optimizer):
    settings = {"optimizer": optimizer, "lr": 0.001, "momentum": 0.9}
    whole = spec_of(folders, out=folders / "whole.safetensors", **settings)
    train(whole)
    parts = spec_of(folders, out=folders / "parts.safetensors", **settings)
    with pytest.raises(Killed):
        train(parts, on_event=kill_after(2))
    with pytest.raises(Killed):
        train(parts, resume=True, on_event=kill_after(4))
    train(parts, resume=True)
    wanted, got = load_file(whole.out), load_file(parts.out)
    assert wanted.keys() == got.keys()
    for name, tensor in wanted.items():
        assert torch.equal(tensor, got[name]), name
    rows = [path.with_suffix(".csv").read_text().splitlines() for path in (whole.out, parts.out)]
    assert [r.split(",")[3:] for r in rows[0]] == [r.split(",")[3:] for r in rows[1]]


SCRIPT = """
import sys, torch, pathlib
torch.set_num_threads(1)
from tilepipe.train.spec import TrainSpec
from tilepipe.train.loop import train
spec = TrainSpec.from_toml(pathlib.Path(sys.argv[1]))
train(spec, resume=True, on_event=lambda e: print(e, flush=True))
"""


def test_killed_by_the_system_and_resumed(folders):
    base = spec_of(folders, steps=30, validate_every=15, out=folders / "whole.safetensors")
    train(base)
    job = folders / "job.toml"
    job.write_text(
        'images = "img"\nlabels = "lab"\nout = "w.safetensors"\ntarget = "foreground"\nbase = 2\n'
        "steps = 30\nbatch = 2\noutput_px = 24\nval_share = 0.2\nprecision = 'fp32'\nseed = 3\n"
        "device = 'cpu'\nvalidate_every = 15\nsave-every-s = 0\n"
        "options = { norm = 'batch', depth = 2, dropout = 0.2 }\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, str(job)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    for line in process.stdout:
        if "Stepped(step=7," in line or time.monotonic() > deadline:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert process.returncode == -signal.SIGKILL
    assert (folders / "w.safetensors.state").exists()
    spec = TrainSpec.from_toml(job)
    resumed = []
    train(spec, resume=True, on_event=lambda e: resumed.append(e))
    assert resumed[0].resumed_step >= 6
    wanted, got = load_file(base.out), load_file(spec.out)
    for name, tensor in wanted.items():
        assert torch.equal(tensor, got[name]), name


def test_state_of_another_training_is_refused(folders):
    with pytest.raises(Killed):
        train(spec_of(folders), on_event=kill_after(3))
    with pytest.raises(TrainError, match="other settings or data"):
        train(spec_of(folders, lr=0.5), resume=True)
    state = folders / "w.safetensors.state"
    state.write_bytes(b"nothing")
    with pytest.raises(TrainError, match="not the state of a training"):
        train(spec_of(folders), resume=True)


@pytest.mark.parametrize("loss", ["weighted-ce", "ce+dice", "bce", "hybrid"])
@pytest.mark.parametrize("classes", [None, 1])
def test_every_loss_steps(folders, loss, classes):
    result = train(spec_of(folders, loss=loss, classes=classes, steps=1))
    assert result.steps == 1
    assert read_header(result.weights)["outputs"] == (classes or 2)


@pytest.mark.parametrize(
    ("model", "options"),
    [("unetpp", {}), ("unet3plus", {}), ("unet3plus-cgm", {}), ("u2netp", {})],
)
def test_side_outputs_and_gate_are_taught(folders, model, options):
    from tilepipe.models import ARCHITECTURES

    if model not in ARCHITECTURES:
        pytest.skip(f"no architecture {model}; there are {', '.join(ARCHITECTURES)}")
    spec = spec_of(folders, model=model, options=options, steps=1, output_px=32, batch=2, base=2)
    result = train(spec)
    assert 0 <= result.scores[0].dice <= 1


def test_border_target_has_three_classes(folders):
    spec = spec_of(
        folders, target="foreground+border", steps=1, store="fp16", in_channels=3,
        mean=(0.2,), std=(0.25,),
    )  # fmt: skip
    result = train(spec)
    header = read_header(result.weights)
    assert [c["name"] for c in header["classes"]] == ["background", "nucleus", "border"]
    assert header["in_channels"] == 3
    assert header["normalisation"] == {"kind": "mean-std", "mean": [0.2], "std": [0.25]}
    assert {t.dtype for t in load_file(result.weights).values()} == {torch.float16}
    assert result.scores[0].f1 is not None


def test_what_cannot_be_trained(folders):
    with pytest.raises(SpecError, match="one of steps, epochs, minutes"):
        spec_of(folders, steps=None)
    with pytest.raises(SpecError, match="val and val_labels go together"):
        spec_of(folders, val=folders / "img")
    with pytest.raises(TrainError, match="class id 4, the network has 2 classes"):
        train(spec_of(folders, target="classes"))
    with pytest.raises(TrainError, match="3 class names for 2 classes"):
        train(spec_of(folders, class_names=("a", "b", "c")))
    with pytest.raises(TilepipeError, match="2 means for 1 channels"):
        train(spec_of(folders, mean=(0.2, 0.3), std=(1.0, 1.0)))
    with pytest.raises(TilepipeError, match="norm"):
        train(spec_of(folders, options={"norm": "group"}))
    with pytest.raises(TrainError, match="the loss is nan"):
        train(spec_of(folders, lr=1e30, clip=None, optimizer="sgd", steps=20, save_every_s=99.0))


def test_without_validation_the_last_weights_are_kept(folders):
    result = train(spec_of(folders, val_share=0.0))
    assert (result.best_step, result.scores) == (4, ())
    assert result.to_json()["metric"] is None
    assert read_header(result.weights)["extra"]["metric"] is None


def test_validation_folder_and_epochs(folders):
    spec = spec_of(folders, val=folders / "img", val_labels=folders / "lab", steps=None, epochs=1.2)
    events = []
    assert train(spec, on_event=events.append).steps == 3
    assert (events[0].training, events[0].validation) == (5, 5)
