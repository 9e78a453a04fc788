"""``Label``: one label of a store, a pyramid of class ids."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tilepipe.errors import StoreError
from tilepipe.spec import LabelClass
from tilepipe.store.attributes import (
    ome_of,
    read_attributes,
    read_label_facts,
    read_own,
    update_attributes,
)
from tilepipe.store.layout import LABELS, OWN
from tilepipe.store.level import Level
from tilepipe.store.metadata import read_classes, read_pyramid

if TYPE_CHECKING:
    from tilepipe.store.store import Store


class Label:
    """One label of a store: a pyramid of class ids (y, x)."""

    def __init__(self, store: Store, name: str) -> None:
        self.name = name
        self._store = store
        self._group = f"{LABELS}/{name}"
        location = f"{store.location} label {name}"
        attributes = read_attributes(store.files, self._group, store.version)
        if attributes is None:
            raise StoreError(f"{location}: is listed but missing")
        ome = ome_of(attributes, store.version)
        self._facts = read_label_facts(store.files, name, attributes)
        pyramid = read_pyramid(location, ome)
        if pyramid is None:
            raise StoreError(f"{location}: has no multiscales metadata")
        self._pyramid = pyramid
        self.classes: tuple[LabelClass, ...] = read_classes(ome)
        self.n_levels: int = len(pyramid.paths)
        self.image_level: int = self._facts.image_level if self._facts else 0
        self._levels: dict[int, Level] = {}

    def __repr__(self) -> str:
        return f"Label({self.name!r}, {self._store!r})"

    @property
    def own(self) -> bool:
        """Whether tilepipe created it."""
        return self._facts is not None

    def level(self, index: int) -> Level:
        """Return a level of the label's own pyramid; 0 is finest."""
        if not 0 <= index < self.n_levels:
            raise StoreError(
                f"{self._store.location}: label {self.name} has no level {index}; it has 0 to "
                f"{self.n_levels - 1}"
            )
        if index not in self._levels:
            base = self._store.level_downsample(self.image_level) if self._facts else 1
            self._levels[index] = Level(
                self._store.files,
                f"{self._group}/{self._pyramid.paths[index]}",
                index=index,
                downsample=base * self._pyramid.downsamples[index],
                axes=self._pyramid.axes,
                is_label=True,
                unit_px=self._facts.unit_px if self._facts else None,
                writable=self._store.writable and self._facts is not None,
                recent=self._store.recent,
            )
        return self._levels[index]

    def read_record(self) -> dict[str, Any]:
        """Return what the job wrote about this label: plan, model, settings, state, ...."""
        own = read_own(read_attributes(self._store.files, self._group, self._store.version) or {})
        return {key: value for key, value in own.items() if key != "store"}

    def write_record(self, record: dict[str, Any]) -> None:
        """Replace the record in one atomic write; ``record`` is JSON without a key ``store``."""
        write_record(self._store, self._group, record)


def write_record(store: Store, group: str, record: dict[str, Any]) -> None:
    """Replace the record of a group, keeping what it remembers of its layout."""
    if not store.writable:
        raise StoreError(f"{store.location}: opened for reading; open it with writable=True")
    if "store" in record:
        raise StoreError(f"{store.location}: a record's key `store` is the store's own")
    own = read_own(read_attributes(store.files, group, store.version) or {})
    layout = {"store": own["store"]} if "store" in own else {}
    update_attributes(store.files, group, store.version, {OWN: {**record, **layout}})
