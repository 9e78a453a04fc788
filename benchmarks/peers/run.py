"""The alternatives and tilepipe on one slide with one network: a table of ratios.

    python benchmarks/peers/run.py --size 8192

``make peers`` does that; benchmarks/peers/README.md says what is counted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import environments
import zarr
from catalogue import PEERS, Peer, Setting, settings_of
from figures import Row, count_differing, table
from measure import Run, run
from numpy.typing import NDArray

from tilepipe.store import open_store
from tilepipe.tiling import Box

HERE = Path(__file__).resolve().parent
Read = Callable[[int, int], NDArray[Any]]
# What tilepipe is asked for; the first row is what the ratios refer to, "exact" the reference.
OURS = {
    "auto": (),
    "auto, tuned before": (),
    "auto, --in-place": ("--in-place",),
    "bf16": ("--precision", "bf16"),
    "torch, auto": ("--backend", "torch"),
    "torch, bf16": ("--backend", "torch", "--precision", "bf16"),
}
EXACT = ("--backend", "torch", "--precision", "fp32", "--tissue", "off")


@dataclass(frozen=True, slots=True)
class Race:
    """What all runs share."""

    slide: Path
    exported: Path
    folder: Path
    logs: Path
    shape: tuple[int, int]
    network: tuple[str, ...]
    """tilepipe's options that name the network."""
    timeout_s: float
    repeat: int

    @property
    def px(self) -> int:
        """Of the slide."""
        return self.shape[0] * self.shape[1]

    def best(self, command: list[str], name: str, out: Path, env: dict[str, str]) -> Run:
        """Run ``repeat`` times, each time anew; the fastest, or the first that failed."""
        runs: list[Run] = []
        for number in range(self.repeat):
            shutil.rmtree(out, ignore_errors=True)
            log = self.logs / f"{name}-{number}.log"
            runs.append(
                run(command, log=log, folder=self.folder, timeout_s=self.timeout_s, env=env)
            )
            if not runs[-1].ok:
                return runs[-1]
        return min(runs, key=lambda one: one.wall_s)


def own_rows(race: Race, exact: Read, tell: Callable[[str], None]) -> Iterator[Row]:
    """Run tilepipe in each of its settings; each starts with an empty cache, save one."""
    for setting, options in OURS.items():
        tell(f"tilepipe, {setting}")
        name = "tilepipe-" + "".join(c if c.isalnum() else "-" for c in setting)
        cache = race.folder / ("cache-auto" if setting.startswith("auto") else f"cache-{name}")
        if setting != "auto, tuned before":
            shutil.rmtree(cache, ignore_errors=True)
        yield _own_row(race, setting, options, name, cache, exact)


def exact_row(race: Race) -> tuple[Row, Read | None]:
    """Run tilepipe in float32: the row, and the mask that all others are compared with."""
    row = _own_row(race, "fp32, the reference", EXACT, "exact", race.folder / "cache-exact", None)
    return row, _own_mask(race.folder / "exact.zarr", row.facts) if row.state == "ok" else None


def _own_row(
    race: Race, setting: str, options: tuple[str, ...], name: str, cache: Path, exact: Read | None
) -> Row:
    out = race.folder / f"{name}.zarr"
    command = [sys.executable, "-m", "tilepipe", "run", str(race.slide), "-o", str(out),
               *race.network, *options, "--overwrite", "--json"]  # fmt: skip
    done = race.best(command, name, out, {**os.environ, "TILEPIPE_CACHE": str(cache)})
    if not done.ok:
        return Row("tilepipe", setting, "tilepipe", "failed", done.reason)
    label = done.report["label"]
    settings = open_store(str(out)).label(label).read_record().get("settings", {})
    facts = {"label": label, "settings": settings, "account": done.report["account"]}
    differing = 0
    if exact is not None:
        differing = count_differing(_own_mask(out, facts), exact, race.shape)
        shutil.rmtree(out)
    return Row(
        "tilepipe", setting, "tilepipe", px=race.px, wall_s=done.wall_s,
        work_s=done.report["elapsed_s"], peak_bytes=done.peak_bytes, differing_px=differing,
        facts=facts,
    )  # fmt: skip


def _own_mask(out: Path, facts: dict[str, Any]) -> Read:
    level = open_store(str(out)).label(facts["label"]).level(0)
    return lambda y0, y1: level.read(Box(y0, 0, y1, level.shape[1]))


def peer_rows(
    race: Race, peer: Peer, python: Path, settings: list[Setting], exact: Read
) -> Iterator[Row]:
    """Run one alternative in each of its settings."""
    # Its environment and nothing of ours.
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    script = str(HERE / "scripts" / peer.script)
    # Untimed: each environment has a torch of its own, which must not be read from disk in one
    # run and from memory in another.
    run([str(python), script, "--help"], log=race.logs / f"{peer.name}-import.log",
        folder=race.folder, timeout_s=race.timeout_s, env=env)  # fmt: skip
    for number, setting in enumerate(settings):
        name = f"{peer.name}-{number}"
        out = race.folder / f"{name}.zarr"
        command = [str(python), script, "--slide", str(race.slide), "--weights",
                   str(race.exported), "--out", str(out), *setting.arguments()]  # fmt: skip
        done = race.best(command, name, out, env)
        if not done.ok:
            yield Row(peer.title, setting.name, setting.group, "failed", done.reason)
            continue
        facts = {**done.report, "tile_px": setting.tile_px, "stride_px": setting.stride_px,
                 "precision": setting.precision}  # fmt: skip
        try:
            differing = count_differing(_peer_mask(done.report), exact, race.shape)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"its mask cannot be compared: {error}"
            yield Row(peer.title, setting.name, setting.group, "failed", reason, facts=facts)
            continue
        finally:
            shutil.rmtree(out, ignore_errors=True)
        yield Row(
            peer.title, setting.name, setting.group, px=race.px, wall_s=done.wall_s,
            work_s=done.report["work_s"], peak_bytes=done.peak_bytes, differing_px=differing,
            facts=facts,
        )  # fmt: skip


def _peer_mask(report: dict[str, Any]) -> Read:
    found: Any = zarr.open(report["mask"], mode="r")
    array = found[report["array"]] if report["array"] else found
    return lambda y0, y1: array[y0:y1]


def prepare(asked: argparse.Namespace, folder: Path) -> tuple[Race, dict[str, Any]]:
    """Make slide and exported network; what all runs share, and the facts to record."""
    slide = asked.slide.resolve() if asked.slide else folder / "slide.tif"
    exported = folder / "network.pt"
    network = ["--model", asked.model, *(["--weights", asked.weights] if asked.weights else [])]
    if asked.weights.startswith("random:"):
        network += ["--base", str(asked.base)]
    command = [sys.executable, str(HERE / "prepare.py"), "--slide", str(slide), "--export",
               str(exported), *network]  # fmt: skip
    command += [] if asked.slide else ["--size", str(asked.size)]
    done = subprocess.run(command, check=False, text=True, capture_output=True)
    if done.returncode:
        raise SystemExit(done.stderr.strip()[-2000:])
    facts = json.loads(done.stdout.splitlines()[-1])
    shape = (int(facts["shape"][0]), int(facts["shape"][1]))
    logs = asked.results.resolve() / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    race = Race(slide, exported, folder, logs, shape, tuple(network), asked.timeout, asked.repeat)
    return race, facts


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=8192, help="side of the slide made, px")
    parser.add_argument("--slide", type=Path, help="a tiled RGB TIFF of your own")
    parser.add_argument("--model", default="unet")
    parser.add_argument("--weights", default="random:0", help="'' for the bundled ones")
    parser.add_argument("--base", type=int, default=16, help="for random weights")
    parser.add_argument("--tile", type=int, default=1340, help="largest tuned tile, px")
    parser.add_argument("--only", help="peers, e.g. loop,dask; 'none' for tilepipe alone")
    parser.add_argument("--repeat", type=int, default=1, help="runs of each; the fastest counts")
    parser.add_argument("--timeout", type=float, default=3600, help="s for a run")
    parser.add_argument("--install-timeout", type=float, default=1800, help="s for a peer")
    parser.add_argument("--install-only", action="store_true")
    parser.add_argument("--folder", type=Path, help="where slide and masks are made")
    parser.add_argument("--results", type=Path, default=HERE / ".results")
    asked = parser.parse_args()
    names = [peer.name for peer in PEERS] if asked.only is None else asked.only.split(",")
    if unknown := set(names) - {peer.name for peer in PEERS} - {"none"}:
        parser.error(f"--only {', '.join(unknown)}: there are {', '.join(p.name for p in PEERS)}")
    peers = [peer for peer in PEERS if peer.name in names]
    pythons = install(peers, asked.install_timeout)
    if asked.install_only:
        return
    with tempfile.TemporaryDirectory(dir=asked.folder, prefix="tilepipe-peers-") as made:
        tell(f"slide and network in {made}")
        race, facts = prepare(asked, Path(made))
        rows = list(measured(race, peers, pythons, asked.tile))
    facts |= {"rows": [row.to_json() for row in rows], "options": vars(asked)}
    text = table(rows)
    stem = asked.results / time.strftime("%Y-%m-%d-%H%M%S", time.gmtime())
    stem.with_suffix(".json").write_text(json.dumps(facts, indent=1, default=str) + "\n")
    stem.with_suffix(".txt").write_text(text + "\n")
    machine = facts["machine"]
    print(f"{machine['cpu']}, {machine['cores']} cores; {race.shape[1]} x {race.shape[0]} px, "
          f"{facts['model']['name']}, {facts['model']['source']}")  # fmt: skip
    print(text)
    print(f"{stem.with_suffix('.json')} has versions, settings and the machine's facts")


def install(peers: list[Peer], timeout_s: float) -> dict[str, Path | str]:
    """Make the environments; the interpreter of each, or why there is none."""
    found: dict[str, Path | str] = {}
    for peer in peers:
        if not environments.is_ready(peer):
            tell(f"installing {', '.join(peer.requirements)}")
        try:
            found[peer.name] = environments.make(peer, timeout_s=timeout_s)
        except environments.InstallError as error:
            found[peer.name] = str(error)
            tell(f"{peer.name}: {error}")
    return found


def measured(
    race: Race, peers: list[Peer], pythons: dict[str, Path | str], largest_px: int
) -> Iterator[Row]:
    """Yield the rows: tilepipe's, then each peer's."""
    tell("tilepipe, fp32: the exact mask")
    reference, exact = exact_row(race)
    if exact is None:
        raise SystemExit(f"tilepipe's own mask is missing: {reference.reason}")
    yield from own_rows(race, exact, tell)
    yield reference
    for peer in peers:
        python = pythons[peer.name]
        if isinstance(python, str):
            yield Row(peer.title, "-", state="not installed", reason=python)
            continue
        settings = list(settings_of(peer, race.shape, largest_px=largest_px))
        tell(f"{peer.title}: {', '.join(setting.name for setting in settings)}")
        yield from peer_rows(race, peer, python, settings, exact)


def tell(text: str) -> None:
    """Say what goes on."""
    print(f"... {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
