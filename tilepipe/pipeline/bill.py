"""``--dry-run``: what a job will take, before anything is written."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np

from tilepipe.errors import ModelError
from tilepipe.pipeline.choice import choose
from tilepipe.pipeline.context import slide_level
from tilepipe.pipeline.events import Event, Note, OnEvent, Warned
from tilepipe.pipeline.lanes import lanes_of, processes_of, recent_bytes, slack_bytes, waiting_bytes
from tilepipe.pipeline.run import Request
from tilepipe.pipeline.source import Source, open_source
from tilepipe.pipeline.tissue import forecast_tissue, tissue_share
from tilepipe.spec import JobSpec
from tilepipe.store import check_free, image_codec, open_files
from tilepipe.threads import cores
from tilepipe.tiling import Box

PROCESS_BYTES = 330_000_000
"""Python, torch and dask with nothing done yet (measured)."""

PROBABILITY_SHARE = 0.75
"""Stored bytes per byte of probabilities: 0.72 on stained tissue with the bundled weights; those of
a surer network take less."""


def bill(request: Request) -> dict[str, Any]:
    """Plan a job and forecast its memory, disk and time; nothing is written.

    ``ram_bytes`` is the peak of all processes, ``disk_bytes`` of the finished store. Both are
    forecasts: compression is measured on samples of this very slide.
    """
    notes: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, Note | Warned):
            notes.append(event.text)

    source = open_source(request.slide, request.output, request.spec)
    try:
        return _bill(source, request.spec, notes, listen)
    finally:
        source.close()


def _bill(source: Source, spec: JobSpec, notes: list[str], listen: OnEvent) -> dict[str, Any]:
    check_free(open_files(source.output))
    for note in source.notes:
        listen(Note(source.name, note))
    # A mask image that cannot be used fails here, as it would later.
    mask = forecast_tissue(source, spec)
    if mask is not None:
        listen(Note(source.name, mask.note))
    elif spec.tissue != "off":
        notes.append("warning: where there is tissue takes long to find: all counts as tissue here")
    chosen = choose(source, spec, listen)
    from tilepipe.infer import estimate_memory, estimate_seconds
    from tilepipe.infer.backends import device_here

    extents = source.extents
    plan = chosen.settings.plan
    unit_px = plan.unit_px
    copied = source.store is None and not spec.in_place
    workers, lanes = processes_of(spec), lanes_of(spec, chosen.settings)
    itemsize = source.dtype.itemsize
    unit_bytes = source.channels * min(unit_px, max(extents[0])) ** 2 * itemsize
    # A lane holds a unit as read and as written; the network's own share is measured.
    network = estimate_memory(
        chosen.model,
        chosen.settings,
        dtype=source.dtype,
        probabilities=spec.probabilities,
        skips=spec.tissue != "off",
    )
    tile_s = 0.0
    try:
        here = device_here(chosen.settings.device, spec.device)
        tile_s = estimate_seconds(
            chosen.model, replace(chosen.settings, device=here), dtype=source.dtype
        )
    except ModelError:  # a cluster's workers have it, or a job is gone on with elsewhere
        notes.append("warning: the network's time is left out: its GPU is not on this machine")
    channels = len(chosen.model.classes) - 1 if spec.probabilities else 0
    # A unit of probabilities as computed, as cut into chunks, and as compressed.
    planes_bytes = 3 * channels * min(unit_px, max(extents[chosen.level])) ** 2
    each = network + min(lanes, len(plan.grid)) * (4 * unit_bytes + planes_bytes) + PROCESS_BYTES
    kept = recent_bytes(spec, lanes)
    # A lane holds what it can only decode whole beside the bytes that it is decoded from.
    each += 2 * lanes * _piece_bytes(source, spec, chosen.level)
    each += waiting_bytes(kept) + (kept if copied else 0)
    each += slack_bytes(spec, chosen.forward_bytes, lanes) if chosen.forward_bytes else 0
    # Worker processes stand beside the one that hands out their units.
    ram = workers * each + (PROCESS_BYTES if workers > 1 else 0)
    ratio, copy_s = _copying(source) if copied else (0.0, 0.0)
    pyramid_px = sum(height * width for height, width in extents)
    tiles = sum(plan.n_tiles(unit.box) for unit in plan.grid)
    computed = float(tiles)
    if mask is not None:
        share = tissue_share(mask, plan=plan, downsample=source.downsample(chosen.level))
        computed = sum(plan.n_tiles(unit.box) * share(unit.box) for unit in plan.grid)
    network_s = tile_s * computed / workers
    # Lanes and the network share the processor; on a GPU the slower of the two decides.
    copying_s = copy_s * pyramid_px / cores()
    on_cpu = chosen.settings.device == "cpu"
    seconds = network_s + copying_s if on_cpu else max(network_s, copying_s)
    mask_px = sum(height * width for height, width in extents[chosen.level :])
    planes_disk = mask_px * channels * PROBABILITY_SHARE
    # Objects compress as their mask does: ids change where classes do.
    mask_px *= 1 + spec.instances
    disk = round(pyramid_px * source.channels * itemsize * ratio + mask_px * 0.02 + planes_disk)
    height, width = extents[chosen.level]
    return {
        "slide": source.name,
        "output": source.output,
        "label": chosen.name,
        "level": chosen.level,
        "extent": [height, width],
        "plan": plan.to_json(),
        "settings": {k: v for k, v in chosen.settings.to_json().items() if k != "plan"},
        "units": len(plan.grid),
        "tiles": tiles,
        "computed_share": round(computed / tiles, 4),
        "halo_overhead": round(plan.halo_overhead, 4),
        "unit_px": unit_px,
        "ram_bytes": int(ram),
        "disk_bytes": int(disk),
        "probabilities_bytes": int(planes_disk),
        "seconds": round(seconds, 1),
        "notes": notes,
    }  # fmt: skip


def _piece_bytes(source: Source, spec: JobSpec, level: int) -> int:
    """Bytes of the slide's tiles, strips or chunks: a file may have one for the whole image."""
    if source.store is not None:
        return source.store.image(level).piece_bytes if source.store.has_image else 0
    assert source.slide is not None
    number = slide_level(source.slide, level) if spec.in_place else 0
    return source.slide.levels[number].piece_bytes


def _copying(source: Source) -> tuple[float, float]:
    """What copying this slide's image takes: share of its raw size, core-seconds a px.

    From up to nine sampled places, each read and compressed; hashing, writing and reading again for
    the pyramid take about as long once more (measured).
    """
    slide = source.slide
    assert slide is not None
    height, width = slide.levels[0].shape
    side = 512
    codec = image_codec(slide.dtype)
    raw = packed = px = 0
    started_s = time.thread_time()
    for row in range(3):
        for column in range(3):
            y0 = max(0, min(height - side, (2 * row + 1) * height // 6 - side // 2))
            x0 = max(0, min(width - side, (2 * column + 1) * width // 6 - side // 2))
            pixels = slide.read(Box(y0, x0, min(height, y0 + side), min(width, x0 + side)))
            px += pixels.shape[1] * pixels.shape[2]
            raw += pixels.nbytes
            packed += len(codec.encode(np.ascontiguousarray(pixels)))
    return packed / max(1, raw), 2 * (time.thread_time() - started_s) / max(1, px)
