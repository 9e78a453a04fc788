"""``Label``: one label of a store, a pyramid of class ids; ``Probabilities``: those beside it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from tilepipe.errors import StoreError
from tilepipe.spec import LabelClass
from tilepipe.store.attributes import (
    LabelFacts,
    find_version,
    ome_attributes,
    ome_of,
    read_attributes,
    read_label_facts,
    read_own,
    update_attributes,
    write_attributes,
)
from tilepipe.store.explain import explained
from tilepipe.store.layout import LABELS, OWN, PROBABILITIES, create_array, downsampled
from tilepipe.store.level import Level
from tilepipe.store.metadata import multiscales, omero
from tilepipe.store.placement import factor_over, whole_step
from tilepipe.store.pyramid import Pyramid, read_classes, read_pyramid

if TYPE_CHECKING:
    from tilepipe.store.store import Store


class Beside:
    """A pyramid beside the image, over its level ``image_level`` and up, in a group of its own."""

    def __init__(
        self,
        store: Store,
        group: str,
        attributes: dict[str, Any] | None,
        *,
        what: str,
        is_label: bool,
        facts: LabelFacts | None,
    ) -> None:
        self.what = what
        """What it is, as messages name it."""
        self._store = store
        self._group = group
        self._is_label = is_label
        self._facts = facts
        if attributes is None:
            raise StoreError(
                f"{store.location}: {what}: listed but missing; restore it, or make it again with "
                "--overwrite"
            )
        self._ome = ome_of(attributes, store.version)
        pyramid = read_pyramid(f"{store.location} {what}", self._ome)
        if pyramid is None:
            raise StoreError(f"{store.location} {what}: has no multiscales metadata")
        self._pyramid: Pyramid = pyramid
        self.n_levels: int = len(pyramid.paths)
        self.image_level: int = facts.image_level if facts else 0
        self._levels: dict[int, Level] = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.what!r}, {self._store!r})"

    @property
    def own(self) -> bool:
        """Whether tilepipe created it."""
        return self._facts is not None

    def level(self, index: int) -> Level:
        """Return a level of its own pyramid; 0 is finest."""
        if not 0 <= index < self.n_levels:
            raise StoreError(
                f"{self._store.location}: {self.what} has no level {index}; it has 0 to "
                f"{self.n_levels - 1}"
            )
        if index not in self._levels:
            found = self._open(index, factor=self._factor or 1)
            if index and self._facts is None:
                step = whole_step(self.level(0).shape, found.shape, self._pyramid.steps[index])
                found.whole = step is not None
                found.downsample = (self._factor or 1) * (step or self._pyramid.downsamples[index])
            self._levels[index] = found
        return self._levels[index]

    def whole_levels(self) -> list[Level]:
        """Return the levels whose place over the finest one is known, that one first."""
        levels = (self.level(index) for index in range(self.n_levels))
        return [level for level in levels if level.whole]

    def _open(self, index: int, *, factor: int) -> Level:
        return Level(
            self._store.files,
            f"{self._group}/{self._pyramid.paths[index]}",
            index=index,
            downsample=factor * self._pyramid.downsamples[index],
            axes=self._pyramid.axes,
            is_label=self._is_label,
            unit_px=self._facts.unit_px if self._facts else None,
            writable=self._store.writable and self._facts is not None,
            recent=self._store.recent,
        )

    @cached_property
    def _factor(self) -> int | None:
        """Level-0 px of the image per px of the finest level; None where it lies otherwise."""
        if self._facts is not None:
            return self._store.level_downsample(self.image_level)
        shape = self._open(0, factor=1).shape
        return factor_over(self._store.extent, self._store.facts.pyramid, self._pyramid, shape)

    def check_placed(self) -> None:
        """Raise StoreError if it does not lie over the image as its levels do, whole."""
        if self._factor is None:
            (height, width), (rows, columns) = self._store.extent, self.level(0).shape
            raise StoreError(
                f"{self._store.location}: {self.what} of {rows} x {columns} px (y, x) does not "
                f"cover the image of {height} x {width} px, or not with pixels of a whole number "
                "of its pixels: where it lies there is not known; write it anew over the whole "
                "image"
            )


class Label(Beside):
    """One label of a store: a pyramid of class ids (y, x)."""

    def __init__(self, store: Store, name: str) -> None:
        self.name = name
        group = f"{LABELS}/{name}"
        found = read_attributes(store.files, group, store.version)
        facts = read_label_facts(store.files, name, found or {})
        super().__init__(store, group, found, what=f"label {name}", is_label=True, facts=facts)
        self.classes: tuple[LabelClass, ...] = read_classes(self._ome)
        self._probabilities: Probabilities | None = None

    def __repr__(self) -> str:
        return f"Label({self.name!r}, {self._store!r})"

    @property
    def probabilities(self) -> Probabilities | None:
        """The probabilities of its foreground classes, None if it was made without them."""
        if self._probabilities is None and self._facts is not None and self._facts.probabilities:
            self._probabilities = Probabilities(self._store, self, self._facts)
        return self._probabilities

    def read_record(self) -> dict[str, Any]:
        """Return what the job wrote about this label: plan, model, settings, state, ...."""
        own = read_own(read_attributes(self._store.files, self._group, self._store.version) or {})
        return {key: value for key, value in own.items() if key != "store"}

    def write_record(self, record: dict[str, Any]) -> None:
        """Replace the record in one atomic write; ``record`` is JSON without a key ``store``."""
        write_record(self._store, self._group, record)


class Probabilities(Beside):
    """Probabilities of a label's foreground classes: a pyramid of bytes (classes - 1, y, x).

    Channel ``k`` is class ``k + 1``; 255 is a probability of 1. The levels have the label's shapes
    and units; what the job records of a unit of the label holds for its unit here too.
    """

    def __init__(self, store: Store, label: Label, facts: LabelFacts) -> None:
        group = f"{PROBABILITIES}/{label.name}"
        super().__init__(
            store,
            group,
            read_attributes(store.files, group, store.version),
            what=f"probabilities of label {label.name}",
            is_label=False,
            facts=facts,
        )
        self.classes: tuple[LabelClass, ...] = label.classes[1:]


def create_probabilities(
    store: Store, name: str, *, classes: Sequence[LabelClass], facts: LabelFacts
) -> None:
    """Create the arrays for the probabilities of label ``name``, an OME-Zarr image of their own."""
    group = f"{PROBABILITIES}/{name}"
    store.files.check_inside(group)
    if len(classes) < 2:
        raise StoreError(
            f"{store.location}: label {name} has no class but the background, so no probabilities"
        )
    if find_version(store.files, PROBABILITIES) is None:
        write_attributes(store.files, PROBABILITIES, store.version, {})
    extents = downsampled(store.level_shape(facts.image_level), store.n_levels)
    base = store.level_downsample(facts.image_level)
    with explained(store.location, f"create the probabilities of label {name}"):
        for index, extent in enumerate(extents):
            create_array(
                store.files,
                f"{group}/{index}",
                version=store.version,
                axes=("c", "y", "x"),
                shape=(len(classes) - 1, *extent),
                dtype=np.dtype(np.uint8),
                unit_px=facts.unit_px,
                chunk_px=store.facts.chunk_px,
                is_label=False,
            )
    parts = {
        "multiscales": multiscales(
            store.version,
            name=name,
            axes=("c", "y", "x"),
            downsamples=[base << index for index in range(len(extents))],
            place=store.place,
            method="mean",
        ),
        "omero": omero(
            names=[one.name for one in classes[1:]],
            colors=["{:02x}{:02x}{:02x}".format(*one.color[:3]) for one in classes[1:]],
            dtype=np.dtype(np.uint8),
            rgb=False,
        ),
    }
    write_attributes(store.files, group, store.version, ome_attributes(parts, store.version))


def write_record(store: Store, group: str, record: dict[str, Any]) -> None:
    """Replace the record of a group, keeping what it remembers of its layout."""
    if not store.writable:
        raise StoreError(f"{store.location}: opened for reading; open it with writable=True")
    if "store" in record:
        raise StoreError(f"{store.location}: a record's key `store` is the store's own")
    attributes = read_attributes(store.files, group, store.version)
    if attributes is None:  # written all the same, it would be no store, and in a new one's way
        raise StoreError(
            f"{store.location}: {group or 'the store'} was taken away while it was worked on; "
            "give the same command again"
        )
    own = read_own(attributes)
    layout = {"store": own["store"]} if "store" in own else {}
    update_attributes(store.files, group, store.version, {OWN: {**record, **layout}})
