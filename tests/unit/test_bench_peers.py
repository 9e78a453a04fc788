"""The race against the alternatives: its arithmetic, its table, and that a failure stays one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tilepipe.models import load_model

PEERS = Path(__file__).resolve().parents[2] / "benchmarks" / "peers"


def load(name, monkeypatch):
    """A script's module; its neighbours are found while it loads, and forgotten with the test."""
    monkeypatch.setattr(sys, "path", [str(PEERS), *sys.path])
    before = set(sys.modules)
    found = importlib.util.spec_from_file_location(name, PEERS / f"{name}.py")
    module = importlib.util.module_from_spec(found)
    monkeypatch.setitem(sys.modules, name, module)
    found.loader.exec_module(module)
    for new in set(sys.modules) - before - {name}:
        if str(PEERS) in str(getattr(sys.modules[new], "__file__", "")):
            monkeypatch.delitem(sys.modules, new)
    return module


@pytest.fixture
def figures(monkeypatch):
    return load("figures", monkeypatch)


def test_differing_pixels_are_counted_across_bands(figures):
    rng = np.random.default_rng(0)
    one = rng.integers(0, 3, (37, 11)).astype(np.uint8)
    other = one.copy()
    other[[0, 9, 10, 36], [0, 10, 3, 5]] += 1
    bands = []

    def read(y0, y1):
        bands.append((y0, y1))
        return one[y0:y1]

    assert figures.count_differing(read, lambda a, b: other[a:b], (37, 11), rows=10) == 4
    assert bands == [(0, 10), (10, 20), (20, 30), (30, 37)]
    assert figures.count_differing(read, lambda a, b: one[a:b], (37, 11)) == 0


def test_a_mask_of_another_size_is_an_error(figures):
    mask = np.zeros((20, 8), np.uint8)
    with pytest.raises(ValueError, match=r"rows 16 to 24 of a mask are \(4, 8\); want \(8, 8\)"):
        figures.count_differing(
            lambda a, b: np.zeros((b - a, 8)), lambda a, b: mask[a:b], (24, 8), rows=16
        )


@pytest.mark.parametrize("largest", [956, 1340, 2300])
@pytest.mark.parametrize("shape", [(8192, 8192), (4096, 4096), (2220, 2967), (1024, 1024), (1, 1)])
def test_tuned_tiling_is_legal_and_covers(figures, shape, largest):
    tile, stride = figures.balanced_tiling(shape, largest)
    assert stride % 16 == 0
    assert (tile - 188) % 16 == 0
    assert stride <= tile - 184 < stride + 16
    assert tile <= largest

    def work(step):
        side = figures.legal_input(step)
        return -(-shape[0] // step) * -(-shape[1] // step) * side**2

    assert all(work(stride) <= work(step) for step in range(640, largest - 199, 16))


def test_known_tilings(figures):
    assert figures.balanced_tiling((8192, 8192), 1340) == (1212, 1024)
    assert figures.legal_input(388) == 572
    assert figures.legal_input(384) == 572
    assert figures.legal_input(1) == 188


def rows_of(figures):
    def row(*args, **more):
        return figures.Row(*args, px=4_000_000, differing_px=more.pop("differing", 0), **more)

    return [
        row("tilepipe", "auto", "tilepipe", wall_s=2.0, work_s=1.0, peak_bytes=1_500_000_000),
        row("loop", "as its users run it", "as run", wall_s=20.0, work_s=8.0, differing=720_000),
        row("dask", "as its users run it", "as run", wall_s=16.0, work_s=10.0, differing=1),
        row("loop", "tuned", "tuned", wall_s=5.0, work_s=4.0),
        row("loop", "stride 384", wall_s=0.1, work_s=0.1),
        figures.Row("monai", "-", state="not installed", reason="no such version"),
        figures.Row("tiler", "tuned", "tuned", state="failed", reason="KeyError: 3"),
    ]


def test_summary_takes_the_best_at_each_speed(figures):
    (entry,) = figures.summary(rows_of(figures))
    assert entry["as run, cold"] == pytest.approx(8)  # dask's
    assert entry["as run, steady"] == pytest.approx(8)  # the loop's
    assert entry["tuned, cold"] == pytest.approx(2.5)
    assert entry["tuned, steady"] == pytest.approx(4)  # not the setting outside the groups
    assert figures.best([], "tuned", "cold") is None
    assert figures.ratio(1.0, None) is None
    assert figures.ratio(None, 2.0) is None


def test_table_shows_every_row_and_hides_no_failure(figures):
    text = figures.table(rows_of(figures))
    lines = text.splitlines()
    loop = next(line for line in lines if line.startswith("loop") and "users" in line).split()
    assert loop[-8:] == ["20.0", "0.20", "0.50", "10.00", "8.00", "-", "18", "%"]
    ours = next(line for line in lines if line.startswith("tilepipe  auto")).split()
    assert ours == ["tilepipe", "auto", "2.0", "2.00", "4.00", "1.00", "1.00", "1.50", "0"]
    assert any(line.split() == ["monai", "-", "not", "installed"] for line in lines)
    assert "monai, -: not installed: no such version" in lines
    assert "tiler, tuned: failed: KeyError: 3" in lines
    assert "best as run, cold: dask, 0.25 MPix/s" in lines
    assert "best as run, steady: loop, 0.50 MPix/s" in lines


def test_table_of_failures_only(figures):
    text = figures.table([figures.Row("loop", "tuned", "tuned", state="failed", reason="no")])
    assert text.splitlines()[-1] == "loop, tuned: failed: no"


def test_one_differing_pixel_is_not_none(figures):
    assert figures.share_text(1, 10**9) == "1e-07 %"
    assert figures.share_text(0, 10**9) == "0"
    assert figures.share_text(None, 10**9) == "-"
    row = figures.Row("a", "b", px=200, differing_px=1, wall_s=1e-4)
    assert row.to_json()["differing"] == 0.005
    assert row.to_json()["cold_mpix_per_s"] == pytest.approx(2.0)
    assert row.to_json()["steady_mpix_per_s"] is None


@pytest.mark.parametrize(
    ("code", "ok", "reason"),
    [
        ("print('hello'); print('{\"work_s\": 2}')", True, ""),
        ("raise KeyError(3)", False, "KeyError: 3"),
        ("raise SystemExit(4)", False, "exit 4"),
        ("print('hello')", False, "its last line is no report"),
        ("import time; time.sleep(60)", False, "stopped after 2 s"),
    ],
)
def test_what_becomes_of_a_process(monkeypatch, tmp_path, code, ok, reason):
    measure = load("measure", monkeypatch)
    done = measure.run(
        [sys.executable, "-S", "-c", code],
        log=tmp_path / "a.log",
        folder=tmp_path,
        timeout_s=2 if "sleep" in code else 60,
        env=dict(os.environ),
    )
    assert done.ok is ok
    assert done.reason.startswith(reason)
    assert done.report == ({"work_s": 2} if ok else {})
    assert done.wall_s > 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_children_counts(monkeypatch):
    measure = load("measure", monkeypatch)
    code = "import sys; print(len(bytearray(64 << 20)), flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-S", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        child.stdout.readline()
        alone = measure.resident_bytes(child.pid)
        assert alone > 4 << 20
        assert measure.resident_bytes(os.getpid()) > alone
        child.stdin.close()
    assert measure.resident_bytes(child.pid) is None


def test_the_exported_network_is_the_same(monkeypatch, tmp_path):
    prepare = load("prepare", monkeypatch)
    monkeypatch.setattr(prepare, "TILE_PX", 188)
    model = load_model("unet", weights="random:3", in_channels=3, base=2)
    net = prepare.export(model, tmp_path / "net.pt")
    assert (tmp_path / "net.pt").stat().st_size > 1000
    assert net.head.out_channels == model.n_outputs
    other = load_model("unet-same", weights="random:3", in_channels=3, base=2)
    with pytest.raises(SystemExit, match="unet-same: the peers' scripts have the valid U-Net"):
        prepare.export(other, tmp_path / "other.pt")


def test_every_peer_has_a_script_and_both_settings(monkeypatch):
    catalogue = load("catalogue", monkeypatch)
    assert len({peer.name for peer in catalogue.PEERS}) == len(catalogue.PEERS) >= 6
    for peer in catalogue.PEERS:
        assert (PEERS / "scripts" / peer.script).is_file()
        # A script's folder comes first on the path: it must not hide the package.
        assert not (PEERS / "scripts" / f"{peer.name}.py").exists()
        settings = list(catalogue.settings_of(peer, (8192, 8192), largest_px=1340))
        assert [s.group for s in settings if s.group] == ["as run", "tuned"]
        assert settings[0].arguments() == [
            "--precision", "fp32", "--tile", "572", "--stride", "388",
        ]  # fmt: skip
    whole = list(catalogue.settings_of(catalogue.PEERS[0], (1000, 2000), largest_px=1340))[-1]
    assert whole.stride_px >= 2000
    assert "--warm" not in whole.arguments()


def test_install_failure_is_told(monkeypatch, tmp_path):
    catalogue = load("catalogue", monkeypatch)
    environments = load("environments", monkeypatch)
    missing = str(tmp_path / "no-such-package.whl")
    peer = catalogue.Peer("absent", "absent", "hand_loop.py", (missing,))
    with pytest.raises(environments.InstallError, match=r"ERROR.*no-such-package"):
        environments.make(peer, timeout_s=120, folder=tmp_path)
    assert not environments.is_ready(peer, tmp_path)
    (tmp_path / "absent" / "ready.txt").write_text(environments._text(peer))
    assert environments.is_ready(peer, tmp_path)
    other = catalogue.Peer("absent", "absent", "hand_loop.py", (missing, "numpy"))
    assert not environments.is_ready(other, tmp_path)
