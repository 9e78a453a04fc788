"""The benchmark on a slide of thumbnail size: every key, shares that add up, a plot."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner

from tilepipe.bench import run as room
from tilepipe.bench.bare import bare_speeds
from tilepipe.bench.plot import plot
from tilepipe.bench.run import _scaling, _toml, drawn_tissue, write_slide
from tilepipe.cli.bench import table
from tilepipe.cli.main import main
from tilepipe.errors import ExportError
from tilepipe.infer.account import account_json
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
    assert done.exit_code == 2
    assert "say how many devices" in done.output
