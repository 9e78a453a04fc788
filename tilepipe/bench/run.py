"""``bench``: bare network, engine from memory, whole pipeline, and what share the last reaches."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import default_rng
from numpy.typing import NDArray

from tilepipe.bench.bare import Speed, bare_speeds, engine_speed
from tilepipe.bench.flops import flops_per_px, matrix_tflops
from tilepipe.bench.machine import PeakMemory, machine_facts
from tilepipe.errors import ScheduleError
from tilepipe.infer.backends import check_gpus
from tilepipe.infer.settings import Settings, choose_settings
from tilepipe.malloc import keep_memory
from tilepipe.models import Model, model_for
from tilepipe.schedule.local import gpu_numbers
from tilepipe.slide import open_slide
from tilepipe.spec import JobSpec
from tilepipe.tiling import Box

Tell = Callable[[str], None]
ENGINE_PX = 4096
"""Side of the image that the engine gets from memory."""
ROUNDS = 3
ROUNDS_S = 60.0
"""After so long no round begins: of a pipeline of minutes a disturbance of seconds is little."""


def bench(
    spec: JobSpec,
    *,
    size_px: int = 4096,
    slide: Path | None = None,
    folder: Path | None = None,
    gpus: tuple[int, ...] = (),
    rounds: int = ROUNDS,
    tell: Tell = lambda _: None,
) -> dict[str, Any]:
    """Measure; returns plain values.

    Pipeline and bare network are timed ``rounds`` times in turns, for ``ROUNDS_S`` at the most, and
    the best of each counts, of the bare network over all it was timed: what else runs on a machine
    only ever takes away, and a bare network that is timed for a second escapes it where a job of
    ten cannot. ``rounds`` lists them all; start (``cold_mpix_per_s``) is the first's, the peak of
    memory the highest.

    ``bare_matrix_share`` is what the bare network's useful operations (``flops_per_px``: no halo,
    no border) are of torch's rate of matrix products on the same device in the same precision.
    ``size_px`` is the side of the slide that is made where none is given. The pipeline runs as a
    command of its own, so that start, memory and speed are what a user gets. ``gpus`` repeats it
    with so many devices.
    """
    for count in gpus:
        gpu_numbers(_first(count))  # told before anything is measured
    if gpus and spec.device != "cpu":
        check_gpus(_first(max(gpus)))
    keep_memory()
    with tempfile.TemporaryDirectory(dir=folder, prefix="tilepipe-bench-") as made:
        place = Path(made)
        # What is wrong with the model is told before minutes go into a slide, which has 3 channels.
        model = model_for(spec, image_channels=3) if slide is None else None
        if slide is None:
            slide = place / "slide.tif"
            tell(f"writing a JPEG slide of {size_px} x {size_px} px")
            write_slide(slide, size_px)
        opened = open_slide(slide, max_pixels=spec.max_pixels)
        extent, dtype = opened.levels[0].shape, opened.dtype
        side = min(ENGINE_PX, *extent)
        image = opened.read(Box(0, 0, side, side))
        model = model or model_for(spec, image_channels=opened.channels)
        tell("choosing settings")
        started_s = time.perf_counter()
        settings = choose_settings(
            model, extent=extent, spec=spec, dtype=dtype, channels=opened.channels,
            read=opened.read,
        )  # fmt: skip
        tuning_s = time.perf_counter() - started_s
        opened.close()
        tell(f"the bare network: {settings.backend} {settings.precision} and the rest of the grid")
        speeds = _bare(model, settings, spec, dtype)
        tell("the engine from memory")
        engine = engine_speed(model, _for_memory(settings, image), image)
        main, turns = _in_turns(
            partial(_pipeline, slide, place / "out.zarr", spec, extent, None),
            partial(_bare_again, model, settings, dtype, speeds),
            rounds=rounds, tell=tell,
        )  # fmt: skip
        runs = [main]
        for count in gpus:
            tell(f"the whole pipeline on {count} devices")
            runs.append(_pipeline(slide, place / f"gpu{count}.zarr", spec, extent, _first(count)))
    best = _best(speeds, main["settings"]["precision"])
    tell("products of matrices")
    flops, peak = flops_per_px(model), matrix_tflops(settings.device, best.precision)
    return {
        "bare_mpix_per_s": best.mpix_per_s,
        "engine_mpix_per_s": engine["mpix_per_s"],
        "pipeline_mpix_per_s": main["mpix_per_s"],
        "pipeline_share": main["mpix_per_s"] / best.mpix_per_s,
        "flops_per_px": flops,
        "matrix_tflops": peak,
        "bare_matrix_share": best.mpix_per_s * flops / peak / 1e6,
        "cold_mpix_per_s": turns[0]["cold_mpix_per_s"],
        "peak_rss_bytes": max(turn["peak_rss_bytes"] for turn in turns),
        "rounds": turns,
        "account": main["account"],
        "bare": [speed.to_json() for speed in speeds],
        "bare_best": best.to_json(),
        "engine": engine,
        "runs": runs,
        "scaling": _scaling(runs[1:], gpus),
        "extent": list(extent),
        "slide": "made" if slide.name == "slide.tif" and not slide.exists() else str(slide),
        "model": model.to_json(),
        "spec": spec.to_json(),
        "settings": main["settings"],
        "choosing_s": round(tuning_s, 3),
        "machine": machine_facts(settings.device),
    }


def _in_turns(
    pipeline: Callable[[], dict[str, Any]],
    bare: Callable[[str], float],
    *,
    rounds: int,
    tell: Tell,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run the pipeline, then the bare network in its precision; returns the fastest run and all."""
    runs: list[dict[str, Any]] = []
    turns = []
    started_s = clock()
    while len(runs) < rounds and (not runs or clock() - started_s < ROUNDS_S):
        tell(f"the whole pipeline{f', round {len(runs) + 1} of {rounds}' if rounds > 1 else ''}")
        run = pipeline()
        runs.append(run)
        turns.append({
            "pipeline_mpix_per_s": run["mpix_per_s"],
            "bare_mpix_per_s": bare(run["settings"]["precision"]),
            **{key: run[key] for key in ("cold_mpix_per_s", "peak_rss_bytes")},
        })  # fmt: skip
    return max(runs, key=lambda run: float(run["mpix_per_s"])), turns


def _bare_again(
    model: Model,
    settings: Settings,
    dtype: np.dtype[Any],
    speeds: list[Speed],
    precision: str,
) -> float:
    """Time the fastest way to run the bare network once more; ``speeds`` keeps what it made."""
    best = _best(speeds, precision)
    again = bare_speeds(
        model,
        device=settings.device,
        threads=settings.threads,
        dtype=dtype,
        precisions=(best.precision,),
        backends=(best.backend,),
        cores_px=(best.input_px - 2 * model.locality.halo_px,),
        own=settings if settings.plan.mode == "blended" else None,
    )
    speeds.extend(again)
    return max((speed.mpix_per_s for speed in again), default=0.0)


def _best(speeds: list[Speed], precision: str) -> Speed:
    """Return the fastest in a precision, of all where it was not timed."""
    same = [speed for speed in speeds if speed.precision == precision]
    return max(same or speeds, key=lambda speed: speed.mpix_per_s)


def _first(count: int) -> str:
    """Return the numbers of the first ``count`` devices, as ``--gpus`` takes them."""
    return ",".join(str(number) for number in range(count))


def _bare(model: Model, settings: Settings, spec: JobSpec, dtype: np.dtype[Any]) -> list[Speed]:
    """Time the grid of what the user left open: precisions, back-ends, tiles."""
    return bare_speeds(
        model,
        device=settings.device,
        threads=settings.threads,
        dtype=dtype,
        precisions=None if spec.precision == "auto" else (settings.precision,),
        backends=("torch", "openvino") if spec.backend == "auto" else (settings.backend,),
        cores_px=None if spec.tile is None else (),
        own=settings,
    )


def _for_memory(settings: Settings, image: NDArray[Any]) -> Settings:
    extent = (image.shape[1], image.shape[2])
    return replace(settings, plan=replace(settings.plan, extent=extent))


def _pipeline(
    slide: Path, out: Path, spec: JobSpec, extent: tuple[int, int], gpus: str | None
) -> dict[str, Any]:
    """Run ``tilepipe run`` as a process; its own summary, wall time and peak memory."""
    values = {
        key: value
        for key, value in spec.to_json().items()
        if value != JobSpec.model_fields[key].get_default(call_default_factory=True)
    }
    shutil.rmtree(out, ignore_errors=True)  # of the round before: it would be gone on with
    job = out.with_suffix(".toml")
    job.write_text("".join(_toml(key, value) for key, value in values.items()), encoding="utf-8")
    command = [sys.executable, "-m", "tilepipe", "run", "-o", str(out), "--job", str(job), "--json"]
    command += ["--gpus", gpus] if gpus is not None else []
    command += ["--", str(slide)]  # whose name may begin like an option
    started_s = time.perf_counter()
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as said,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=said, text=True, env=os.environ
        ) as process,
        PeakMemory(process.pid) as peak,
    ):
        assert process.stdout is not None
        answer = process.stdout.read()
        failed = process.wait() != 0
        wall_s = time.perf_counter() - started_s
        said.seek(0)
        words = said.read()
    if failed:
        raise ScheduleError(f"the pipeline failed: {(words or answer).strip()[-2000:]}")
    record = json.loads(answer.strip().splitlines()[-1])
    px = extent[0] * extent[1]
    return {
        "gpus": gpus,
        "mpix_per_s": record["mpix_per_s"],
        "cold_mpix_per_s": px / wall_s / 1e6,
        "wall_s": wall_s,
        "elapsed_s": record["elapsed_s"],
        "peak_rss_bytes": peak.bytes,
        "account": record["account"],
        "settings": _recorded_settings(out, record),
    }


def _recorded_settings(out: Path, summary: dict[str, Any]) -> dict[str, Any]:
    from tilepipe.store import open_store

    settings = open_store(str(out)).label(summary["label"]).read_record().get("settings", {})
    return dict(settings)


def _toml(key: str, value: Any) -> str:
    if isinstance(value, dict):
        inner = ", ".join(f"{name} = {json.dumps(entry)}" for name, entry in value.items())
        return f"{key} = {{ {inner} }}\n"
    return f"{key} = {json.dumps(value)}\n"


def _scaling(runs: list[dict[str, Any]], gpus: tuple[int, ...]) -> list[dict[str, Any]]:
    """Speed per device, and how much of the first run's speed per device is kept."""
    if not runs:
        return []
    first = runs[0]["mpix_per_s"] / gpus[0]
    return [
        {
            "gpus": count,
            "mpix_per_s": run["mpix_per_s"],
            "per_gpu": run["mpix_per_s"] / count,
            "efficiency": run["mpix_per_s"] / count / first,
        }
        for count, run in zip(gpus, runs, strict=True)
    ]


def write_slide(path: Path, side_px: int, *, tile_px: int = 256, seed: int = 0) -> None:
    """Write a tiled JPEG RGB TIFF of drawn tissue; memory does not grow with its size."""
    import tifffile

    piece = drawn_tissue(1024, seed)
    turns = [np.rot90(piece, turn) for turn in range(4)]

    def tiles() -> Iterator[NDArray[np.uint8]]:
        for y0 in range(0, side_px, tile_px):
            for x0 in range(0, side_px, tile_px):
                turn = turns[(y0 // 1024 * 7 + x0 // 1024 * 3) % 4]
                y, x = y0 % 1024, x0 % 1024
                yield np.ascontiguousarray(turn[y : y + tile_px, x : x + tile_px])

    tifffile.imwrite(
        path,
        tiles(),
        shape=(side_px, side_px, 3),
        dtype=np.uint8,
        tile=(tile_px, tile_px),
        bigtiff=True,
        photometric="rgb",
        compression="jpeg",
        compressionargs={"level": 90},
        resolution=(20000, 20000),
        resolutionunit="CENTIMETER",
        metadata=None,
    )


def drawn_tissue(side_px: int, seed: int = 0) -> NDArray[np.uint8]:
    """Return (side, side, 3) uint8: nuclei on pink tissue, with grain."""
    rng = default_rng(seed)
    rows, columns = np.mgrid[0:side_px, 0:side_px].astype(np.float32)
    image = np.empty((side_px, side_px, 3), np.float32)
    image[:] = (228, 178, 205)
    image += 12 * (np.sin(rows / 31) * np.cos(columns / 23))[..., None]
    for _ in range(side_px * side_px // 900):
        y, x = rng.integers(0, side_px, 2)
        radius = int(rng.integers(4, 10))
        box = np.s_[max(0, y - radius) : y + radius, max(0, x - radius) : x + radius]
        inside = (rows[box] - y) ** 2 + (columns[box] - x) ** 2 < radius**2
        image[box][inside] = rng.normal((95, 60, 140), 10)
    image += rng.normal(0, 4, (side_px, side_px, 1))
    return np.clip(image, 0, 255).astype(np.uint8)
