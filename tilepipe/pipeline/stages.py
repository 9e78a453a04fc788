"""The stages of a job and who needs whom: ingest → reduce, segment → label-reduce, as one graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from tilepipe.pipeline.instances import object_stages
from tilepipe.pipeline.job import (
    FIND,
    GATE,
    INGEST,
    JOIN,
    LABEL_REDUCE,
    OBJECT_REDUCE,
    PAINT,
    REDUCE,
    SEGMENT,
)
from tilepipe.pipeline.kin import Node, children, nothing, parent
from tilepipe.schedule import Stage
from tilepipe.schedule.dag import all_of_it
from tilepipe.tiling import Box, Grid, Shape, TilePlan, Unit


@dataclass(frozen=True, slots=True)
class Layout:
    """Extents and write units of the arrays of a job."""

    image: tuple[Shape, ...]
    """Extents of the image levels; empty when no image is made here."""
    label: tuple[Shape, ...]
    """Extents of the label levels; empty for ingest alone."""
    unit_px: int
    level: int
    """Image level that is segmented."""
    plan: TilePlan | None
    gate: bool = False
    """Two passes: the gate of the whole slide is known before the first mask."""
    band: int = 0
    """Columns of units of the finest level that are gone down together; 0: all."""
    share: Callable[[Box], float] | None = None
    """How much of a box of the level the network is run on, 0 to 1; None: all of any."""
    objects_halo_px: int | None = None
    """Px around a unit that its objects depend on; None: objects are not asked for."""


def build_stages(layout: Layout) -> list[Stage]:
    """Return the stages of a job; their numbers are their places in the list.

    By their ranks units for the device come first: few are handed out at a time, and it must not
    wait for them. Then comes what is nearest to a finished pyramid, so overviews appear early and
    little is in between at any time.
    """
    stages: list[Stage] = []
    image = [Grid(extent, layout.unit_px) for extent in layout.image]
    label = [Grid(extent, layout.unit_px) for extent in layout.label]
    first_label = len(image) + layout.gate
    gate = len(image) if layout.gate else None
    reach = 0
    if layout.plan is not None:
        side = layout.plan.unit_px
        reach = max(layout.plan.halo_px, layout.plan.input_px) + side % max(1, layout.plan.core_px)

    def band(level: int) -> int:
        return max(1, layout.band >> level) if layout.band else 0

    def feeds_segment(grid: Grid) -> Callable[[Unit], Iterable[Node]]:
        def feeds(unit: Unit) -> Iterable[Node]:
            near = grid.touching(unit.box.grow(reach))
            indices = [grid.index(other.iy, other.ix) for other in near]
            for number in range(len(image), first_label + 1):
                yield from ((number, index) for index in indices)

        return feeds

    for level, grid in enumerate(image):
        feeds: list[Callable[[Unit], Iterable[Node]]] = []
        if level + 1 < len(image):
            feeds.append(parent(level + 1, image[level + 1]))
        if label and level == layout.level:
            feeds.append(feeds_segment(label[0]))
        stages.append(
            Stage(
                INGEST if level == 0 else REDUCE,
                level,
                grid,
                rank=0 if level == 0 else 3,
                needs=nothing if level == 0 else children(level - 1, image[level - 1]),
                feeds=_all(feeds),
                root=level == 0,
                band=band(level),
            )
        )
    if not label or layout.plan is None:
        return stages
    plan = layout.plan
    pixels = _under(layout.level, image[layout.level], plan) if image else nothing
    if layout.gate:
        stages.append(
            Stage(
                GATE, 0, label[0], rank=5, needs=pixels,
                on_device=True, root=not image, band=band(layout.level),
            )
        )  # fmt: skip
    after: list[Stage] = []
    if layout.objects_halo_px is not None:
        after, feeds_objects = object_stages(
            label,
            first=first_label + len(label),
            segment=first_label,
            halo_px=layout.objects_halo_px,
        )
    for level, grid in enumerate(label):
        number = first_label + level
        above = [parent(number + 1, label[level + 1])] if level + 1 < len(label) else []
        if after and level == 0:
            above.append(feeds_objects)
        stages.append(
            Stage(
                SEGMENT if level == 0 else LABEL_REDUCE,
                level,
                grid,
                rank=5 if level == 0 else 4,
                needs=pixels if level == 0 else children(number - 1, label[level - 1]),
                feeds=_all(above),
                after=gate if level == 0 else None,
                on_device=level == 0,
                share=all_of_it if layout.share is None else _share_of(layout.share),
                root=level == 0 and not image and not layout.gate,
                band=band(layout.level + level),
            )
        )
    return stages + after


def _share_of(share: Callable[[Box], float]) -> Callable[[Unit], float]:
    return lambda unit: share(unit.box)


def _all(parts: Sequence[Callable[[Unit], Iterable[Node]]]) -> Callable[[Unit], Iterable[Node]]:
    def nodes(unit: Unit) -> Iterable[Node]:
        for part in parts:
            yield from part(unit)

    return nodes


def _under(number: int, grid: Grid, plan: TilePlan) -> Callable[[Unit], Iterable[Node]]:
    """The image units that the tiles of a label unit read."""

    def under(unit: Unit) -> Iterable[Node]:
        box: Box = plan.footprint(unit.box)
        for near in grid.touching(box):
            yield number, grid.index(near.iy, near.ix)

    return under


_STAGE_WORDS = {INGEST: "ingest", REDUCE: "image pyramid", GATE: "gate", SEGMENT: "segment",
                LABEL_REDUCE: "mask pyramid", FIND: "find objects", JOIN: "join objects",
                PAINT: "instances", OBJECT_REDUCE: "instance pyramid"}  # fmt: skip


def stage_word(stage: Stage) -> str:
    """Name a stage as the user sees it; all levels of a pyramid have one word."""
    return _STAGE_WORDS[stage.name]
