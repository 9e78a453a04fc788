"""Twenty slides in one run, two of them broken; manifests; what is refused."""

import csv
import json
import re

import pytest

from tilepipe import models
from tilepipe.models.seeded import fill_seeded
from tilepipe.pipeline import networks
from tilepipe.pipeline.run import Request, run_many
from tilepipe.spec import JobSpec, default_classes
from tilepipe.store import open_store

GOOD = [f"s{n:02}" for n in range(20) if n not in (4, 11)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_slide):
    """Eighteen slides of 150 x 130 px, one cut off in its pixels, one that is no TIFF."""
    folder = tmp_path_factory.mktemp("slides")
    for number in range(20):
        make_slide(folder / f"s{number:02}.tif", shape=(150, 130), seed=number)
    whole = (folder / "s04.tif").read_bytes()
    (folder / "s04.tif").write_bytes(whole[: len(whole) // 2])
    (folder / "s11.tif").write_bytes(b"this was a slide once " * 100)
    return folder


@pytest.fixture(scope="module")
def results(folder, zygote, flags, tmp_path_factory):
    """The first run: its output folder and what it printed."""
    out = tmp_path_factory.mktemp("results")
    text = zygote.run("run", f"{folder}/*.tif", "-o", out, *flags, code=1)
    return out, text


def status(out, name="status.csv"):
    with (out / name).open(newline="") as file:
        return {row["slide"].rsplit("/", 1)[-1]: row for row in csv.DictReader(file)}


def state(store):
    return open_store(str(store)).label("unet").read_record()["state"]


def times(out, names):
    return {
        path: path.stat().st_mtime_ns
        for name in names
        for path in (out / f"{name}.zarr").rglob("*")
        if path.is_file()
    }


def test_two_broken_slides_stop_nobody(results):
    out, text = results
    rows = status(out)
    assert len(rows) == 20
    for name in GOOD:
        row = rows[f"{name}.tif"]
        assert (row["state"], row["reason"]) == ("done", "")
        assert int(row["units"]) > 0
        assert float(row["seconds"]) > 0
        assert state(out / f"{name}.zarr") == "done"
    for name in ("s04.tif", "s11.tif"):
        assert rows[name]["state"] == "failed"
        assert name in rows[name]["reason"]
    assert "not a TIFF" in rows["s11.tif"]["reason"]
    assert "2 of 20 slides failed" in text
    assert "Traceback" not in text


def test_again_only_the_two_are_touched(results, folder, zygote, flags):
    out, _ = results
    before = times(out, GOOD)
    told = zygote.run("run", f"{folder}/*.tif", "-o", out, *flags, "--json", code=1)
    assert times(out, GOOD) == before
    # What the system says on stderr (a busy machine's warnings) lies in the same text.
    facts = json.loads(next(line for line in told.splitlines() if line.startswith("[")))
    assert sum(entry["state"] == "done" for entry in facts) == 18
    assert all(entry.get("px", 0) == 0 for entry in facts)
    assert sum(row["state"] == "failed" for row in status(out).values()) == 2


def test_each_equals_a_run_of_its_own(results, folder, zygote, flags, equal, tmp_path):
    out, _ = results
    zygote.run("run", folder / "s07.tif", "-o", tmp_path / "alone.zarr", *flags)
    equal(out / "s07.zarr", tmp_path / "alone.zarr")


def test_a_mended_slide_is_done_next_time(results, folder, zygote, flags, make_slide):
    out, _ = results
    make_slide(folder / "s11.tif", shape=(150, 130), seed=11)
    zygote.run("run", f"{folder}/*.tif", "-o", out, *flags, code=1)
    rows = status(out)
    assert rows["s11.tif"]["state"] == "done"
    assert rows["s04.tif"]["state"] == "failed"


def test_a_manifest_names_outputs_sizes_and_labels(folder, zygote, flags, tmp_path):
    manifest = tmp_path / "slides.csv"
    manifest.write_text(
        f"slide,output,mpp,label\n{folder}/s00.tif,a/first.zarr,0.25,cells\n{folder}/s01.tif,,,\n"
    )
    out = tmp_path / "out"
    zygote.run("run", "--manifest", manifest, "-o", out, *flags)
    first = open_store(str(out / "a" / "first.zarr"))
    assert first.mpp == (0.25, 0.25)
    assert first.labels == ("cells",)
    assert open_store(str(out / "s01.zarr")).labels == ("unet",)
    assert [row["state"] for row in status(out).values()] == ["done", "done"]


def test_stores_spelled_otherwise_than_their_outputs_are_found_in_the_status(
    folder, zygote, flags, tmp_path
):
    for name in ("s00", "s01"):
        zygote.run("ingest", folder / f"{name}.tif", "-o", tmp_path / f"a/{name}.zarr", "--quiet")
    zygote.run("run", "./a/s00.zarr", "./a/s01.zarr", "-o", "a", *flags, cwd=tmp_path)
    rows = status(tmp_path / "a")
    assert [rows[name]["state"] for name in ("s00.zarr", "s01.zarr")] == ["done", "done"]


def test_a_part_of_many_slides_does_not_tell_that_they_are_done(folder, zygote, flags, tmp_path):
    names = ["s00", "s01"]
    slides = [folder / f"{name}.tif" for name in names]
    out = tmp_path / "out"
    zygote.run("run", *slides, "-o", out, *flags, "--part", "0/2", "--quiet")
    # Each part has a table of its own: the last to write would hide what the others failed at.
    assert [row["state"] for row in status(out, "status-0-of-2.csv").values()] == ["part done"] * 2
    assert not (out / "status.csv").exists()
    zygote.run("run", *slides, "-o", out, *flags, "--quiet")
    assert [row["state"] for row in status(out).values()] == ["done"] * 2


def test_a_link_that_leads_to_itself_stops_nobody(folder, zygote, flags, tmp_path):
    link = tmp_path / "loop.tif"
    link.symlink_to(link)
    out = tmp_path / "out"
    zygote.run("run", folder / "s00.tif", link, folder / "s01.tif", "-o", out, *flags, code=1)
    rows = status(out)
    assert [rows[f"s0{n}.tif"]["state"] for n in (0, 1)] == ["done", "done"]
    assert "symbolic links" in rows["loop.tif"]["reason"]


def test_a_table_that_cannot_be_written_is_told_before_the_first_slide(
    folder, zygote, flags, tmp_path
):
    stores = [tmp_path / f"s0{n}.zarr" for n in (0, 1)]
    for store in stores:
        zygote.run("ingest", folder / f"{store.stem}.tif", "-o", store, "--quiet")
    (tmp_path / "status.csv").mkdir()
    text = zygote.run("run", *stores, *flags, cwd=tmp_path, code=1)
    assert "cannot write status.csv" in text
    assert [open_store(str(store)).labels for store in stores] == [(), ()]


def test_no_table_is_put_into_an_image(folder, zygote, flags, tmp_path):
    store = tmp_path / "s00.zarr"
    zygote.run("ingest", folder / "s00.tif", "-o", store, "--quiet")
    before = sorted(store.rglob("*"))
    slides = [folder / f"s0{n}.tif" for n in (1, 2)]
    text = zygote.run("run", *slides, "-o", store, *flags, code=1)
    assert f"lies inside the OME-Zarr {store}" in text
    assert sorted(store.rglob("*")) == before


@pytest.mark.parametrize("by", ["arguments", "manifest"])
def test_several_stores_are_segmented_where_they_lie(folder, zygote, flags, tmp_path, by):
    names = ["a/s00.zarr", "a/s01.ome.zarr"]
    for name in names:
        zygote.run("ingest", folder / f"{name[2:5]}.tif", "-o", tmp_path / name, "--quiet")
    if by == "manifest":
        (tmp_path / "a" / "m.csv").write_text("slide,output\ns00.zarr,\ns01.ome.zarr\n")
        names = ["--manifest", "a/m.csv"]
    zygote.run("run", *names, *flags, "--quiet", cwd=tmp_path)
    assert [row["state"] for row in status(tmp_path).values()] == ["done"] * 2
    assert [open_store(str(path)).labels for path in sorted((tmp_path / "a").glob("*.zarr"))] == [
        ("unet",)
    ] * 2
    assert list(tmp_path.glob("*.zarr")) == []

    zygote.run("run", *names, "-o", "copies", *flags, "--quiet", cwd=tmp_path)
    assert {path.name for path in (tmp_path / "copies").glob("*.zarr")} == {"s00.zarr", "s01.zarr"}


@pytest.mark.parametrize(
    "row, told",
    [
        ("{slides}/s00.tif,../out.zarr,,", "leaves the output folder"),
        ("{slides}/s00.tif,/tmp/elsewhere.zarr,,", "leaves the output folder"),
        ("{slides}/s00.tif,link/out.zarr,,", "leaves the output folder"),
        ("{slides}/s00.tif,a/../../out.zarr,,", "leaves the output folder"),
        ("{slides}/s00.tif,.,,", "where the table of all slides goes"),
        ("{slides}/s00.tif,a/../status.csv,,", "where the table of all slides goes"),
        ("{slides}/s00.tif,,,../../label", "name"),
        ("{slides}/s00.tif,,,a/b", "name"),
        ("{slides}/s00.tif,,zero,", "is no number"),
        ("{slides}/s00.tif,,-1,", "slide_mpp"),
        (",x.zarr,,", "no slide"),
        ("{slides}/s00.tif,x.zarr,,\n{slides}/s01.tif,x.zarr,,", "both be written to"),
        ("{slides}/s00.tif,x.zarr,,\n{slides}/s01.tif,a/../x.zarr,,", "both be written to"),
        ("{slides}/s00.tif,x.zarr/y.zarr,,\n{slides}/s01.tif,x.zarr,,", "both be written to"),
    ],
)
def test_manifests_cannot_leave_the_output(folder, zygote, flags, tmp_path, row, told):
    out = tmp_path / "out"
    (tmp_path / "outside").mkdir()
    out.mkdir()
    (out / "link").symlink_to(tmp_path / "outside", target_is_directory=True)
    manifest = tmp_path / "slides.csv"
    manifest.write_text("slide,output,mpp,label\n" + row.format(slides=folder) + "\n")
    text = zygote.run("run", "--manifest", manifest, "-o", out, *flags, code=1)
    assert told in text
    assert "Traceback" not in text
    assert [path.name for path in out.iterdir()] == ["link"]
    assert not list((tmp_path / "outside").iterdir())


@pytest.mark.parametrize("name", ["..", "../up", "a/b", "/abs", ".hidden", "labels/../x", "a\\b"])
def test_label_names_cannot_leave_the_store(folder, zygote, flags, tmp_path, name):
    out = tmp_path / "deep" / "out.zarr"
    text = zygote.run("run", folder / "s00.tif", "-o", out, *flags, "--name", name, code=1)
    assert "name" in text
    assert not out.exists()


def test_a_link_in_the_store_is_not_followed(folder, zygote, flags, tmp_path):
    out, outside = tmp_path / "out.zarr", tmp_path / "outside"
    zygote.run("ingest", folder / "s00.tif", "-o", out, "--unit", "128", "--quiet")
    outside.mkdir()
    (out / "labels").symlink_to(outside, target_is_directory=True)
    text = zygote.run("run", folder / "s00.tif", "-o", out, *flags, code=1)
    assert "link" in text
    assert not list(outside.iterdir())


def test_more_declared_pixels_than_allowed_are_refused(folder, zygote, flags, tmp_path):
    out = tmp_path / "out.zarr"
    text = zygote.run("run", folder / "s00.tif", "-o", out, *flags, "--max-pixels", 9999, code=1)
    assert "s00.tif" in text
    assert "19500" in text.replace(",", "").replace(" ", "") or "150 x 130" in text
    assert "--max-pixels" in text
    assert not out.exists()


def test_a_bill_of_many_slides_names_those_that_would_fail(folder, zygote, flags, tmp_path):
    (tmp_path / "broken.tif").write_bytes(b"this was a slide once " * 100)
    slides = [folder / "s10.tif", tmp_path / "broken.tif", folder / "s12.tif"]
    command = ["run", *slides, "-o", tmp_path / "out", *flags, "--dry-run"]
    text = zygote.run(*command, code=1)
    assert text.count("of memory") == 2
    assert "broken.tif: is not a TIFF" in text
    assert "1 of 3 slides would fail" in text
    (line,) = re.findall(r"^\[.*\]$", zygote.run(*command, "--json", code=1), re.M)
    bills = json.loads(line)
    assert ["error" in one for one in bills] == [False, True, False]
    assert not (tmp_path / "out").exists()


def test_slides_of_other_sizes_build_their_network_once(make_slide, tmp_path, monkeypatch):
    """Four are open at a time; with room for two networks each was built twice."""
    built = []

    def build(spec, ticket, *args):
        built.append(ticket.output)
        return real(spec, ticket, *args)

    real = networks._build
    monkeypatch.setattr(networks, "_build", build)
    spec = JobSpec(model="unet", weights="random:0", base=2, tune=False, device="cpu")
    requests = []
    for n in range(10):
        slide = make_slide(tmp_path / f"{n}.tif", shape=(150 + 32 * n, 200), seed=n)
        requests.append(Request(str(slide), str(tmp_path / f"{n}.zarr"), spec))
    assert all(result.ok for result in run_many(requests))
    assert sorted(built) == sorted(request.output for request in requests)
    assert len(networks._engines) <= 4


def test_slides_of_one_network_load_it_once(folder, tmp_path, monkeypatch):
    """And anew where another file lies in its place by now."""
    loads = []

    def load(spec, *, image_channels):
        loads.append(spec.weights)
        return real(spec, image_channels=image_channels)

    real = models.model_for
    monkeypatch.setattr(models, "model_for", load)
    weights = tmp_path / "w.safetensors"
    spec = JobSpec(model="unet", weights=str(weights), tune=False, unit=128, device="cpu")
    networks = []
    for seed in (0, 1):
        net = models.build("unet", in_channels=3, classes=2, base=2, depth=1)
        fill_seeded(net, seed)
        models.save_checkpoint(
            weights, net, name="unet", arguments={"base": 2, "depth": 1},
            classes=default_classes(2), normalisation=models.Normalisation(),
        )  # fmt: skip
        requests = [
            Request(str(folder / f"s{n:02}.tif"), str(tmp_path / f"{seed}-{n}.zarr"), spec)
            for n in (0, 1, 2, 3, 5, 6)
        ]
        assert all(result.ok for result in run_many(requests))
        assert len(loads) == 1 + seed
        records = [open_store(r.output).label("unet").read_record() for r in requests]
        networks.append({record["asked"]["network"] for record in records})
    assert [len(found) for found in networks] == [1, 1]
    assert networks[0] != networks[1]
