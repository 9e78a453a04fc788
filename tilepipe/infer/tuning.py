"""Tuning: tile and batch by a short measurement on this device with this network.

Only speed is decided here. In float32 tile and batch do not change a label; in reduced precision
they may change a last bit, so what was chosen is recorded and used again on resume.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import DTypeLike

from tilepipe import malloc
from tilepipe.infer.caches import device_name, key_of, read_cached, write_cached
from tilepipe.infer.guard import sample_plan
from tilepipe.infer.memory import FORWARD_BYTES, at_once, free_bytes, peak_activation_bytes
from tilepipe.infer.plans import plan_for
from tilepipe.infer.race import Contender, Race, Trial, kept_px, speed_of, useful_px
from tilepipe.models import Model
from tilepipe.packages import version_of
from tilepipe.spec import JobSpec
from tilepipe.tiling import TilePlan

if TYPE_CHECKING:
    from tilepipe.infer.settings import Settings

AIMS_PX = {"cpu": (384, 512, 768, 1024, 1344, 2048), "cuda": (1024, 2048, 4096)}
"""Cores that are tried."""
BUDGET_S = 8.0
MOST_S = 15.0
GPU_FORWARDS = 11
"""Batches that a trial on a GPU computes: to make and check a record, to warm up, to be timed."""
_AS_FAST = 0.97
"""Two measurements of the same tile differ by as much, and so do a lap and a job."""
_RIVALS = 0.85
"""On a shared machine one measurement may be off by so much: then both are taken again."""
_LAPS = 2
RACE_BYTES = 640 << 20
"""What the activations of two ways may take that are open at once: little more than a job's."""
MEMORY_SHARE = 0.4
"""Part of the free memory that a forward may take: there are the layers' workspaces, too, and units
that are redone in float32."""


def tuned(
    settings: Settings, model: Model, spec: JobSpec, *, dtype: np.dtype[Any], workers: int
) -> Settings:
    """Return the settings with the fastest tile and batch; measured once per machine and model."""
    candidates = list(candidate_plans(settings, model, spec, workers=workers))
    if len(candidates) <= 1:
        return settings
    name = "tune-" + key_of(
        "beside lanes, in turns, malloc as in a job",
        device_name(settings.device),
        [model.name, dict(model.arguments), model.in_channels, model.n_outputs],
        [settings.precision, settings.backend, settings.threads, str(dtype)],
        [version_of("torch"), version_of("openvino"), version_of("tilepipe")],
        [(plan.input_px, plan.core_px, batch) for plan, batch in candidates],
    )
    kept = read_cached(name)
    for plan, batch in candidates:
        if kept is not None and (kept.get("input_px"), kept.get("batch")) == (plan.input_px, batch):
            return _with(settings, plan, batch, "from an earlier measurement")
    if settings.device == "cpu":
        malloc.suit(settings.backend)  # as the job will: or torch's larger tiles seem slow
    trials = measure(settings, model, candidates, dtype=dtype)
    if not trials:
        return settings
    best = chosen(trials)
    write_cached(name, {"input_px": best.input_px, "batch": best.batch,
                        "mpix_per_s": best.mpix_per_s})  # fmt: skip
    plan = next(plan for plan, _ in candidates if plan.input_px == best.input_px)
    return _with(settings, plan, best.batch, f"measured {best.mpix_per_s:.2f} MPix/s")


def chosen(trials: Sequence[Trial]) -> Trial:
    """Return the one with the fewest px under way among those as fast as the fastest.

    A few per cent are less than two measurements of the same tile differ by; memory is not.
    """
    fastest = max(trial.mpix_per_s for trial in trials)
    fast = [trial for trial in trials if trial.mpix_per_s >= _AS_FAST * fastest]
    return min(fast, key=lambda trial: trial.batch * trial.input_px**2)


def _with(settings: Settings, plan: TilePlan, batch: int, how: str) -> Settings:
    note = f"tile {plan.input_px} px, batch {batch}: {how}"
    return replace(settings, plan=plan, batch=batch, notes=(*settings.notes, note))


def candidate_plans(
    settings: Settings, model: Model, spec: JobSpec, *, workers: int
) -> Iterator[tuple[TilePlan, int]]:
    """Plans and batches worth measuring: what the user said is fixed, memory bounds the rest."""
    kind = settings.device.partition(":")[0]
    plans = {settings.plan.input_px: settings.plan}
    if spec.tile is None and settings.plan.mode != "blended":
        for aim in AIMS_PX[kind]:
            plan, _ = plan_for(
                model,
                settings.plan.extent,
                spec,
                unit_px=settings.plan.unit_px,
                device=settings.device,
                core_px=aim,
            )
            plans.setdefault(plan.input_px, plan)
    batches = (spec.batch,) if spec.batch else (1,) if kind == "cpu" else (1, 2, 4)
    allowed = MEMORY_SHARE * free_bytes(settings.device) / max(1, workers)
    needed = partial(activation_bytes, settings, model)
    if kind == "cpu":  # larger tiles gain little there and double the memory of the job
        allowed = min(allowed, max(FORWARD_BYTES, needed(settings.plan, settings.batch)))
    for input_px, plan in sorted(plans.items()):
        for batch in batches:
            is_least = input_px == settings.plan.input_px and batch == batches[0]
            if is_least or needed(plan, batch) <= allowed:
                yield plan, batch


def activation_bytes(settings: Settings, model: Model, plan: TilePlan, batch: int) -> float:
    """Return what the activations of all batches under way take."""
    per_px = peak_activation_bytes(model, precision=settings.precision)
    streams = at_once(model, replace(settings, plan=plan, batch=batch))
    return per_px * batch * plan.input_px**2 * streams


def measure(
    settings: Settings,
    model: Model,
    candidates: list[tuple[TilePlan, int]],
    *,
    dtype: np.dtype[Any],
    budget_s: float = BUDGET_S,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Trial]:
    """Time each candidate, those nearest the settings' own first, until the budget is used up.

    Larger batches come after the tiles of every size: of a large tile one is enough for a GPU, and
    the tile is what its halo costs less of. They must not use up the budget before it is tried.

    What runs out of memory is left out, what lies behind a slower tile, and what would keep a GPU
    beyond ``MOST_S``. The two fastest are timed again in turns where they are near each other; the
    best figure of each counts.
    """
    own_px = settings.plan.input_px
    ordered = sorted(candidates, key=lambda pair: (pair[1], abs(pair[0].input_px - own_px)))
    on_cpu = settings.device == "cpu"
    started_s = clock()
    enter = partial(Contender, settings, model, dtype=dtype, budget_s=budget_s, clock=clock)
    with _beside_lanes(settings) if on_cpu else nullcontext(), Race(enter) as race:

        def is_over() -> bool:
            return bool(race.trials) and clock() - started_s > budget_s

        def takes_too_long(plan: TilePlan, batch: int) -> bool:
            if on_cpu or not race.trials:
                return False
            fastest = max(map(speed_of, race.trials.values()))
            batch_s = batch * useful_px(plan) / fastest / 1e6
            return clock() - started_s + GPU_FORWARDS * batch_s > MOST_S

        for plan, batch in ordered:
            if is_over():
                break
            if takes_too_long(plan, batch):
                continue
            if not _is_behind(plan.input_px, list(race.trials.values())):
                race.lap(plan, batch)
        rivals = _rivals(race.trials)
        again = [pair for pair in ordered if (pair[0].input_px, pair[1]) in rivals]
        # Both stay open: in memory that a job has, too. Nothing disturbs a GPU.
        if on_cpu and sum(activation_bytes(settings, model, *pair) for pair in again) <= RACE_BYTES:
            race.at_once = 2
        else:
            again = []
        for plan, batch in again * _LAPS:
            if not is_over():
                race.lap(plan, batch)
    return list(race.trials.values())


def _rivals(trials: Mapping[tuple[int, int], Trial]) -> list[tuple[int, int]]:
    """Return the two fastest, if something beside them may have decided which is first."""
    fastest = sorted(trials, key=lambda place: speed_of(trials[place]))[-2:]
    speeds = [speed_of(trials[place]) for place in fastest]
    return fastest if len(fastest) == 2 and speeds[0] > _RIVALS * speeds[1] else []


def _is_behind(input_px: int, trials: Sequence[Trial]) -> bool:
    """Tell whether a slower tile lies between the best so far and one of ``input_px``.

    Speed grows with the tile until a cache is full, then falls.
    """
    if not trials:
        return False
    best = max(trials, key=speed_of)
    low, high = sorted((input_px, best.input_px))
    return any(
        low < trial.input_px < high and trial.mpix_per_s < _AS_FAST * best.mpix_per_s
        for trial in trials
    )


@contextmanager
def _beside_lanes(settings: Settings) -> Iterator[None]:
    """Keep a third of a core busy for every two of the network's, as a job's lanes do.

    A tile whose layers are computed by all threads together waits for the one that a lane holds
    up: alone it may be the fastest, in a job it is not (3.9 and 3.3 MPix/s on two cores, the next
    smaller tile, two of which are computed at once, 3.7 and 3.3 for less memory).
    """
    over = threading.Event()
    block = np.random.default_rng(0).integers(0, 40, 1 << 20, dtype=np.uint8).tobytes()

    def work() -> None:
        busy_s = 0.0
        while not over.wait(2 * busy_s):
            started_s = time.perf_counter()
            zlib.compress(block, 1)
            busy_s = time.perf_counter() - started_s

    lanes = [
        threading.Thread(target=work, name="tilepipe-tuning")
        for _ in range(min(3, max(1, settings.threads // 2)))
    ]
    for lane in lanes:
        lane.start()
    try:
        yield
    finally:
        over.set()
        for lane in lanes:
            lane.join()


def estimate_seconds(model: Model, settings: Settings, *, dtype: DTypeLike = np.uint8) -> float:
    """Return the seconds that one tile of the plan takes, from a smaller one run here and now."""
    small = sample_plan(settings.plan, model)
    trials = measure(
        replace(settings, plan=small),
        model,
        [(small, settings.batch)],
        dtype=np.dtype(dtype),
        budget_s=5.0,
    )
    if not trials:
        return 0.0
    kept = kept_px(small, settings.batch, device=settings.device)
    batch_s = kept / trials[0].mpix_per_s / 1e6
    return batch_s / (settings.batch * small.input_px**2) * settings.plan.input_px**2
