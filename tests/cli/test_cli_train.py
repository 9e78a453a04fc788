"""``tilepipe train`` and ``tilepipe evaluate`` as a user calls them."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from tilepipe.cli.main import main
from tilepipe.store import create_store
from tilepipe.tiling import Box, Grid


@pytest.fixture
def folders(tmp_path):
    rng = np.random.default_rng(0)
    for part in ("img", "lab"):
        (tmp_path / part).mkdir()
    for index in range(3):
        labels = np.zeros((48, 48), np.uint8)
        labels[10:30, 8 + index : 25] = 1
        image = labels * 150 + rng.integers(0, 60, labels.shape, dtype=np.uint8)
        Image.fromarray(image.astype(np.uint8)).save(tmp_path / "img" / f"{index}.png")
        Image.fromarray(labels).save(tmp_path / "lab" / f"{index}.png")
    return tmp_path


def call(*arguments, code=0):
    result = CliRunner().invoke(main, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


SMALL = (
    "--steps", 2, "--base", 2, "--option", "depth=2", "--option", "norm=batch", "--batch", 1,
    "--output-px", 24, "--precision", "fp32", "--device", "cpu", "--val-share", 0.34,
)  # fmt: skip


def test_train_from_flags(folders):
    out = folders / "w.safetensors"
    shown = call(
        "train", "--images", folders / "img", "--labels", folders / "lab", "-o", out, *SMALL,
        "--class-names", "outside, box", "--no-augment",
    ).output  # fmt: skip
    assert "2 images to learn from, 1 to choose by" in shown
    assert "tilepipe run SLIDE" in shown
    assert out.is_file()
    assert out.with_suffix(".csv").is_file()
    assert out.with_suffix(".png").is_file()


def test_train_from_a_job_as_json(folders):
    (folders / "job.toml").write_text(
        'images = "img"\nlabels = "lab"\ntarget = "foreground"\nsteps = 9\nbase = 2\nbatch = 1\n'
        'output-px = 24\nprecision = "fp32"\nval-share = 0.34\noptions = { depth = 2 }\n'
        "[augment]\nelastic = 1.0\n"
    )
    out = folders / "w.safetensors"
    shown = call("train", "--job", folders / "job.toml", "-o", out, "--steps", 1, "--json")
    values = json.loads(shown.stdout)
    assert values["steps"] == 1
    assert values["weights"] == str(out)
    assert len(values["sha256"]) == 64


def test_train_says_what_is_missing(folders):
    assert "--images, --labels and -o are needed" in call("train", "--steps", 1, code=2).output
    wrong = call(
        "train", "--images", folders / "img", "--labels", folders / "none", "-o",
        folders / "w.safetensors", "--steps", 1, code=1,
    )  # fmt: skip
    assert "no such folder" in wrong.output
    (folders / "job.toml").write_text("image = 'img'\n")
    wrong = call("train", "--job", folders / "job.toml", code=2)
    assert "image: no such setting" in wrong.output


def test_evaluate_images(folders):
    truth = np.zeros((50, 60), np.uint8)
    truth[5:20, 5:25], truth[30:45, 30:50] = 1, 2
    found = truth.copy()
    found[5:20, 5:10] = 0
    Image.fromarray(truth).save(folders / "t.png")
    Image.fromarray(found).save(folders / "p.png")
    values = json.loads(call("evaluate", folders / "p.png", folders / "t.png", "--json").stdout)
    assert values["compared"] == "classes"
    assert values["classes"]["class 1"]["recall"] == pytest.approx(0.75)
    assert values["classes"]["class 2"]["dice"] == 1.0
    assert values["pixel_error"] == pytest.approx(75 / 3000)
    assert values["f1"]["0.75"] == 1.0
    assert values["f1"]["0.80"] == 0.5
    assert values["warping_error"] == 0.0
    text = call("evaluate", folders / "p.png", folders / "t.png").output
    assert "pixel error     0.0250" in text
    assert "2 found, 2 true" in text
    assert call("evaluate", folders / "p.png", folders / "t.png", "--quiet").output == ""


def test_evaluate_classes_against_instances_with_a_border(folders):
    cells = np.zeros((40, 40), np.uint16)
    cells[5:20, 5:15], cells[5:20, 15:25] = 1, 2
    classes = (cells > 0).astype(np.uint8)
    classes[5:20, 14:16] = 2
    Image.fromarray(cells).save(folders / "t.png")
    Image.fromarray(classes).save(folders / "p.png")
    merged = json.loads(call("evaluate", folders / "p.png", folders / "t.png", "--json").stdout)
    assert merged["compared"] == "foreground"
    assert merged["f1"]["0.50"] == 0.0
    split = json.loads(
        call("evaluate", folders / "p.png", folders / "t.png", "--border", 2, "--json").stdout
    )
    assert (split["objects_predicted"], split["f1"]["0.95"]) == (2, 1.0)
    assert split["foreground"]["dice"] == 1.0


def test_evaluate_refuses_other_sizes(folders):
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(folders / "small.png")
    wrong = call("evaluate", folders / "small.png", folders / "lab" / "0.png", code=1)
    assert "only images of one size" in wrong.output
    assert "neither a store nor an image" in call("evaluate", "a.txt", "b.txt", code=1).output


def test_evaluate_a_store_in_pieces(folders):
    from tilepipe.spec import default_classes
    from tilepipe.train.evaluate import evaluate, open_labels

    truth = np.kron(np.eye(6, dtype=np.uint8), np.ones((20, 20), np.uint8))
    store = create_store(
        str(folders / "s.zarr"), channels=1, dtype=np.dtype("uint8"), extent=truth.shape, mpp=None,
        channel_names=("grey",), channel_colors=(None,), rgb=False, unit_px=64, chunk_px=32,
        with_image=False,
    )  # fmt: skip
    label = store.create_label("cells", classes=default_classes(2), unit_px=64)
    level = label.level(0)
    for unit in Grid(truth.shape, 64):
        level.write_unit(unit, truth[unit.box.slices])
    Image.fromarray(truth).save(folders / "t.png")
    found = open_labels(folders / "s.zarr")
    assert found.read(Box(0, 0, 20, 20)).all()
    result = evaluate(found, open_labels(folders / "t.png"), box_px=50)
    assert result.foreground.dice == 1.0
    assert (result.objects_truth, result.f1["0.95"]) == (6, 1.0)
    assert list(result.classes) == ["background", "class 1"]
    shown = call("evaluate", folders / "s.zarr", folders / "t.png", "--label", "none", code=1)
    assert "none" in shown.output
