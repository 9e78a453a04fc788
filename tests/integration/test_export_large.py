"""GeoJSON of a mask with 50,000 objects and more: exact, whole, in bounded memory."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from tilepipe.spec import default_classes
from tilepipe.store import create_store, open_store

SIDE = 8448
UNIT = 2048

MEASURE = """
import json, re, resource, sys, time
from tilepipe.export import Result
started = time.perf_counter()
count = Result(sys.argv[1], "cells").to_geojson(sys.argv[2])
seconds = time.perf_counter() - started
# Not ru_maxrss: that begins with the peak of the process this one was forked from.
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024
cpu = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps([count, seconds, cpu.ru_utime + cpu.ru_stime, peak]))
"""


def cells(unit):
    """Discs of two classes on a jittered grid of 33 px, cut where the unit ends."""
    box = unit.box
    mask = np.zeros(box.shape, dtype=np.uint8)
    step = 33
    for gy in range((box.y0 - 40) // step, (box.y1 + 40) // step + 1):
        for gx in range((box.x0 - 40) // step, (box.x1 + 40) // step + 1):
            if not (0 <= gy < SIDE // step and 0 <= gx < SIDE // step):
                continue
            seed = (gy * 73856093) ^ (gx * 19349663)
            cy, cx = gy * step + 2 + seed % 5, gx * step + 2 + seed // 7 % 5
            radius = 5 + seed // 11 % 7
            y0, x0 = max(cy - radius, box.y0), max(cx - radius, box.x0)
            y1, x1 = min(cy + radius + 1, box.y1), min(cx + radius + 1, box.x1)
            if y0 >= y1 or x0 >= x1:
                continue
            yy, xx = np.ogrid[y0 - cy : y1 - cy, x0 - cx : x1 - cx]
            part = mask[y0 - box.y0 : y1 - box.y0, x0 - box.x0 : x1 - box.x0]
            part[yy * yy + xx * xx <= radius * radius] = 1 + seed % 2
    return mask


@pytest.mark.slow
def test_fifty_thousand_objects(tmp_path):
    features = pytest.importorskip("rasterio.features")
    store = create_store(
        str(tmp_path / "large.zarr"),
        channels=1,
        dtype="uint8",
        extent=(SIDE, SIDE),
        mpp=(0.25, 0.25),
        channel_names=("grey",),
        channel_colors=(None,),
        rgb=False,
        unit_px=UNIT,
        with_image=False,
    )
    level = store.create_label("cells", classes=default_classes(3), unit_px=UNIT).level(0)
    for unit in level.grid:
        level.write_unit(unit, cells(unit))
    path = tmp_path / "cells.geojson"
    answer = subprocess.run(
        [sys.executable, "-c", MEASURE, store.location, str(path)],
        check=True,
        capture_output=True,
        text=True,
    )
    count, seconds, cpu_s, peak = json.loads(answer.stdout)
    print(f"{count} objects: {seconds:.1f} s, {cpu_s:.1f} s of CPU, {peak / 1e6:.0f} MB at most")
    assert count >= 50_000
    assert count == (SIDE // 33) ** 2, "discs do not touch: each is one feature"
    assert peak < 1e9
    assert cpu_s < 60

    found = json.loads(path.read_text())["features"]
    across = [
        one
        for one in found
        for xs in [[x for x, _ in one["geometry"]["coordinates"][0]]]
        if min(xs) < UNIT < max(xs)
    ]
    assert len(across) > 50, "objects on unit borders are single features"
    back = features.rasterize(
        ((one["geometry"], one["properties"]["class_id"]) for one in found),
        out_shape=(SIDE, SIDE),
        dtype=np.uint8,
    )
    again = open_store(store.location).label("cells").level(0)
    wrong = sum(
        int(np.count_nonzero(back[unit.box.slices] != again.read(unit.box))) for unit in again.grid
    )
    assert wrong == 0
