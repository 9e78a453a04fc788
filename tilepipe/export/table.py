"""``write_csv``: a line per object, and the totals of each class."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from tilepipe.export.geojson import class_of
from tilepipe.export.objects import MaskLevel, iter_instances, iter_objects
from tilepipe.export.probability import ProbabilityOf
from tilepipe.export.sink import text_sink
from tilepipe.spec import LabelClass
from tilepipe.steps import Tell, ignore
from tilepipe.tiling import Box, Shape

OBJECT_COLUMNS = (
    "id",
    "class_id",
    "class",
    "area_px",
    "area_um2",
    "centroid_y_px",
    "centroid_x_px",
    "y0_px",
    "x0_px",
    "y1_px",
    "x1_px",
)
PROBABILITY_COLUMN = "mean_probability"
"""The last one, where the probabilities are known."""
TOTAL_COLUMNS = ("class_id", "class", "objects", "area_px", "area_um2", "area_mm2")


def write_csv(
    path: Path,
    level: MaskLevel,
    classes: Sequence[LabelClass],
    *,
    scale: int = 1,
    extent: Shape | None = None,
    um2_per_px: float | None = None,
    only: frozenset[int] | None = None,
    instances: bool = False,
    probability: ProbabilityOf | None = None,
    overwrite: bool = False,
    tell: Tell = ignore,
) -> tuple[int, Path]:
    """Write the objects to ``path`` and the class totals beside it (``NAME.totals.csv``).

    Px are level-0 px (``scale`` of them per px of ``level``); boxes and centroids are cut to the
    slide's ``extent`` (y, x), beyond which the last px of a coarse level reach.
    ``um2_per_px`` is the area of a px of ``level``, None leaves µm² empty. With ``instances`` the
    ``id`` is that of the mask and all are of class 1, "object". ``probability`` tells the pixels'
    and adds a column for its mean. Returns the number of objects and the totals' path.
    """
    totals: dict[int, list[int]] = {}
    factor = scale * scale
    named = None if instances else classes
    count = 0

    def um2(area_px: int) -> str:
        return "" if um2_per_px is None else f"{area_px * um2_per_px:.4f}"

    totals_path = totals_beside(path)
    # Both from the start: what may not be replaced is found before the mask is read.
    with (
        text_sink(path, overwrite=overwrite) as file,
        text_sink(totals_path, overwrite=overwrite) as beside,
    ):
        table = csv.writer(file, lineterminator="\n")
        table.writerow((*OBJECT_COLUMNS, PROBABILITY_COLUMN) if probability else OBJECT_COLUMNS)
        for found in (iter_instances if instances else iter_objects)(
            level, probability=probability, tell=tell
        ):
            if only is not None and found.value not in only:
                continue
            count += 1
            value = 1 if instances else found.value
            name, _ = class_of(value, named)
            y, x = (part * scale for part in found.centroid)
            box = found.box.enlarged(scale)
            if extent is not None:
                y, x = min(y, extent[0]), min(x, extent[1])
                box = box.intersect(Box.of_shape(extent))
            table.writerow(
                (
                    found.value if instances else count,
                    value,
                    name,
                    found.area_px * factor,
                    um2(found.area_px),
                    f"{y:.3f}",
                    f"{x:.3f}",
                    box.y0,
                    box.x0,
                    box.y1,
                    box.x1,
                    *((f"{found.mean_probability:.4f}",) if probability else ()),
                )
            )
            total = totals.setdefault(value, [0, 0])
            total[0] += 1
            total[1] += found.area_px
        table = csv.writer(beside, lineterminator="\n")
        table.writerow(TOTAL_COLUMNS)
        for value in sorted(totals):
            objects, area_px = totals[value]
            name, _ = class_of(value, named)
            mm2 = "" if um2_per_px is None else f"{area_px * um2_per_px / 1e6:.6f}"
            table.writerow((value, name, objects, area_px * factor, um2(area_px), mm2))
    return count, totals_path


def totals_beside(path: Path) -> Path:
    """Return the path of the totals that belong to an object table."""
    name = path.name.removesuffix(".gz").removesuffix(".csv")
    return path.with_name(f"{name}.totals.csv")
