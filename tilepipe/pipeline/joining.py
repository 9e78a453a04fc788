"""``join_cells``: objects numbered over the whole image, from what units tell of their edges.

What units tell lies in small files of the store, one a unit: open objects with their areas, ids
along the sides, first pixels. Joining holds one number or two per object and one row of sides.
Ids are given in reading order of an object's first pixel: they do not depend on the units.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from tilepipe.errors import StoreError
from tilepipe.pipeline.cells import Cells, Ids, Ints, Rule, edge_boxes
from tilepipe.tiling import Grid, Unit

_MOST = np.iinfo(np.int32).max
_HEAD = struct.Struct("<4sIIII")
_MAGIC = b"tpo1"


@dataclass(frozen=True, slots=True)
class Numbers:
    """The final ids of a unit's objects."""

    opened: Ids
    """(n,) of the open objects; 0: dropped."""
    blobs: Ids
    """(m,) of the open blobs; -1: the blob holds objects and is none itself."""
    closed: Ids
    """(c,)"""

    def paint(self, cells: Cells) -> Ids:
        """Return the (y, x) final ids of a unit."""
        ids = np.concatenate([[0], self.opened, self.closed]).astype(np.int32)[cells.ids]
        if self.blobs.size:
            own = np.concatenate([[-1], self.blobs]).astype(np.int32)[cells.blobs]
            ids = np.where(own >= 0, own, ids)
        return ids

    def fits(self, cells: Cells) -> bool:
        """Tell whether these are the numbers of such objects."""
        return (len(self.opened), len(self.blobs), len(self.closed)) == (
            len(cells.areas), len(cells.blob_areas), len(cells.closed)
        )  # fmt: skip


def pack_cells(cells: Cells) -> bytes:
    """Write what other units and the join must know of a unit; its pixels are left out."""
    head = _HEAD.pack(
        _MAGIC, len(cells.areas), len(cells.blob_areas), len(cells.doubtful), len(cells.closed)
    )
    parts: list[NDArray[np.generic]] = [
        cells.areas, cells.firsts, cells.blob_areas, cells.blob_firsts,
        cells.doubtful, cells.closed, cells.blob_seeded.astype(np.uint8), *cells.edges,
    ]  # fmt: skip
    return _seal(head + b"".join(np.ascontiguousarray(part).tobytes() for part in parts))


def unpack_cells(raw: bytes, unit: Unit, extent: tuple[int, int], rule: Rule) -> Cells:
    """Read what ``pack_cells`` wrote; StoreError if it is damaged or of another unit."""
    shapes = [s.shape for s in edge_boxes(unit.box, extent, rule.halo_px).values()] * rule.layers
    edge_px = sum(prod(shape) for shape in shapes)
    # At most one region a pixel; each of the tables has a few numbers per region.
    data = _unseal(raw, _HEAD.size + 4 * edge_px + 80 * (unit.box.area + edge_px))
    magic, n, m, d, c = _HEAD.unpack_from(data.ljust(_HEAD.size, b"\0"))
    counts = [n, n, m, m, 4 * d, c]
    size = _HEAD.size + 8 * sum(counts) + m + 4 * edge_px
    if magic != _MAGIC or len(data) != size:
        raise StoreError("is not what a unit tells of its objects")
    place = _HEAD.size
    tables: list[Ints] = []
    for count in counts:
        tables.append(np.frombuffer(data, "<i8", count, place).astype(np.int64))
        place += 8 * count
    areas, firsts, blob_areas, blob_firsts, doubtful, closed = tables
    seeded = np.frombuffer(data, np.uint8, m, place) != 0
    place += m
    edges = []
    for number, shape in enumerate(shapes):
        edge = np.frombuffer(data, "<i4", prod(shape), place).astype(np.int32).reshape(shape)
        place += 4 * prod(shape)
        highest = n if number < len(shapes) // rule.layers else m
        if edge.size and not 0 <= int(edge.min()) <= int(edge.max()) <= highest:
            raise StoreError("names objects that it does not hold")
        edges.append(edge)
    doubtful = doubtful.reshape(-1, 4)
    if d and not (
        int(doubtful[:, :2].min()) >= 1
        and int(doubtful[:, 0].max()) <= m
        and int(doubtful[:, 1].max()) <= n
    ):
        raise StoreError("names objects that it does not hold")
    nothing = np.zeros((0, 0), np.int32)
    return Cells(
        nothing, nothing, areas, firsts, blob_areas, blob_firsts, seeded, doubtful, closed,
        tuple(edges),
    )  # fmt: skip


def pack_numbers(numbers: Numbers) -> bytes:
    """Write the final ids of a unit's objects."""
    head = _HEAD.pack(_MAGIC, len(numbers.opened), len(numbers.blobs), 0, len(numbers.closed))
    return _seal(
        head + b"".join(p.astype("<i4").tobytes()
                        for p in (numbers.opened, numbers.blobs, numbers.closed))
    )  # fmt: skip


def unpack_numbers(raw: bytes, cells: Cells) -> Numbers:
    """Read what ``pack_numbers`` wrote; StoreError if it is damaged or not about ``cells``."""
    counts = len(cells.areas), len(cells.blob_areas), len(cells.closed)
    data = _unseal(raw, _HEAD.size + 4 * sum(counts))
    if data[: _HEAD.size] != _HEAD.pack(_MAGIC, counts[0], counts[1], 0, counts[2]):
        raise StoreError("is about other objects")
    values = np.frombuffer(data, "<i4", offset=_HEAD.size).astype(np.int32)
    if len(values) != sum(counts):
        raise StoreError("is cut off")
    first, second = counts[0], counts[0] + counts[1]
    return Numbers(values[:first], values[first:second], values[second:])


def _seal(data: bytes) -> bytes:
    packed = zlib.compress(data, 1)
    return hashlib.sha256(packed).digest()[:16] + packed


def _unseal(raw: bytes, most_bytes: int) -> bytes:
    """Unpack within bounds: the file is input like any other."""
    if hashlib.sha256(raw[16:]).digest()[:16] != raw[:16]:
        raise StoreError("is damaged")
    try:
        data = zlib.decompressobj().decompress(raw[16:], most_bytes + 1)
    except zlib.error as error:
        raise StoreError(f"is damaged: {error}") from error
    if len(data) > most_bytes:
        raise StoreError("is larger than the unit it is about can make it")
    return data


class _Sets:
    """Regions of one layer, and which of them are one."""

    def __init__(self) -> None:
        self.count = 0
        self._pairs: list[Ints] = []

    def add(self, count: int) -> int:
        """Take in the regions of a unit; return the number before its first."""
        base = self.count
        self.count += count
        return base

    def join(self, here: Ids, base: int, there: Ids, other: int) -> None:
        """Note that two units see the same pixels."""
        both = (here > 0) & (there > 0)
        if both.any():
            pairs = np.stack([here[both] + (base - 1), there[both] + (other - 1)], axis=1)
            self._pairs.append(np.unique(pairs.astype(np.int64), axis=0))

    def components(self) -> tuple[int, NDArray[np.int64]]:
        """Return how many regions there are in the end, and which one each is part of."""
        if not self.count:
            return 0, np.zeros(0, np.int64)
        from scipy.sparse import coo_matrix  # not at the start: few jobs ask for objects
        from scipy.sparse.csgraph import connected_components

        pairs = np.concatenate(self._pairs) if self._pairs else np.zeros((0, 2), np.int64)
        graph = coo_matrix(
            (np.ones(len(pairs), np.int8), (pairs[:, 0], pairs[:, 1])),
            shape=(self.count, self.count),
        )
        n, parts = connected_components(graph, directed=False)
        return int(n), parts.astype(np.int64)


def join_cells(
    grid: Grid, load: Callable[[Unit], Cells], rule: Rule
) -> tuple[int, Iterator[tuple[Unit, Numbers]]]:
    """Number the objects of all units: how many there are, and each unit's share of them.

    ``load`` is called once per unit, in reading order.
    Raises StoreError for more objects than int32 can number.
    """
    sets = (_Sets(), _Sets())
    spans: list[tuple[int, int, int, int, int]] = []
    tables: list[list[Ints]] = [[] for _ in range(5)]
    seeded: list[NDArray[np.bool_]] = []
    doubts: list[Ints] = []
    above: dict[int, tuple[tuple[Ids, ...], tuple[int, int]]] = {}
    left: tuple[tuple[Ids, ...], tuple[int, int]] = ((), (0, 0))
    for unit in grid:
        cells = load(unit)
        bases = sets[0].add(len(cells.areas)), sets[1].add(len(cells.blob_areas))
        spans.append((*bases, len(cells.areas), len(cells.blob_areas), len(cells.closed)))
        for table, values in zip(
            tables,
            (cells.areas, cells.firsts, cells.blob_areas, cells.blob_firsts, cells.closed),
            strict=True,
        ):
            table.append(values)
        seeded.append(cells.blob_seeded)
        doubts.append(cells.doubtful + np.array([bases[1] - 1, bases[0] - 1, 0, 0]))
        sides = list(edge_boxes(unit.box, grid.extent, rule.halo_px))
        named = {side: cells.edges[number :: len(sides)] for number, side in enumerate(sides)}
        for layer in range(rule.layers):
            if "north" in named:
                there, theirs = above[unit.ix]
                sets[layer].join(named["north"][layer], bases[layer], there[layer], theirs[layer])
            if "west" in named:
                there, theirs = left
                sets[layer].join(named["west"][layer], bases[layer], there[layer], theirs[layer])
        above[unit.ix] = named.get("south", ()), bases
        left = named.get("east", ()), bases
    areas, firsts, blob_areas, blob_firsts, closed = (np.concatenate(table) for table in tables)
    n, part = sets[0].components()
    m, blob_part = sets[1].components()
    area, first = _sum(n, part, areas), _least(n, part, firsts)
    blob_area, blob_first = _sum(m, blob_part, blob_areas), _least(m, blob_part, blob_firsts)
    holds = np.zeros(m, np.bool_)
    np.logical_or.at(holds, blob_part, np.concatenate(seeded))
    doubt = np.concatenate(doubts)
    if len(doubt):
        doubt = doubt[holds[blob_part[doubt[:, 0]]]]
        np.add.at(area, part[doubt[:, 1]], doubt[:, 2])
        np.minimum.at(first, part[doubt[:, 1]], doubt[:, 3])
    kept = area >= rule.least_px
    alone = ~holds & (blob_area >= rule.least_px)
    places = np.concatenate([first[kept], blob_first[alone], closed])
    if len(places) > _MOST:
        raise StoreError(f"{len(places)} objects are more than int32 ids can number")
    ids = np.empty(len(places), np.int32)
    ids[np.argsort(places, kind="stable")] = np.arange(1, len(places) + 1, dtype=np.int32)
    n_kept, n_alone = int(kept.sum()), int(alone.sum())
    final = np.zeros(n, np.int32)
    final[kept] = ids[:n_kept]
    blob_final = np.where(holds, np.int32(-1), np.int32(0))
    blob_final[alone] = ids[n_kept : n_kept + n_alone]

    def shares() -> Iterator[tuple[Unit, Numbers]]:
        start = n_kept + n_alone
        for unit, (base, blob_base, opened, blobs, shut) in zip(grid, spans, strict=True):
            yield (
                unit,
                Numbers(
                    final[part[base : base + opened]],
                    blob_final[blob_part[blob_base : blob_base + blobs]],
                    ids[start : start + shut],
                ),
            )
            start += shut

    return len(places), shares()


def _sum(count: int, part: Ints, values: Ints) -> Ints:
    total = np.zeros(count, np.int64)
    np.add.at(total, part, values)
    return total


def _least(count: int, part: Ints, values: Ints) -> Ints:
    least = np.full(count, np.iinfo(np.int64).max)
    np.minimum.at(least, part, values)
    return least
