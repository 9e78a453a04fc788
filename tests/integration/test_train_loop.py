"""Training end to end on tiny images: it learns, resumes to the same weights, says why not."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from tilepipe.errors import ModelError, PlanError, SpecError, TilepipeError, TrainError
from tilepipe.infer import Engine, verify
from tilepipe.infer.plans import plan_for
from tilepipe.models import checkpoint, load_model, read_header
from tilepipe.pipeline.cells import Rule
from tilepipe.pipeline.events import Note
from tilepipe.pipeline.run import Request, run_one
from tilepipe.spec import JobSpec
from tilepipe.store import open_store
from tilepipe.tiling import Box
from tilepipe.train import ahead, log, loop
from tilepipe.train.augment import NO_AUGMENT, AugmentSpec
from tilepipe.train.events import Started, Stepped, Validated
from tilepipe.train.images import open_pair
from tilepipe.train.loop import train
from tilepipe.train.metrics import confusion, foreground_dice
from tilepipe.train.setup import gather
from tilepipe.train.spec import TrainSpec
from tilepipe.train.state import Averaged, Counters, load_state, save_state
from tilepipe.train.validate import KindScore


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


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("unet", {"depth": 2, "norm": "batch"}),
        ("unet-same", {"depth": 2}),
        ("unet-bilinear", {"depth": 2, "any_size": True}),
    ],
)
@pytest.mark.parametrize("classes", [None, 1])
def test_weights_are_chosen_by_the_classes_that_run_makes(folders, model, options, classes):
    """Padding at the borders of an image is nothing that a mask is made of: run mirrors there."""
    for part in ("img", "lab"):  # sides of no network's alignment
        for path in (folders / part).iterdir():
            with Image.open(path) as image:
                cut = image.crop((0, 0, 61, 50))
            cut.save(path)
    spec = spec_of(folders, model=model, options=options, classes=classes, lr=0.02, steps=12)
    score = train(spec).scores[0]
    made = load_model(spec.out)
    held = gather(spec)[1]
    dices = []
    for pair in held:
        image, labels = open_pair(pair)
        plan, _ = plan_for(made, image.extent, JobSpec(), unit_px=64)
        engine = Engine(made, plan=plan)
        found = engine.segment(image.read, Box.of_shape(image.extent)).ids
        engine.close()
        truth = labels.read(Box.of_shape(image.extent))[0] != 0
        dices.append(foreground_dice(confusion(found != 0, truth, 2)))
    assert 0 < score.dice < 1
    assert score.dice == pytest.approx(np.mean(dices), abs=1e-9)


def test_a_resumed_training_knows_the_weights_it_kept(folders):
    """No later validation is better than the first, whose scores and hash are the result."""
    spec = spec_of(folders, out=folders / "parts.safetensors", steps=6, lr=1e-9, ema=0.0)
    with pytest.raises(Killed):
        train(spec, on_event=kill_after(3))
    kept = read_header(spec.out)["extra"]
    result = train(spec, resume=True)
    assert result.best_step == kept["step"] == 2
    assert result.sha256 == load_model(spec.out).sha256
    assert [score.dice for score in result.scores] == [score["dice"] for score in kept["scores"]]
    assert result.metric == kept["metric"]


def test_samples_made_ahead_give_the_same_weights(folders, monkeypatch):
    whole, parts = (spec_of(folders, out=folders / f"{name}.safetensors") for name in "ab")
    train(whole)
    begun = []

    def by_threads(*args, first, threads, **options):
        assert threads == 0
        begun.append(first)
        return ahead.batches(*args, first=first, threads=3, **options)

    monkeypatch.setattr(loop, "batches", by_threads)
    with pytest.raises(Killed):
        train(parts, on_event=kill_after(3))
    train(parts, resume=True)
    assert begun == [0, 2]
    wanted, got = load_file(whole.out), load_file(parts.out)
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)
    assert not [one for one in threading.enumerate() if one.name.startswith("tilepipe-sample")]


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


def test_a_state_of_other_kinds_is_refused(folders):
    kinds = folders / "kinds.csv"
    kinds.write_text("id,kind\n0,dark\n1,dark\n2,bright\n3,bright\n")
    spec = spec_of(folders, kinds=kinds, kind_weights={"dark": 3.0}, val_share=0.0)
    with pytest.raises(Killed):
        train(spec, on_event=kill_after(3))
    kinds.write_text("id,kind\n0,dark\n1,bright\n2,dark\n3,bright\n")
    with pytest.raises(TrainError, match="other settings or data"):
        train(spec, resume=True)
    # A file that says the same otherwise, elsewhere, is the same.
    again = folders / "again.csv"
    again.write_text("kind,id\nbright,3\nbright,2\ndark,1\ndark,0\nother,none\n")
    started = []
    train(spec.model_copy(update={"kinds": again}), resume=True, on_event=started.append)
    assert started[0].resumed_step > 0


def test_a_state_of_another_split_is_refused(folders):
    """An image that was learnt from would be chosen by."""
    for part in ("img", "lab"):
        (folders / f"val-{part}").mkdir()
        (folders / part / "4.png").rename(folders / f"val-{part}" / "4.png")
    spec = spec_of(folders, val=folders / "val-img", val_labels=folders / "val-lab")
    with pytest.raises(Killed):
        train(spec, on_event=kill_after(3))
    for part in ("img", "lab"):
        (folders / part / "3.png").rename(folders / f"val-{part}" / "3.png")
    with pytest.raises(TrainError, match="other settings or data"):
        train(spec, resume=True)


def test_nothing_is_trained_over_unless_asked_for(folders):
    spec = spec_of(folders)
    with pytest.raises(Killed):
        train(spec, on_event=kill_after(3))
    with pytest.raises(TrainError, match=r"did not end; --resume goes on with it, --overwrite"):
        train(spec)
    first = train(spec, resume=True)
    kept = spec.out.read_bytes()
    with pytest.raises(TrainError, match=r"w\.safetensors: exists already, and the weights would"):
        train(spec_of(folders, seed=4))
    assert spec.out.read_bytes() == kept
    # The log and the curve might be anybody's.
    for suffix, what in ((".csv", "log"), (".png", "curve")):
        theirs = folders / f"theirs{suffix}"
        theirs.write_bytes(b"theirs")
        with pytest.raises(TrainError, match=rf"theirs\{suffix}: .* the {what} would be written"):
            train(spec_of(folders, out=folders / "theirs.safetensors"))
        assert theirs.read_bytes() == b"theirs"
        theirs.unlink()
    again = train(spec_of(folders, seed=4), overwrite=True)
    assert again.sha256 == load_model(spec.out).sha256 != first.sha256


@pytest.mark.parametrize("metric", [float("nan"), 0.5])
def test_weights_of_the_training_before_are_never_the_result(folders, monkeypatch, metric):
    first = train(spec_of(folders))
    monkeypatch.setattr(loop, "overall", lambda scores: metric)
    again = train(spec_of(folders, seed=4), overwrite=True)
    assert again.sha256 == load_model(folders / "w.safetensors").sha256 != first.sha256
    # The time is up between a step and the first validation.
    shares = iter((0.0, 0.0, 0.0, 1.0))
    monkeypatch.setattr(loop.Training, "progress", lambda self, elapsed_s: next(shares))
    again = train(spec_of(folders, seed=5), overwrite=True)
    assert read_header(folders / "w.safetensors")["extra"]["settings"]["seed"] == 5
    assert again.sha256 == load_model(folders / "w.safetensors").sha256


def test_validations_take_a_fifth_of_the_time_at_the_most(folders, monkeypatch):
    """On a clock of which a step takes 1 s and a validation 30 s."""
    clock = [0.0]
    step, validate = loop.Training.step, loop.Training.validate

    def slow_step(self, batch, **given):
        clock[0] += 1
        return step(self, batch, **given)

    def slow_validate(self, lr):
        clock[0] += 30
        return validate(self, lr)

    monkeypatch.setattr(loop.Training, "step", slow_step)
    monkeypatch.setattr(loop.Training, "validate", slow_validate)
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    events = []
    timed = {"steps": None, "minutes": 5, "validate_every": None, "save_every_s": 1e9}
    train(spec_of(folders, **timed), on_event=events.append)
    validations = sum(isinstance(event, Validated) for event in events)
    steps = sum(isinstance(event, Stepped) for event in events)
    assert validations >= 2  # the last one is at the end
    assert 30 * (validations - 1) <= 0.25 * 300
    assert steps >= 200


def test_what_was_learnt_when_the_time_is_up_is_validated(folders, monkeypatch):
    # Of the third step the clock says 0.9; then the state is saved, and the time is up.
    shares = iter((0.0, 0.0, 0.3, 0.3, 0.6, 0.6, 0.9, 1.0))
    monkeypatch.setattr(loop.Training, "progress", lambda self, elapsed_s: next(shares))
    assert train(spec_of(folders, steps=100, validate_every=2)).steps == 3
    with (folders / "w.csv").open(newline="") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["2", "3"]


@pytest.mark.parametrize("suffix", [".csv", ".png"])
def test_resuming_what_never_began_writes_over_nothing(folders, suffix):
    spec = spec_of(folders)
    notes = spec.out.with_suffix(suffix)
    notes.write_text("mine")
    with pytest.raises(TrainError, match="exists already"):
        train(spec, resume=True)
    assert notes.read_text() == "mine"


def test_overwriting_leaves_no_state_of_another_training(folders):
    spec = spec_of(folders)
    with pytest.raises(Killed):
        train(spec, on_event=kill_after(3))
    with pytest.raises(Killed):  # before it wrote one of its own
        train(spec, overwrite=True, on_event=kill_after(1))
    with pytest.raises(TrainError, match="no state beside it to resume"):
        train(spec, resume=True)
    for suffix in (".safetensors", ".csv", ".png"):
        spec.out.with_suffix(suffix).unlink()
    started = []
    train(spec, resume=True, on_event=started.append)
    assert started[0].resumed_step == 0


def test_a_damaged_log_beside_a_good_state_is_named(folders):
    spec = spec_of(folders)
    with pytest.raises(Killed):
        train(spec, on_event=kill_after(3))
    log = spec.out.with_suffix(".csv")
    good = log.read_text()
    for damaged in (good.rpartition(",")[0], "step\n\n2\n", "step,elapsed_s\nx,y\n"):
        log.write_text(damaged)
        with pytest.raises(TrainError, match=r"w\.csv: not the log of a training .* move it away"):
            train(spec, resume=True)
    log.unlink()
    assert train(spec, resume=True).steps == 4


def test_weights_and_log_of_thousands_of_kinds_are_read_again(folders, monkeypatch):
    score = KindScore("", 1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 3)
    kinds = tuple(replace(score, kind=f"patient {number:05}") for number in range(6000))
    monkeypatch.setattr(loop, "score_images", lambda *_args, **_named: kinds)
    spec = spec_of(folders)
    with pytest.raises(Killed):
        train(spec, on_event=kill_after(3))
    assert read_header(spec.out)["extra"]["scores"] is None
    assert len(train(spec, resume=True).scores) == 6000
    assert load_model(spec.out).extra["metric"] == 0.5
    assert spec.out.with_suffix(".csv").read_text().count("patient 05999 0.5000 0.5000") == 2


@pytest.mark.parametrize("suffix", [".csv", ".png"])
def test_a_full_disk_names_the_log_and_the_curve(folders, monkeypatch, suffix):
    def full(*_args, **_named):
        raise OSError(28, "No space left on device")

    where = log.csv if suffix == ".csv" else FigureCanvasAgg
    monkeypatch.setattr(where, "writer" if suffix == ".csv" else "print_png", full)
    with pytest.raises(TilepipeError, match=rf"w\{suffix}: cannot be written: No space left"):
        train(spec_of(folders))
    assert not list(folders.glob("*.partial"))


def test_half_precision_scales_gradients_on_a_processor_too(folders, monkeypatch):
    """Small gradients are 0 in fp16 unless the loss is scaled up; torch warned that it was not."""
    scales = []
    step = loop.Training.step

    def noted(self, batch, **settings):
        scales.append(self.scaler.get_scale())
        return step(self, batch, **settings)

    monkeypatch.setattr(loop.Training, "step", noted)
    train(spec_of(folders, precision="fp16", steps=1))
    assert scales[0] > 1000


def test_the_state_holds_the_scaler_and_says_when_it_cannot_be_written(folders, monkeypatch):
    spec = spec_of(folders)
    net = torch.nn.Conv2d(1, 1, 1)
    parts = {"module": net, "averaged": Averaged(net, 0.9), "fingerprint": "f"}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    for _ in range(3):
        scaler.scale(net(torch.ones(1, 1, 2, 2)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    path = folders / "a.state"
    save_state(path, optimizer=optimizer, scaler=scaler, counters=Counters(step=3), **parts)
    fresh = torch.amp.GradScaler("cpu")
    assert fresh.state_dict() != scaler.state_dict()
    load_state(path, optimizer=optimizer, scaler=fresh, **parts)
    assert fresh.state_dict() == scaler.state_dict()

    def full(*_args, **_named):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(TilepipeError, match=r"w\.safetensors\.state: cannot be written: No space"):
        train(spec)
    assert not list(folders.glob("*.partial"))


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


def test_what_learns_from_luminance_runs_on_colours(folders, tmp_path):
    colours = np.random.default_rng(5).integers(0, 255, (90, 70, 3), np.uint8)
    for path in sorted((folders / "img").iterdir())[1:3]:
        grey = np.asarray(Image.open(path))
        Image.fromarray(np.stack([grey, grey // 2, 255 - grey], axis=-1)).save(path)
    weights = train(spec_of(folders, steps=2)).weights
    model = load_model(weights)
    assert model.in_channels == 1
    assert model.luminance
    tifffile.imwrite(tmp_path / "rgb.tif", colours, photometric="rgb")
    told = []
    spec = JobSpec(model=str(weights), precision="fp32", backend="torch", device="cpu", tune=False)
    request = Request(str(tmp_path / "rgb.tif"), str(tmp_path / "rgb.zarr"), spec)
    run_one(request, on_event=told.append)
    assert "colours, shown to the network as luminance" in [
        event.text for event in told if isinstance(event, Note)
    ]
    store = open_store(str(tmp_path / "rgb.zarr"))
    mask = store.label(model.name).level(0).read(Box(0, 0, 90, 70))
    shares = colours.astype(np.float64) @ [0.299, 0.587, 0.114]
    assert np.abs(shares - shares.round()).max() > 0.4
    grey = shares.round().astype(np.uint8)[None]
    plan, _ = plan_for(model, (90, 70), spec, unit_px=128)
    alone = Engine(model, plan=plan, device="cpu", precision="fp32", backend="torch", batch=1)
    np.testing.assert_array_equal(
        mask, alone.segment(lambda box: grey[(slice(None), *box.slices)], Box(0, 0, 90, 70)).ids
    )
    alone.close()
    verify(str(tmp_path / "rgb.zarr"), samples=4)

    # Three channels that are no colours have no luminance.
    tifffile.imwrite(
        tmp_path / "stains.tif", np.moveaxis(colours, -1, 0), photometric="minisblack",
        planarconfig="separate", metadata={"axes": "CYX"}, ome=True,
    )  # fmt: skip
    stains = Request(str(tmp_path / "stains.tif"), str(tmp_path / "stains.zarr"), spec)
    with pytest.raises(PlanError, match=r"has 3 channels, but .* takes 1"):
        run_one(stains)


def test_what_learns_from_grey_alone_is_not_shown_colours(folders, tmp_path):
    weights = train(spec_of(folders, steps=1)).weights
    assert not load_model(weights).luminance
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((90, 70, 3), np.uint8), photometric="rgb")
    spec = JobSpec(model=str(weights), device="cpu")
    with pytest.raises(PlanError, match=r"has 3 channels, but .* takes 1"):
        run_one(Request(str(tmp_path / "a.tif"), str(tmp_path / "a.zarr"), spec))


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


def test_the_ring_keeps_the_name_by_which_run_knows_it(folders):
    """With any other, ``run --instances`` would count each ring as an object of its own."""
    names = ("outside", "cell", "edge")
    with pytest.raises(TrainError, match=r"'edge': the third class .* is called border"):
        train(spec_of(folders, target="foreground+border", class_names=names))
    spec = spec_of(folders, target="foreground+border", class_names=(*names[:2], "Border"), steps=1)
    assert Rule.of_classes(load_model(train(spec).weights).classes).border == 2


@pytest.mark.parametrize(("count", "told"), [(0, "no"), (2, "2")])
def test_a_gpu_that_is_not_there(folders, count, told, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(TrainError, match=f"device cuda:2: torch sees {told} CUDA devices here"):
        train(spec_of(folders, device="cuda:2"))


def test_what_cannot_be_trained(folders):
    with pytest.raises(SpecError, match="one of steps, epochs, minutes"):
        spec_of(folders, steps=None)
    with pytest.raises(SpecError, match="val and val_labels go together"):
        spec_of(folders, val=folders / "img")
    with pytest.raises(TrainError, match=r"class ids .*4; the network has 2 classes"):
        train(spec_of(folders, target="classes"))
    with pytest.raises(TrainError, match="3 class names for 2 classes"):
        train(spec_of(folders, class_names=("a", "b", "c")))
    with pytest.raises(TilepipeError, match="2 means for 1 channels"):
        train(spec_of(folders, mean=(0.2, 0.3), std=(1.0, 1.0)))
    with pytest.raises(TilepipeError, match="norm"):
        train(spec_of(folders, options={"norm": "group"}))
    with pytest.raises(TrainError, match="the loss is nan"):
        train(spec_of(folders, lr=1e30, clip=None, optimizer="sgd", steps=20, save_every_s=99.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": "w.csv"}, "out: .*weights are called .safetensors"),
        ({"out": "w"}, "out: .*weights are called .safetensors"),
        ({"mpp": 2e6}, "mpp: .*less than or equal to 1000000"),
        ({"ring_px": 0.9}, "ring_px: .*greater than or equal to 1"),
        ({"lr": float("inf")}, "lr: .*finite"),
        ({"lr": 1e300}, "lr: .*less than or equal to"),
        ({"w0": 1e300}, "w0: .*less than or equal to"),
        ({"sigma": 1e-300}, "sigma: .*greater than or equal to"),
        ({"sigma": 1e300}, "sigma: .*less than or equal to"),
        ({"class_weights": (1, 1e300)}, r"class_weights\.1: .*less than or equal to"),
        ({"options": {"dropout": float("nan")}}, "options: options are finite numbers"),
        ({"seed": 10**14}, "seed: "),
        ({"class_names": ("a", "")}, r"class_names\.1: "),
        ({"loss": "dice", "class_weights": (1, 2)}, "class_weights have no say in the loss dice"),
        ({"loss": "bce+iou", "class_weights": (1, 2)}, "class_weights have no say"),
        ({"class_weights": (-1, 2)}, r"class_weights\.0: .*greater than or equal to 0"),
        ({"output_weights": (1, -2)}, r"output_weights\.1: .*greater than or equal to 0"),
        ({"output_weights": (0, 0)}, "output_weights: one of the weights has to be above 0"),
        ({"kind_weights": {"a": -1}}, r"kind_weights\.a: .*greater than or equal to 0"),
    ],
)
def test_settings_that_are_refused(folders, changes, message):
    with pytest.raises(SpecError, match=message):
        spec_of(folders, **changes)


@pytest.mark.parametrize("loss", ["ce", "weighted-ce", "ce+dice"])
def test_class_weights_have_a_say_where_they_are_taken(folders, loss):
    def losses(**changes):
        events = []
        train(
            spec_of(folders, steps=1, loss=loss, **changes), overwrite=True, on_event=events.append
        )
        return [event.loss for event in events if isinstance(event, Stepped)]

    assert losses(class_weights=(0.1, 9.0)) != losses()


@pytest.mark.parametrize("seed", [2**43, 7_000_000_000_000])
def test_large_seeds(folders, seed):
    assert train(spec_of(folders, seed=seed, steps=1)).steps == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 7}, "cannot be built"),
        ({"depth": 99}, "depth 99"),
        ({"name": 3}, "no option 'name'"),
        ({"in_channels": 3}, "no option 'in_channels'"),
        ({"nonsense": 1}, "no option 'nonsense'"),
    ],
)
def test_options_that_the_network_does_not_have(folders, options, message):
    with pytest.raises(ModelError, match=message):
        train(spec_of(folders / "none", options=options))  # no image is looked for before


def test_a_batch_that_torch_refuses_says_what_next(folders, monkeypatch):
    changes = {"batch": 1, "output_px": 4, "model": "unet-same"}
    with pytest.raises(TrainError, match="try a larger --batch or --output-px"):
        train(spec_of(folders, **changes))

    def full(self, batch, **settings):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB.")

    monkeypatch.setattr(loop.Training, "step", full)
    with pytest.raises(TrainError, match=r"2 samples of .* px a side: try a smaller --batch"):
        train(spec_of(folders))


def test_nothing_is_written_over_an_input(folders):
    (folders / "kinds.csv").write_text("id,kind\n0,a\n1,a\n")
    before = {path: path.read_bytes() for path in folders.rglob("*") if path.is_file()}
    for changes in (
        {"out": folders / "kinds.safetensors", "kinds": folders / "kinds.csv"},
        {"out": folders / "img" / "2.safetensors"},
        {"out": folders / "lab" / ".." / "lab" / "2.safetensors"},
    ):
        with pytest.raises(TrainError, match="would be written over this input; choose another -o"):
            train(spec_of(folders, **changes))
    (folders / "list.txt").write_text("4\n")
    (folders / "list.csv").symlink_to(folders / "list.txt")
    with pytest.raises(TrainError, match=r"list\.csv: the log would be written over"):
        train(spec_of(folders, out=folders / "list.safetensors", exclude=folders / "list.txt"))
    assert all(path.read_bytes() == content for path, content in before.items())


def test_the_curve_is_not_drawn_among_the_images(folders):
    """It would be an image without labels when the training goes on."""
    with pytest.raises(TrainError, match=r"w\.png: the curve would lie among the images"):
        train(spec_of(folders, out=folders / "img" / "w.safetensors"))
    assert len(list((folders / "img").iterdir())) == 5
    shutil.copytree(folders / "img", folders / "val")
    val = {"val": folders / "val", "val_labels": folders / "lab"}
    with pytest.raises(TrainError, match="among the images"):
        train(spec_of(folders, out=folders / "val" / "w.safetensors", **val))


@pytest.mark.parametrize("suffix", [".safetensors", ".csv", ".png", ".safetensors.state"])
def test_only_regular_files_are_written(folders, suffix):
    os.mkfifo(folders / f"w{suffix}")
    with pytest.raises(TrainError, match=rf"w\{suffix}: .* not a regular file"):
        train(spec_of(folders))


def test_kinds_of_no_image_are_named(folders):
    kinds = folders / "kinds.csv"
    kinds.write_text("id,kind\n0.png,dark\n1.png,bright\n")
    with pytest.raises(TrainError, match="its ids are of no image; ids are file names without"):
        train(spec_of(folders, kinds=kinds))
    kinds.write_text("id,kind\n0,dark\n1,bright\nelsewhere,other\n")
    for name in ("drak", "other"):
        with pytest.raises(TrainError, match=f"no image is of kind '{name}'; the kinds are bright"):
            train(spec_of(folders, kinds=kinds, kind_weights={name: 3.0}))
    with pytest.raises(TrainError, match="give them with --kinds"):
        train(spec_of(folders, kind_weights={"dark": 3.0}))


def test_excluded_names_are_neither_learnt_from_nor_chosen_by(folders):
    exclude = folders / "exclude.txt"
    exclude.write_text("1\n4\n")
    started = []
    spec = spec_of(
        folders, exclude=exclude, val=folders / "img", val_labels=folders / "lab", steps=1
    )
    train(spec, on_event=started.append)
    assert (started[0].training, started[0].validation) == (3, 3)
    exclude.write_text("1\nlast\nother\n")
    for changes in ({}, {"val": folders / "img", "val_labels": folders / "lab"}):
        with pytest.raises(
            TrainError, match=r"exclude\.txt: 2 names are of no image, first 'last'"
        ):
            train(spec_of(folders, exclude=exclude, **changes))


@pytest.mark.parametrize("folder", ["lab", "val_lab"])
def test_labels_of_another_size_are_named_before_the_first_step(folders, folder):
    for part in ("img", "lab"):
        shutil.copytree(folders / part, folders / f"val_{part}")
    path = folders / folder / "3.png"
    with Image.open(path) as labels:
        larger = np.pad(np.asarray(labels), ((0, 9), (0, 0)))
    Image.fromarray(larger).save(path)
    events = []
    spec = spec_of(folders, val=folders / "val_img", val_labels=folders / "val_lab")
    with pytest.raises(TrainError, match=rf"3\.png: has .*{folder}/3\.png have \(73, 64\)"):
        train(spec, on_event=events.append)
    assert not events


def test_floats_are_learnt_like_integers(folders):
    """The same images in another unit: both are learnt, since nothing is cut off."""
    settings = {
        "steps": 60, "base": 4, "validate_every": 60, "lr": 0.01, "batch": 3, "ema": 0.9,
        "options": {"norm": "batch", "depth": 2, "dropout": 0.0}, "freeze_norm": 0.5,
        "augment": AugmentSpec(elastic=0.0, blur_px=0.0),
    }  # fmt: skip
    for path in list((folders / "img").iterdir()):
        with Image.open(path) as image:
            values = np.asarray(image).astype(np.float32)
        path.unlink()
        np.save(path.with_suffix(".npy"), values)
    unit = {"mean": (60.0,), "std": (70.0,)}
    assert train(spec_of(folders, **settings, **unit)).scores[0].dice > 0.8


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
