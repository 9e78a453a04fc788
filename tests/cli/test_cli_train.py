"""``tilepipe train`` and ``tilepipe evaluate`` as a user calls them."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from tilepipe.cli.main import main
from tilepipe.spec import LabelClass, default_classes
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
    assert f"next: tilepipe run SLIDE --model unet --weights {out}" in "".join(shown.split("\n"))
    assert out.is_file()
    assert out.with_suffix(".csv").is_file()
    assert out.with_suffix(".png").is_file()


def test_without_images_to_choose_by_no_metric_is_told(folders):
    told = call(
        "train", "--images", folders / "img", "--labels", folders / "lab",
        "-o", folders / "w.safetensors", *SMALL, "--val-share", 0,
    ).output  # fmt: skip
    assert "3 images to learn from, 0 to choose by" in told
    assert "metric" not in told
    assert "nan" not in told


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


def test_train_asks_before_it_writes_over_weights(folders):
    flags = (
        "train", "--images", folders / "img", "--labels", folders / "lab", "-o",
        folders / "w.safetensors", *SMALL,
    )  # fmt: skip
    call(*flags, "--quiet")
    assert "train anew in its place with --overwrite" in call(*flags, code=1).output
    call(*flags, "--overwrite", "--quiet")
    assert "give one of them" in call(*flags, "--overwrite", "--resume", code=2).output


def test_scores_of_images_without_any_object_are_json(folders):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    for index in range(3):
        Image.fromarray(np.zeros((48, 48), np.uint8)).save(folders / "lab" / f"{index}.png")
    out = folders / "w.safetensors"
    shown = call(
        "train", "--images", folders / "img", "--labels", folders / "lab", "-o", out, *SMALL,
        "--lr", 0.05, "--steps", 12, "--json",
    ).stdout  # fmt: skip
    assert json.loads(shown, parse_constant=refuse)["scores"][0]["pooled_dice"] == 1.0


def test_kinds_and_classes_may_have_any_names(folders):
    """Brackets are how the console is told of colours."""
    (folders / "kinds.csv").write_text("id,kind\n0,[/x]\n1,[/x]\n2,[red]\n")
    out = folders / "w.safetensors"
    shown = call(
        "train", "--images", folders / "img", "--labels", folders / "lab", "-o", out, *SMALL,
        "--kinds", folders / "kinds.csv",
    ).output  # fmt: skip
    assert "[/x]: Dice" in shown
    label = create_store(
        str(folders / "s.zarr"), channels=1, dtype=np.dtype("uint8"), extent=(48, 48), mpp=None,
        channel_names=("grey",), channel_colors=(None,), rgb=False, unit_px=64, chunk_px=32,
        with_image=False,
    ).create_label("cells", classes=[
        LabelClass(name=name, color=(0, 0, 0, 0)) for name in ("[/b]", "[red]")
    ], unit_px=64)  # fmt: skip
    for unit in Grid((48, 48), 64):
        label.level(0).write_unit(unit, np.eye(48, dtype=np.uint8)[unit.box.slices])
    shown = call("evaluate", folders / "s.zarr", folders / "lab" / "0.png").output
    assert "[/b]" in shown
    assert "[red]" in shown


def test_train_says_what_is_missing(folders):
    assert "--images, --labels and -o are needed" in call("train", "--steps", 1, code=2).output
    wrong = call(
        "train", "--images", folders / "img", "--labels", folders / "none", "-o",
        folders / "w.safetensors", "--steps", 1, code=1,
    )  # fmt: skip
    assert "no such folder" in wrong.output
    (folders / "job.toml").write_text("image = 'img'\n")
    wrong = call("train", "--job", folders / "job.toml", code=1)
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


@pytest.mark.parametrize("first", [True, False])
def test_evaluate_takes_255_for_the_foreground_of_a_mask_of_two_values(folders, first):
    ids = np.zeros((30, 40), np.uint8)
    ids[5:20, 5:25] = 1
    Image.fromarray(ids).save(folders / "ids.png")
    Image.fromarray(np.roll(ids, 4, axis=1) * 255).save(folders / "white.png")
    pair = ("white.png", "ids.png") if first else ("ids.png", "white.png")
    found = call("evaluate", *(folders / name for name in pair), "--json")
    values = json.loads(found.stdout)
    assert list(values["classes"]) == ["class 0", "class 1"]
    assert values["classes"]["class 1"] == values["foreground"]
    assert values["classes"]["class 1"]["dice"] == pytest.approx(0.8)
    assert values["pixel_error"] == pytest.approx(120 / 1200)
    assert "white.png: a mask of 0 and 255; 255 is counted as class 1" in found.stderr
    assert values["notes"] == [found.stderr.removeprefix("Note: ").rstrip()]
    assert call("evaluate", *(folders / name for name in pair), "--quiet").output == ""


def test_evaluate_says_where_no_class_is_in_both(folders):
    ids = np.zeros((30, 40), np.uint8)
    ids[5:20, 5:25], ids[5:9, 5:9] = 1, 2
    Image.fromarray(ids).save(folders / "t.png")
    for value in (255, 3):
        Image.fromarray((ids > 0).astype(np.uint8) * value).save(folders / "p.png")
        found = call("evaluate", folders / "p.png", folders / "t.png", "--json")
        assert json.loads(found.stdout)["classes"]["class 1"]["dice"] == 0
        assert f"p.png holds classes {value} and " in found.stderr
        assert "t.png holds 1, 2: none but 0 is in both" in found.stderr
    for same in (ids * 0, ids, (ids > 0).astype(np.uint8)):
        Image.fromarray(same).save(folders / "p.png")
        assert call("evaluate", folders / "p.png", folders / "t.png", "--json").stderr == ""


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


@pytest.mark.parametrize("order", [(0, 1, 3, 2), (0, 2, 3, 1), (0, 1, 1, 2)])
def test_evaluate_finds_the_cells_of_every_class_and_any_border(tmp_path, order):
    """Class 1 was taken for the only one with cells, even where it was the border."""
    cells = np.zeros((40, 40), np.uint16)
    cells[5:20, 5:15], cells[5:20, 15:25] = 1, 2
    classes = cells.astype(np.uint8)  # a cell each of two classes
    classes[5:20, 14:16] = 3
    Image.fromarray(cells).save(tmp_path / "t.png")
    Image.fromarray(np.array(order, np.uint8)[classes]).save(tmp_path / "p.png")
    found = json.loads(
        call(
            "evaluate", tmp_path / "p.png", tmp_path / "t.png", "--border", order[3], "--json"
        ).stdout
    )
    assert (found["objects_predicted"], found["f1"]["0.95"]) == (2, 1.0)


def test_evaluate_refuses_other_sizes(folders):
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(folders / "small.png")
    wrong = call("evaluate", folders / "small.png", folders / "lab" / "0.png", code=1)
    assert "only images of one size" in wrong.output
    assert "neither a store nor an image" in call("evaluate", "a.txt", "b.txt", code=1).output


def test_evaluate_a_store_in_pieces(folders):
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


@pytest.fixture
def truth(tmp_path):
    """Two squares of classes 1 and 2 as an image of ids."""
    ids = np.zeros((20, 30), np.uint8)
    ids[2:8, 2:8], ids[10:18, 12:25] = 1, 2
    Image.fromarray(ids).save(tmp_path / "t.png")
    return ids


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids: ids * 0.7, "labels of dtype float64; ids are integers"),
        (lambda ids: np.where(ids == 1, np.nan, ids).astype(np.float32), "dtype float32"),
        (lambda ids: ids.astype(np.complex64), "dtype complex64"),
        (lambda ids: ids.astype("U1"), "dtype <U1"),
        (lambda ids: ids.astype(np.int8) - 1, "holds id -1; ids count from 0"),
        (lambda ids: ids.astype(np.uint64) * np.uint64(2**63), "holds id 9223372036854775808"),
        (lambda ids: ids.astype(np.uint16) * 150, "holds class id 300; classes are 0 to 255"),
        (lambda ids: ids.astype(np.uint16) * 350, "holds class id 700; classes are 0 to 255"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_evaluate_takes_nothing_but_ids(tmp_path, truth, change, message, first):
    np.save(tmp_path / "wrong.npy", change(truth))
    pair = ("wrong.npy", "t.png") if first else ("t.png", "wrong.npy")
    wrong = call(
        "evaluate", *(tmp_path / name for name in pair), "--pred-kind", "classes", "--truth-kind",
        "classes", code=1,
    )  # fmt: skip
    assert "wrong.npy: " in wrong.output
    assert message in wrong.output


@pytest.mark.parametrize("dtype", [bool, np.int8, np.uint16, np.int64])
def test_evaluate_takes_ids_of_any_integer_kind(tmp_path, truth, dtype):
    np.save(tmp_path / "p.npy", truth.astype(dtype))
    np.save(tmp_path / "t.npy", truth.astype(dtype).astype(np.uint8))
    values = json.loads(
        call("evaluate", tmp_path / "p.npy", tmp_path / "t.npy", "--json", "--pred-kind",
             "classes").stdout
    )  # fmt: skip
    assert {score["dice"] for score in values["classes"].values()} == {1.0}
    assert len(values["classes"]) == (2 if dtype is bool else 3)


def test_evaluate_takes_grey_masks_in_colour_as_train_does(tmp_path, truth):
    """Many programs save a mask as RGB or RGBA with three times the same."""
    opaque = np.full_like(truth, 255)
    for name, planes in (("rgb", [truth] * 3), ("rgba", [truth] * 3 + [opaque])):
        Image.fromarray(np.stack(planes, axis=-1)).save(tmp_path / f"{name}.png")
        for pair in ((f"{name}.png", "t.png"), ("t.png", f"{name}.png")):
            shown = call("evaluate", *(tmp_path / one for one in pair), "--json")
            values = json.loads(shown.stdout)
            assert {score["dice"] for score in values["classes"].values()} == {1.0}
    Image.fromarray(np.stack([truth, truth * 2, truth], axis=-1)).save(tmp_path / "colour.png")
    wrong = call("evaluate", tmp_path / "colour.png", tmp_path / "t.png", code=1)
    assert "labels of 3 channels that differ; save one channel of ids" in wrong.output


def test_evaluate_without_a_true_object_has_no_rand_error(tmp_path, truth):
    np.save(tmp_path / "none.npy", truth * 0)
    pair = (tmp_path / "t.png", tmp_path / "none.npy")
    values = json.loads(call("evaluate", *pair, "--json").stdout)
    assert values["rand_error"] is None
    assert values["objects_predicted"] == 2
    assert "Rand error      nan" in call("evaluate", *pair).output


def test_evaluate_says_what_a_store_without_a_label_lacks(tmp_path, truth):
    settings = {
        "channels": 1, "dtype": np.dtype("uint8"), "extent": truth.shape, "mpp": None,
        "channel_names": ("grey",), "channel_colors": (None,), "rgb": False, "unit_px": 32,
        "chunk_px": 32,
    }  # fmt: skip
    store = create_store(str(tmp_path / "s.zarr"), **settings)
    flags = ("evaluate", tmp_path / "t.png", tmp_path / "s.zarr")
    assert "s.zarr: holds no label; a mask is made by" in call(*flags, code=1).output
    for name in ("a", "b"):
        store.create_label(name, classes=default_classes(2), unit_px=32)
    assert "labels a, b; say which with --label (--truth-label)" in call(*flags, code=1).output


@pytest.mark.parametrize("option", ["--label", "--truth-label"])
def test_evaluate_finds_no_label_by_name_in_an_image(tmp_path, truth, option):
    del truth
    path = tmp_path / "t.png"
    wrong = call("evaluate", path, path, option, "cells", code=1)
    assert "t.png: an image holds no label called 'cells'" in wrong.output


def test_evaluate_names_a_damaged_file(tmp_path, truth):
    del truth
    (tmp_path / "empty.npy").touch()
    wrong = call("evaluate", tmp_path / "empty.npy", tmp_path / "t.png", code=1)
    assert "empty.npy: cannot be read as a numpy array" in wrong.output
