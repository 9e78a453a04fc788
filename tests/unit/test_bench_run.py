"""The benchmark on a slide of thumbnail size: every key, shares that add up, a plot."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch.utils.flop_counter import FlopCounterMode

from tilepipe.bench import bare
from tilepipe.bench import run as room
from tilepipe.bench.bare import bare_speeds, engine_speed
from tilepipe.bench.flops import flops_per_px, matrix_tflops
from tilepipe.bench.plot import plot
from tilepipe.bench.run import _scaling, _toml, drawn_tissue, write_slide
from tilepipe.cli.bench import table
from tilepipe.cli.main import main
from tilepipe.errors import ExportError, ModelError, ScheduleError
from tilepipe.infer.account import account_json
from tilepipe.infer.backends import seconds_a_batch
from tilepipe.infer.settings import choose_settings
from tilepipe.models import load_model
from tilepipe.slide import open_slide
from tilepipe.spec import JobSpec
from tilepipe.tiling import Box


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    place = tmp_path_factory.mktemp("bench")
    given = "--size 512 --base 2 --backend torch --no-tune --tile 316 --precision fp32 --json"
    args = ["bench", *given.split(), "--plot", str(place / "account.png")]
    done = CliRunner(env={"TILEPIPE_CACHE": str(place / "cache")}).invoke(main, args)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout), place / "account.png"


@pytest.mark.slow
def test_keys_and_shares(result):
    found, picture = result
    assert found["pipeline_share"] > 0
    assert found["pipeline_share"] == pytest.approx(
        found["pipeline_mpix_per_s"] / found["bare_mpix_per_s"]
    )
    assert found["engine_mpix_per_s"] > 0
    assert sum(found["account"]["shares"].values()) == pytest.approx(100, abs=2)
    assert found["settings"]["plan"]["input_px"] == 316
    assert found["machine"]["versions"]["torch"] != "absent"
    assert found["peak_rss_bytes"] > 50 << 20
    assert found["extent"] == [512, 512]
    assert found["bare_best"]["precision"] == found["settings"]["precision"]
    assert picture.stat().st_size > 5000


@pytest.mark.slow
def test_table_is_for_people(result):
    text = table(result[0])
    assert "of the bare network" in text
    assert "compute" in text


def test_without_the_pipeline_itself(monkeypatch, tmp_path):
    monkeypatch.setenv("TILEPIPE_CACHE", str(tmp_path / "cache"))
    spec = JobSpec(weights="random:0", base=2, tile=252, backend="torch", precision="fp32",
                   tune=False)  # fmt: skip
    account = account_json({"compute": 3.0, "read": 1.0}, wall_s=2.0, lanes=3)

    def pipeline(slide, out, given, extent, gpus):
        assert slide.is_file()
        assert extent == (300, 300)
        settings = {"precision": "fp32", "backend": "torch", "batch": 1, "plan": {"input_px": 252}}
        speed = 2.0 * len(gpus.split(",")) if gpus else 2.0
        return {"gpus": gpus, "mpix_per_s": speed, "cold_mpix_per_s": 1.0, "wall_s": 1.0,
                "elapsed_s": 1.0, "peak_rss_bytes": 1 << 28, "account": account,
                "settings": settings}  # fmt: skip

    monkeypatch.setattr(room, "_pipeline", pipeline)
    monkeypatch.setattr(room, "gpu_numbers", str)
    monkeypatch.setattr(room, "check_gpus", str)
    told: list[str] = []
    found = room.bench(spec, size_px=300, gpus=(1, 2), tell=told.append)
    assert found["pipeline_share"] == pytest.approx(2.0 / found["bare_mpix_per_s"])
    assert found["scaling"][1]["efficiency"] == pytest.approx(1.0)
    assert any("2 devices" in text for text in told)
    assert "of the bare network" in table(found)
    plot(found, tmp_path / "account.svg")
    assert b"<svg" in (tmp_path / "account.svg").read_bytes()
    with pytest.raises(ExportError, match="the plot cannot be written"):
        plot(found, tmp_path / "nowhere" / "account.png")
    json.dumps(found)


def _turns(pipelines, bares, *, rounds, seconds=1.0):
    """Run ``_in_turns`` on figures that are known."""
    now, speeds, asked = [0.0], iter(pipelines), iter(bares)

    def pipeline():
        now[0] += seconds
        speed = next(speeds)
        return {"mpix_per_s": speed, "cold_mpix_per_s": speed / 2, "peak_rss_bytes": int(speed),
                "settings": {"precision": "bf16"}}  # fmt: skip

    def bare(precision):
        assert precision == "bf16"
        return next(asked)

    told: list[str] = []
    found = room._in_turns(pipeline, bare, rounds=rounds, tell=told.append, clock=lambda: now[0])
    return *found, told


def test_of_rounds_in_turns_the_fastest_counts_and_all_are_told():
    main, turns, told = _turns([4.0, 9.0, 7.0], [11.0, 6.0, 12.0], rounds=3)
    assert main["mpix_per_s"] == 9.0
    assert [turn["pipeline_mpix_per_s"] for turn in turns] == [4.0, 9.0, 7.0]
    assert [turn["bare_mpix_per_s"] for turn in turns] == [11.0, 6.0, 12.0]
    assert told[1].endswith("round 2 of 3")


def test_a_pipeline_that_takes_a_minute_is_run_once():
    _, turns, _ = _turns([4.0], [11.0], rounds=3, seconds=61.0)
    assert len(turns) == 1


def test_one_round_is_not_called_one_of_one():
    _, _, told = _turns([4.0], [11.0], rounds=1)
    assert told == ["the whole pipeline"]


def test_the_bare_network_timed_again_is_its_best_tile_and_counts(monkeypatch):
    model = load_model("unet", weights="random:0", base=2)
    settings = choose_settings(
        model, extent=(300, 300), dtype=np.dtype(np.uint8), channels=3,
        spec=JobSpec(weights="random:0", base=2, tile=252, backend="torch", precision="fp32",
                     tune=False),
        read=lambda box: np.zeros((3, *box.shape), np.uint8),
    )  # fmt: skip
    speeds = [
        bare.Speed("torch", "fp32", 204, 1, 2.0), bare.Speed("torch", "fp32", 252, 1, 3.0),
        bare.Speed("torch", "bf16", 316, 1, 9.0),
    ]  # fmt: skip

    def time_it(model, plan, name, precision, *_):
        return bare.Speed(name, precision, plan.input_px, 1, 5.0)

    monkeypatch.setattr(bare, "_time", time_it)
    assert room._bare_again(model, settings, np.dtype(np.uint8), speeds, "fp32") == 5.0
    assert speeds[-1] == bare.Speed("torch", "fp32", 252, 1, 5.0)
    assert room._best(speeds, "fp32").mpix_per_s == 5.0


def test_each_round_makes_its_store_anew(monkeypatch, tmp_path):
    """Else the second would find all done."""
    out = tmp_path / "out.zarr"
    out.mkdir()
    (out / "left").touch()
    monkeypatch.setattr(room.sys, "executable", "false")
    with pytest.raises((ScheduleError, OSError)):
        room._pipeline(tmp_path / "slide.tif", out, JobSpec(), (64, 64), None)
    assert not out.exists()


def test_a_slide_whose_name_begins_like_an_option(monkeypatch, tmp_path):
    program, told = tmp_path / "program", tmp_path / "told"
    program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > "{told}"\nexit 1\n')
    program.chmod(0o755)
    monkeypatch.setattr(room.sys, "executable", str(program))
    with pytest.raises(ScheduleError):
        room._pipeline(Path("-odd.tif"), tmp_path / "out.zarr", JobSpec(), (64, 64), "0")
    assert told.read_text().split()[-4:] == ["--gpus", "0", "--", "-odd.tif"]


@pytest.mark.parametrize("name", ["account.xyz", "nowhere/account.png"])
def test_a_plot_that_has_no_place_is_told_before_anything_is_measured(monkeypatch, tmp_path, name):
    monkeypatch.setattr(room, "bench", lambda *_, **__: pytest.fail("measured"))
    done = CliRunner().invoke(main, ["bench", "--plot", str(tmp_path / name)])
    assert done.exit_code == 1
    assert "name another --plot" in done.output


@pytest.mark.slow
def test_a_plot_that_cannot_be_drawn_costs_no_result(monkeypatch, tmp_path, result):
    def full(*_):
        raise ExportError("the plot cannot be written: No space left on device")

    monkeypatch.setattr(room, "bench", lambda *_, **__: result[0])
    monkeypatch.setattr("tilepipe.bench.plot.plot", full)
    done = CliRunner().invoke(main, ["bench", "--plot", str(tmp_path / "account.png")])
    assert done.exit_code == 1
    assert "of the bare network" in done.stdout
    assert "No space left on device" in done.stderr


def test_a_made_slide_is_a_jpeg_pyramid_base_of_that_size(tmp_path):
    path = tmp_path / "made.tif"
    write_slide(path, 700)
    slide = open_slide(path)
    assert slide.levels[0].shape == (700, 700)
    assert slide.levels[0].compression == "jpeg"
    pixels = slide.read(Box(0, 0, 700, 700))
    assert pixels.std() > 10
    slide.close()


def test_tissue_is_the_same_for_a_seed():
    np.testing.assert_array_equal(drawn_tissue(128, 3), drawn_tissue(128, 3))
    assert (drawn_tissue(128, 3) != drawn_tissue(128, 4)).any()


def test_bare_grid_has_every_backend_and_size_asked_for():
    model = load_model("unet", weights="random:0", base=2)
    found = bare_speeds(
        model, device="cpu", threads=1, dtype=np.dtype(np.uint8), precisions=("fp32",),
        backends=("torch",), cores_px=(16, 64), seconds=0.0,
    )  # fmt: skip
    torch_sizes = [speed.input_px for speed in found if speed.backend == "torch"]
    assert torch_sizes == [204, 252]
    assert all(speed.mpix_per_s > 0 for speed in found)


@pytest.mark.parametrize(("device", "told"), [("cpu", 1 / 1.25), ("cuda:0", 50 / 51)])
def test_copies_of_first_and_last_do_not_count_on_a_gpu(monkeypatch, device, told):
    """A batch takes 10 ms, and those that nothing is copied beside 10 ms more."""
    now = [0.0]

    class Backend:
        depth = 2

        def __init__(self) -> None:
            self.under_way = 0

        def submit(self, tiles, account):
            now[0] += 0.01 * (1 if self.under_way else 2)
            self.under_way += 1

        def collect(self, ticket, account):
            self.under_way -= 1

        def close(self) -> None:
            pass

    monkeypatch.setattr(bare, "make_backend", lambda *_, **__: Backend())
    monkeypatch.setattr(bare, "free_bytes", lambda _: 1 << 40)
    monkeypatch.setattr(bare.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(bare, "seconds_a_batch", partial(seconds_a_batch, clock=lambda: now[0]))
    model = load_model("unet", weights="random:0", base=2, in_channels=3)
    (found,) = bare_speeds(
        model, device=device, threads=1, dtype=np.dtype(np.uint8), precisions=("fp32",),
        backends=("torch",), cores_px=(388,),
    )  # fmt: skip
    side = found.input_px - 184
    assert found.mpix_per_s == pytest.approx(told * side**2 / 0.01 / 1e6, rel=0.01)


@pytest.mark.parametrize(("device", "units"), [("cpu", 1), ("cuda:0", 16)])
def test_a_gpus_engine_is_timed_with_units_that_follow_each_other(monkeypatch, device, units):
    model = load_model("unet", weights="random:0", base=2, in_channels=3)
    spec = JobSpec(precision="fp32", backend="torch", tune=False)
    settings = choose_settings(model, extent=(600, 600), spec=spec, unit_px=1024)
    now, boxes = [0.0], []

    class Engine:
        def __init__(self, *_, **__) -> None:
            pass

        def segment(self, read, box):
            boxes.append(box)
            now[0] += 0.25
            return read(box)

        def close(self) -> None:
            pass

    monkeypatch.setattr(bare, "Engine", Engine)
    monkeypatch.setattr(bare.time, "perf_counter", lambda: now[0])
    image = np.zeros((3, 600, 600), np.uint8)
    found = engine_speed(model, replace(settings, device=device), image)
    assert len(boxes) == 1 + units, "one warms it up"
    assert found["mpix_per_s"] == pytest.approx(0.36 / 0.25)


def test_scaling_is_per_device_against_the_first():
    runs = [{"mpix_per_s": 10.0}, {"mpix_per_s": 18.0}]
    assert _scaling(runs, (1, 2))[1] == {
        "gpus": 2,
        "mpix_per_s": 18.0,
        "per_gpu": 9.0,
        "efficiency": 0.9,
    }
    assert _scaling([], ()) == []


def test_job_file_of_the_pipeline():
    import tomllib

    values = {"model": "unet", "base": 8, "in_place": True, "options": {"depth": 3, "norm": "none"}}
    text = "".join(_toml(key, value) for key, value in values.items())
    assert tomllib.loads(text) == values


def test_gpus_must_be_counts():
    done = CliRunner().invoke(main, ["bench", "--gpus", "one"])
    assert done.exit_code == 1
    assert "say how many devices" in done.output


def test_what_cannot_be_measured_is_told_before_a_slide_is_made(monkeypatch):
    def write(path, size_px):
        raise AssertionError("a slide was made")

    monkeypatch.setattr(room, "write_slide", write)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(ModelError, match="nope"):
        room.bench(JobSpec(model="nope", weights="random:0"))
    with pytest.raises(ScheduleError, match="2 GPUs are visible"):
        room.bench(JobSpec(weights="random:0"), gpus=(1, 4))
    monkeypatch.setattr("tilepipe.infer.backends.gpu_count", lambda: 0)
    with pytest.raises(ModelError, match="--gpus 0,1: torch finds no GPU here"):
        room.bench(JobSpec(weights="random:0"), gpus=(2,))


@pytest.mark.parametrize(
    ("name", "base", "options"),
    [
        ("unet", 4, {}),
        ("unet-same", 4, {}),
        ("unetpp", 4, {}),
        ("unet", 2, {"depth": 2}),
    ],
)
def test_operations_per_px_are_those_of_an_endless_map(name, base, options):
    model = load_model(name, weights="random:0", base=base, options=options)
    found = flops_per_px(model)
    # A padded network has no border: any size gives the figure itself.
    step = model.locality.input_step_px
    for side in (model.next_legal(512), model.next_legal(1024)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            out = model.module.to("meta")(torch.empty((1, 3, side, side), device="meta"))
        each = counter.get_total_flops() / out.shape[-1] ** 2
        assert found * (1 - 1e-9) <= each <= found * (1 + 400 * step / side)
        if name == "unet-same":
            assert each == pytest.approx(found, rel=1e-9)


def test_the_u_net_of_2015_takes_so_many_operations():
    # Counted by hand: channels in and out of each 3 x 3 layer, over a px of its own level.
    layers = [(3, 64, 0), (64, 64, 0), (128, 64, 0), (64, 64, 0)]
    for level in range(1, 4):
        wide = 64 * 2**level
        layers += [(wide // 2, wide, level), (wide, wide, level)]
        layers += [(2 * wide, wide, level), (wide, wide, level)]
    layers += [(512, 1024, 4), (1024, 1024, 4)]
    products = sum(9 * one * two / 4**level for one, two, level in layers)
    # Up-convolutions 2 x 2: each px below makes four, of half of the channels; then 1 x 1.
    products += sum(128 * 2**k * 64 * 2**k / 4**k for k in range(4)) + 64 * 2
    model = load_model("unet", weights="random:0", base=64)
    assert flops_per_px(model) == pytest.approx(2 * products, rel=1e-9)
    dilated = load_model("unet-dilated", weights="random:0", base=64)  # the same layers, spread out
    assert flops_per_px(dilated) == pytest.approx(2 * products, rel=1e-9)


def test_the_rate_of_products_counts_two_operations_each():
    now = [0.0]

    def clock():
        now[0] += 0.5
        return now[0]

    # Half a second between two looks, however many products there were: 1 s of products is 2.
    assert matrix_tflops("cpu", "fp32", side=64, seconds=1.5, clock=clock) == pytest.approx(
        2 * 64**3 / 0.5 / 1e12
    )


def test_products_are_timed_for_as_long_as_asked_for(monkeypatch):
    """For a twentieth of a second a GPU may be faster than it ever is in a job."""
    now = [0.0]

    def product(_, __):
        now[0] += 0.001

    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    found = matrix_tflops("cpu", "fp32", side=64, seconds=1.5, clock=lambda: now[0])
    assert found == pytest.approx(2 * 64**3 / 0.001 / 1e12)
    assert now[0] == pytest.approx(1.5, rel=0.01)
