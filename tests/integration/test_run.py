"""The main job from end to end: TIFF in, OME-Zarr mask pyramid out, exact, resumed, refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
import zarr
from click.testing import CliRunner
from ome_zarr.io import parse_url
from ome_zarr.reader import Reader

from tilepipe.cli.main import main
from tilepipe.infer.backends import OutOfDeviceMemoryError, TorchCpuBackend
from tilepipe.models import load_model
from tilepipe.store import Journal, open_store, reduce_label
from tilepipe.tiling import Box, mirror_index

RANDOM = ["--model", "unet", "--weights", "random:0", "--base", "4", "--no-tune"]


def tilepipe(*args, code=0):
    """Run the command in this process; returns its JSON when asked for."""
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    return json.loads(result.stdout) if "--json" in args and code == 0 else result.output


def pixels(store, path):
    return zarr.open_group(str(store), mode="r")[path][:]


@pytest.fixture(scope="module")
def done(small_slide, tmp_path_factory):
    """A finished run."""
    out = tmp_path_factory.mktemp("done") / "small.zarr"
    facts = tilepipe("run", small_slide, "-o", out, *RANDOM, "--json")
    return out, facts


def test_the_image_is_the_slide_and_the_mask_has_its_size(done, small_slide):
    out, facts = done
    image = pixels(out, "0")
    assert np.array_equal(image, np.moveaxis(tifffile.imread(small_slide), -1, 0))
    store = open_store(str(out))
    assert store.mpp == pytest.approx((0.5, 0.5))
    label = store.label("unet")
    assert [label.level(k).shape for k in range(label.n_levels)] == [
        store.image(k).shape for k in range(store.n_levels)
    ]
    assert facts["state"] == "done"
    assert label.read_record()["state"] == "done"
    assert sum(facts["class_px"].values()) == 700 * 500
    # Both classes of these seeded weights occur, so that equality below means something.
    assert min(facts["class_fractions"].values()) > 0.01


def whole_image_mask(small_slide):
    """One forward over the whole level, mirrored once at its true borders."""
    model = load_model("unet", weights="random:0", in_channels=3, base=4)
    image = np.moveaxis(tifffile.imread(small_slide), -1, 0)
    height, width = image.shape[1:]
    rows = mirror_index(-92, model.next_legal(height + 184) - 92, height)
    columns = mirror_index(-92, model.next_legal(width + 184) - 92, width)
    padded = torch.from_numpy(image[:, rows[:, None], columns][None])
    with torch.no_grad():
        logits = model.module(model.normalise(padded))
    return model.class_ids(logits)[0, :height, :width].numpy()


def test_a_run_goes_on_with_smaller_tiles_where_memory_runs_out(
    done, small_slide, tmp_path, monkeypatch
):
    submit = TorchCpuBackend.submit

    def limited(self, tiles, account):
        if tiles[0].shape[-1] > 572:
            raise torch.OutOfMemoryError("out of memory")
        return submit(self, tiles, account)

    monkeypatch.setattr(TorchCpuBackend, "submit", limited)
    flags = [*RANDOM, "--tile", "684"]
    facts = tilepipe("run", small_slide, "-o", tmp_path / "a.zarr", *flags, "--json")
    assert (facts["state"], facts["out_of_memory_events"]) == ("done", 1)
    flags[-1] = "700"  # the process keeps the network that runs tiles of 684 px, by now smaller
    told = tilepipe("run", small_slide, "-o", tmp_path / "b.zarr", *flags)
    assert "ran out of memory once; smaller batches and tiles went through" in told
    assert np.array_equal(pixels(tmp_path / "a.zarr", "labels/unet/0"),
                          pixels(done[0], "labels/unet/0"))  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--tile", "572", "--batch", "1"],
        ["--tile", "316", "--batch", "2", "--unit", "256"],
        ["--unit", "128", "--backend", "torch"],
        ["--in-place"],
        ["--ome-zarr", "0.4", "--unit", "256"],
    ],
    ids=" ".join,
)
def test_the_tiled_mask_is_the_whole_image_mask(small_slide, tmp_path, options):
    out = tmp_path / "out.zarr"
    tilepipe("run", small_slide, "-o", out, *RANDOM, *options, "--quiet")
    assert np.array_equal(pixels(out, "labels/unet/0"), whole_image_mask(small_slide))


def test_a_name_that_holds_bytes_that_are_no_text(small_slide, tmp_path, monkeypatch):
    """Latin-1 names of old file servers: the output has one, too, and what is recorded finds it."""
    monkeypatch.chdir(tmp_path)
    slide, out = (os.fsdecode(b"Pr\xe4parat" + end) for end in (b".tif", b".zarr"))
    try:
        Path(slide).write_bytes(small_slide.read_bytes())
    except OSError as error:
        pytest.skip(f"no such names here: {error}")
    tilepipe("run", slide, *RANDOM, "--instances", "--part", "0/1", "--quiet")
    tilepipe("finish", out, "--json")
    assert tilepipe("verify", out, "--json")["slide"] == str(tmp_path / slide)
    tilepipe("report", out, "-o", "report.html", "--json")
    assert "Pr\\udce4parat" in Path("report.html").read_text(encoding="utf-8")
    ome = json.loads(Path(out, "zarr.json").read_text(encoding="utf-8"))["attributes"]["ome"]
    assert ome["multiscales"][0]["name"] == "Pr?parat"


def test_two_worker_processes_make_the_same_mask(done, small_slide, tmp_path):
    out = tmp_path / "two.zarr"
    command = [sys.executable, "-m", "tilepipe", "run", str(small_slide), "-o", str(out), *RANDOM,
               "--unit", "256", "--workers", "2", "--json"]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["state"] == "done"
    assert np.array_equal(pixels(out, "labels/unet/0"), pixels(done[0], "labels/unet/0"))


def test_the_account_is_of_the_lanes_that_there_were(small_slide, tmp_path, monkeypatch):
    monkeypatch.setattr("tilepipe.pipeline.run.lanes_of", lambda *_: 5)
    facts = tilepipe("run", small_slide, "-o", tmp_path / "five.zarr", *RANDOM, "--json")
    assert facts["account"]["lanes"] == 5
    assert sum(facts["account"]["shares"].values()) == pytest.approx(100, abs=2)


def test_memory_that_runs_out_is_counted_and_changes_nothing(small_slide, tmp_path, monkeypatch):
    submit = TorchCpuBackend.submit

    def small_batches_only(self, tiles, account):
        if len(tiles) > 1:
            raise OutOfDeviceMemoryError("no room")
        return submit(self, tiles, account)

    monkeypatch.setattr(TorchCpuBackend, "submit", small_batches_only)
    tight = [*RANDOM, "--unit", "512", "--tile", "444", "--batch", "4"]
    facts = tilepipe("run", small_slide, "-o", tmp_path / "out.zarr", *tight, "--json")
    assert facts["state"] == "done"
    assert facts["out_of_memory_events"] >= 2  # a batch of 4, then of 2
    found = pixels(tmp_path / "out.zarr", "labels/unet/0")
    assert np.array_equal(found, whole_image_mask(small_slide))


def test_a_level_is_chosen_by_number_or_pixel_size(small_slide, tmp_path):
    out = tmp_path / "out.zarr"
    facts = tilepipe("run", small_slide, "-o", out, *RANDOM, "--mpp", "1.0", "--json")
    assert facts["extent"] == [350, 250]
    store = open_store(str(out))
    assert store.label("unet").image_level == 1
    assert store.label("unet").level(0).shape == store.image(1).shape
    label = store.label("unet")
    for k in range(1, label.n_levels):
        fine = label.level(k - 1).read(Box.of_shape(label.level(k - 1).shape))
        coarse = label.level(k).read(Box.of_shape(label.level(k).shape))
        assert np.array_equal(coarse, reduce_label(fine))
    again = tilepipe("run", small_slide, "-o", out, *RANDOM, "--level", "1", "--json")
    assert again["px"] == 0  # the same job: nothing was left to do
    text = tilepipe("run", small_slide, "-o", out, *RANDOM, "--mpp", "0.7", code=1)
    assert "no level is within 10 %" in text
    assert "level 1: 350 x 250 px, 1 µm/px" in text


def test_a_pixel_that_is_no_square_has_the_pixel_size_asked_for_on_both_sides(tmp_path):
    slide, out = tmp_path / "flat.tif", tmp_path / "flat.zarr"
    pixels = np.zeros((700, 500, 3), np.uint8)
    # 1 µm wide and 0.5 µm high.
    tifffile.imwrite(
        slide, pixels, tile=(128, 128), photometric="rgb", resolution=(10000, 20000),
        resolutionunit="CENTIMETER",
    )  # fmt: skip
    text = tilepipe("run", slide, "-o", out, *RANDOM, "--mpp", "0.5", code=1)
    assert "no level is within 10 % of --mpp 0.5" in text
    assert "level 0: 700 x 500 px, 1 x 0.5 µm/px" in text
    assert not out.exists()


def test_the_bill_compresses_as_the_store_does(tmp_path):
    """What is alike in all channels is found in large blocks only."""
    slide, out = tmp_path / "grey.tif", tmp_path / "grey.zarr"
    grey = np.random.default_rng(0).integers(0, 256, (700, 500, 1), np.uint8)
    tifffile.imwrite(slide, np.repeat(grey, 3, axis=2), tile=(128, 128), photometric="rgb")
    told = tilepipe("run", slide, "-o", out, *RANDOM, "--dry-run", "--json")["disk_bytes"]
    tilepipe("run", slide, "-o", out, *RANDOM, "--json")
    taken = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    assert told == pytest.approx(taken, rel=0.2)


def test_an_image_of_12_bits_is_no_black_one_in_viewers(tmp_path):
    """Viewers take their contrast from the store; of 12 bits 0 to 65535 shows a sixteenth."""
    image = np.random.default_rng(0).integers(200, 4096, (700, 800), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", image, tile=(256, 256))
    half, whole = tmp_path / "half.zarr", tmp_path / "whole.zarr"

    def limits(store):
        nodes = list(Reader(parse_url(str(store)))())
        (found,) = (
            one.metadata["contrast_limits"] for one in nodes if "channel_names" in one.metadata
        )
        return found

    tilepipe("ingest", tmp_path / "a.tif", "-o", whole, "-q")
    ((black, white),) = limits(whole)
    assert 200 <= black < 300 < 4000 < white <= 4095
    tilepipe("run", tmp_path / "a.tif", "-o", half, *RANDOM, "--unit", "512", "--part", "0/2", "-q")
    assert limits(half) == [[0, 65535]]
    tilepipe("finish", half, "-q")
    ((black, white),) = limits(half)
    assert 200 <= black < 300 < 4000 < white <= 4095


def test_another_job_in_the_same_output_is_refused_with_the_ways_out(done, small_slide, tmp_path):
    out, _ = done
    text = tilepipe("run", small_slide, "-o", out, *RANDOM[:3], "random:1", *RANDOM[4:], code=1)
    assert "weights" in text
    assert "--overwrite" in text
    assert "--name" in text
    other = tmp_path / "other.tif"
    pixels_of = tifffile.imread(small_slide)
    tifffile.imwrite(other, 255 - pixels_of, tile=(128, 128), photometric="rgb")
    text = tilepipe("run", other, "-o", out, *RANDOM, code=1)
    assert "another input" in text
    assert "--overwrite" in text


def test_a_second_label_stands_beside_the_first(small_slide, tmp_path):
    out = tmp_path / "out.zarr"
    tilepipe("run", small_slide, "-o", out, *RANDOM, "--quiet")
    before = pixels(out, "labels/unet/0")
    other = [*RANDOM[:3], "random:5", *RANDOM[4:]]
    tilepipe("run", small_slide, "-o", out, *other, "--name", "second", "--quiet")
    store = open_store(str(out))
    assert set(store.labels) == {"unet", "second"}
    assert np.array_equal(pixels(out, "labels/unet/0"), before)
    assert not np.array_equal(pixels(out, "labels/second/0"), before)


def test_overwrite_makes_the_label_anew(small_slide, tmp_path):
    out = tmp_path / "out.zarr"
    tilepipe("run", small_slide, "-o", out, *RANDOM, "--quiet")
    facts = tilepipe("run", small_slide, "-o", out, *RANDOM, "--overwrite", "--json")
    assert facts["px"] == 700 * 500
    assert facts["state"] == "done"


def test_an_existing_ome_zarr_is_segmented_without_a_copy(done, small_slide, tmp_path):
    out = tmp_path / "image.zarr"
    tilepipe("ingest", small_slide, "-o", out, "--quiet")
    facts = tilepipe("run", out, *RANDOM, "--json")
    assert facts["output"] == str(out)
    assert np.array_equal(pixels(out, "labels/unet/0"), pixels(done[0], "labels/unet/0"))


def test_dry_run_writes_nothing(small_slide, tmp_path):
    out = tmp_path / "never.zarr"
    facts = tilepipe("run", small_slide, "-o", out, *RANDOM, "--dry-run", "--json")
    assert not out.exists()
    assert facts["tiles"] >= 1
    assert facts["ram_bytes"] > 0
    assert facts["disk_bytes"] > 0
    assert "MB" in tilepipe("run", small_slide, "-o", out, *RANDOM, "--dry-run")


def test_dry_run_refuses_a_place_that_the_job_would_not_take(small_slide, tmp_path):
    (tmp_path / "notes.txt").write_text("of mine")
    told = tilepipe("run", small_slide, "-o", tmp_path, *RANDOM, "--dry-run", code=1)
    assert "not an OME-Zarr store, it is left alone" in told


def test_the_bill_knows_of_tiles_strips_and_chunks(small_slide, tmp_path):
    """Decoded whole they can be larger than all else that a lane holds."""
    image = tifffile.imread(small_slide)

    def ram(name, *how, layout):
        path = tmp_path / name
        if path.suffix == ".zarr":
            group = zarr.open_group(path, mode="w")
            group.create_array("0", data=np.moveaxis(image, -1, 0), chunks=layout)
            axes = [{"name": axis} for axis in "cyx"]
            scale = [{"type": "scale", "scale": [1, 1, 1]}]
            sets = [{"path": "0", "coordinateTransformations": scale}]
            scales = [{"axes": axes, "datasets": sets}]
            group.attrs["ome"] = {"version": "0.5", "multiscales": scales}
        else:
            tifffile.imwrite(path, image, photometric="rgb", **layout)
        return tilepipe("run", path, *how, *RANDOM, "--dry-run", "--json")["ram_bytes"]

    elsewhere = ["-o", tmp_path / "never.zarr"]
    tiles = {"tile": (64, 64), "compression": "deflate"}
    strip = {"rowsperstrip": len(image), "compression": "deflate"}
    # Each of three lanes holds it twice: as it lies in the file and decoded.
    more = 2 * 3 * (image.nbytes - 3 * 64**2)
    for how in ([], ["--in-place"]):
        tiled = ram("tiles.tif", *elsewhere, *how, layout=tiles)
        assert ram("strip.tif", *elsewhere, *how, layout=strip) == tiled + more
        # Of a raw strip the rows are read where they lie.
        raw = ram("raw.tif", *elsewhere, *how, layout={"rowsperstrip": len(image)})
        assert raw == tiled - 2 * 3 * 3 * 64**2
    for how in ([], elsewhere):
        chunks = ram("chunks.zarr", *how, layout=(3, 64, 64))
        assert ram("chunk.zarr", *how, layout=(3, *image.shape[:2])) == chunks + more
        assert ram("planes.zarr", *how, layout=(1, 64, 64)) == chunks


def test_job_file_and_flags(small_slide, tmp_path):
    job = tmp_path / "job.toml"
    job.write_text('model = "unet"\nweights = "random:0"\nbase = 4\nunit = 256\ntune = false\n')
    out = tmp_path / "out.zarr"
    tilepipe("run", small_slide, "-o", out, "--job", job, "--unit", "128", "--quiet")
    assert open_store(str(out)).image(0).unit_px == 128
    job.write_text('model = "unet"\nspeed = "ludicrous"\n')
    assert "speed: no such setting" in tilepipe("run", small_slide, "--job", job, code=1)


@pytest.mark.parametrize(
    ("args", "code", "text"),
    [
        (["run"], 2, "which slide"),
        (["run", "missing.tif"], 1, "missing.tif"),
        (["run", "SLIDE", "--model", "resnet"], 1, "resnet"),
        (["run", "SLIDE", "--model", "unetpp"], 1, "tilepipe train"),
        (["run", "SLIDE", *RANDOM, "--tile", "570"], 1, "--tile 572"),
        (["run", "SLIDE", *RANDOM, "--unit", "100"], 1, "--unit 112"),
        (["run", "SLIDE", *RANDOM, "--level", "9"], 1, "there is no level 9"),
        (["run", "SLIDE", *RANDOM, "--scheduler", "tcp://127.0.0.1:1"], 1, "dask scheduler"),
        (["run", "SLIDE", *RANDOM, "--scheduler", "nowhere.json"], 1, "nowhere.json"),
        (["run", "SLIDE", *RANDOM, "--part", "3/3"], 1, "0/3 to 2/3"),
        (["run", "SLIDE", *RANDOM, "--halo", "-1"], 1, "halo"),
        (["run", "SLIDE", *RANDOM, "--cgm", "slide"], 1, "unet has no classification gate"),
        (["run", "SLIDE", *RANDOM, "--cgm", "tile"], 1, "unet has no classification gate"),
        (["run", "SLIDE", *RANDOM, "--mpp", "nan"], 1, "mpp"),
        (["run", "SLIDE", *RANDOM, "--slide-mpp", "inf"], 1, "slide_mpp"),
        (["run", "SLIDE", "SLIDE", *RANDOM], 1, "would both be written to"),
        (["run", "SLIDE", *RANDOM, "--trace", "no/t.json"], 1, "no is no folder"),
        (["run", "SLIDE", *RANDOM, "--trace", "SLIDE"], 1, "is no trace, it is left alone"),
        (["run", "SLIDE", *RANDOM, "-o", "/proc/nothing/out.zarr"], 1, "/proc/nothing"),
        (["inspect", "missing"], 1, "missing"),
        (["finish", "missing.zarr"], 1, "missing.zarr"),
    ],
)
def test_a_wrong_request_gets_one_clear_error(small_slide, tmp_path, monkeypatch, args, code, text):
    monkeypatch.chdir(tmp_path)
    given = [str(small_slide) if arg == "SLIDE" else arg for arg in args]
    output = tilepipe(*given, code=code)
    assert text in output
    assert "Traceback" not in output
    # A scheduler that cannot be reached is met after the plan was written; nothing looks done.
    for left in tmp_path.glob("*.zarr"):
        assert "--scheduler" in args
        assert open_store(str(left)).read_record()["state"] == "running"


def test_a_damaged_tile_is_named_and_the_rest_kept_or_filled(small_slide, tmp_path):
    hurt = tmp_path / "hurt.tif"
    raw = bytearray(small_slide.read_bytes())
    with tifffile.TiffFile(small_slide) as tif:
        page = tif.pages[0]
        offset, count = page.dataoffsets[7], page.databytecounts[7]
    raw[offset + count // 2 : offset + count // 2 + 40] = bytes(40)
    hurt.write_bytes(raw)
    out = tmp_path / "hurt.zarr"
    text = tilepipe("run", hurt, "-o", out, *RANDOM, "--unit", "128", code=1)
    assert "hurt.tif" in text
    assert "y 128:256, x 384:500" in text or "x 384:512" in text
    store = open_store(str(out))
    assert store.label("unet").read_record()["state"] == "units failed"
    filled = tmp_path / "filled.zarr"
    facts = tilepipe("run", hurt, "-o", filled, *RANDOM, "--on-damage", "fill", "--json")
    assert facts["state"] == "done"
    assert facts["damaged_tiles"] == 1
    assert len(open_store(str(filled)).read_record()["damaged"]) == 1


def test_inspect_tells_of_slide_store_and_progress(done, small_slide):
    out, _ = done
    slide = tilepipe("inspect", small_slide, "--json")
    assert (slide["kind"], slide["extent"], slide["channels"]) == ("slide", [700, 500], 3)
    store = tilepipe("inspect", out, "--json")
    label = store["labels"]["unet"]
    assert label["units"]["segment"] == {"done": 1, "total": 1}
    assert [entry["name"] for entry in label["classes"]] == ["background", "class 1"]
    assert "1/1 units" in tilepipe("inspect", out)


@pytest.mark.parametrize("gate", ["slide", "tile"])
def test_the_classification_gate_in_two_passes(small_slide, tmp_path, gate):
    out = tmp_path / "out.zarr"
    cgm = ["--model", "unet3plus-cgm", "--weights", "random:0", "--base", "2", "--no-tune"]
    facts = tilepipe("run", small_slide, "-o", out, *cgm, "--level", "1", "--unit", "256",
                     "--cgm", gate, "--json")  # fmt: skip
    assert facts["state"] == "done"
    store = open_store(str(out))
    record = store.label("unet3plus-cgm").read_record()
    journal = store.journal("unet3plus-cgm", record["fingerprint"])
    found = [entry.facts for entry in journal.recorded("gate", 0).values()]
    if gate == "tile":
        assert not found
        return
    assert len(found) == len(store.label("unet3plus-cgm").level(0).grid) == 2
    mask = pixels(out, "labels/unet3plus-cgm/0")
    plain = tmp_path / "plain.zarr"
    tilepipe("run", small_slide, "-o", plain, *cgm, "--level", "1", "--unit", "256", "--quiet")
    # An open gate changes nothing, a closed one leaves background alone.
    ungated = pixels(plain, "labels/unet3plus-cgm/0")
    nothing, something = (max(one[key] for one in found) for key in ("nothing", "something"))
    assert np.array_equal(mask, ungated if something > nothing else np.zeros_like(ungated))
    assert ungated.any()


def test_a_gate_of_which_a_part_is_not_seen_decides_nothing(small_slide, tmp_path, monkeypatch):
    """On a shared file system, a folder may be listed as it was before the last records came."""
    command = ["run", small_slide, "-o", tmp_path / "out.zarr", "--model", "unet3plus-cgm",
               "--weights", "random:0", "--base", "2", "--no-tune", "--level", "1", "--unit", "256",
               "--cgm", "slide"]  # fmt: skip
    real = Journal.recorded

    def all_but_one(self, stage, level, **options):
        found = dict(real(self, stage, level, **options))
        if stage == "gate" and found:
            found.popitem()
        return found

    monkeypatch.setattr(Journal, "recorded", all_but_one)
    text = tilepipe(*command, code=1)
    assert "of 2 units whose gate was measured 1 are seen" in text
    monkeypatch.undo()
    assert tilepipe(*command, "--json")["units"]["gate"] == {"done": 2, "total": 2, "resumed": 2}


def test_a_half_made_image_whose_units_do_not_suit_the_network_says_the_way(small_slide, tmp_path):
    out = tmp_path / "half.zarr"
    tilepipe("ingest", small_slide, "-o", out, "--unit", 100)
    (out / "0/c/0/2/1").unlink()
    text = tilepipe("run", small_slide, "-o", out, *RANDOM, code=1)
    way = re.search(r"complete it first with `tilepipe (ingest .*)`", text)
    assert way is not None, text
    tilepipe(*way[1].split())
    tilepipe("run", small_slide, "-o", out, *RANDOM)
    assert open_store(str(out)).label("unet").level(0).unit_px % 16 == 0


def test_a_half_made_image_is_gone_on_with_in_its_own_units(small_slide, tmp_path):
    out = tmp_path / "half.zarr"
    tilepipe("ingest", small_slide, "-o", out, "--unit", 128)
    (out / "0/c/0/2/1").unlink()
    facts = tilepipe("run", small_slide, "-o", out, *RANDOM, "--json")
    assert facts["state"] == "done"
    assert facts["units"]["ingest"]["resumed"] == facts["units"]["ingest"]["total"] - 1
    assert open_store(str(out)).label("unet").level(0).unit_px == 128
