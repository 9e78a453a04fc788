"""``Store``: an OME-Zarr image, its labels, and what tilepipe remembers of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tilepipe.errors import MismatchError, StoreError
from tilepipe.spec import LabelClass
from tilepipe.store.attributes import (
    LabelFacts,
    drop_consolidated,
    names_in,
    ome_attributes,
    ome_of,
    read_attributes,
    read_own,
    write_attributes,
)
from tilepipe.store.explain import explained
from tilepipe.store.files import Files
from tilepipe.store.journal import JOURNAL, Journal
from tilepipe.store.label import Label, create_probabilities, write_record
from tilepipe.store.layout import (
    LABEL_DTYPES,
    LABELS,
    OWN,
    PROBABILITIES,
    TISSUE,
    Version,
    check_label_name,
    create_array,
    downsampled,
    is_safe_name,
    put_own_folder,
)
from tilepipe.store.level import Level
from tilepipe.store.metadata import Place, image_label, multiscales, place_of
from tilepipe.store.placement import whole_step
from tilepipe.store.pyramid import Pyramid
from tilepipe.store.recent import RecentUnits
from tilepipe.tiling import Grid, Shape


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What a store's root says of its image."""

    version: Version
    extent: Shape
    """Level-0 px (y, x)."""
    channels: int
    dtype: np.dtype[Any]
    rgb: bool
    mpp: tuple[float, float] | None
    """µm per level-0 px (y, x)."""
    channel_names: tuple[str, ...]
    pyramid: Pyramid | None
    """None: labels only, the pixels are elsewhere."""
    n_levels: int
    unit_px: int | None
    chunk_px: int
    own: bool
    """Whether tilepipe wrote it."""


class Store:
    """An OME-Zarr image with its labels; made by ``create_store`` or ``open_store``."""

    def __init__(self, files: Files, facts: ImageFacts, *, writable: bool) -> None:
        self.files = files
        self.facts = facts
        self.writable = writable
        self.location: str = files.location
        self.version: Version = facts.version
        self.extent: Shape = facts.extent
        self.channels: int = facts.channels
        self.dtype: np.dtype[Any] = facts.dtype
        self.rgb: bool = facts.rgb
        self.mpp: tuple[float, float] | None = facts.mpp
        self.channel_names: tuple[str, ...] = facts.channel_names
        self.n_levels: int = facts.n_levels
        self.recent: RecentUnits | None = None
        """Units that this process wrote last; set it before any level is opened."""
        self._levels: dict[int, Level] = {}

    def __repr__(self) -> str:
        return f"Store({self.location!r}, version={self.version!r}, extent={self.extent})"

    @property
    def has_image(self) -> bool:
        """Whether the pixels are here; False for a store of labels only."""
        return self.facts.pyramid is not None

    @property
    def own(self) -> bool:
        """Whether tilepipe wrote it; other programs' stores can take labels all the same."""
        return self.facts.own

    @property
    def place(self) -> Place:
        """Where the image lies: what lies over it says so in the same units, from the same origin.

        Viewers lay one over the other by these numbers, and do not convert units.
        """
        pyramid = self.facts.pyramid
        return place_of(self.mpp) if pyramid is None else pyramid.place

    def image(self, level: int) -> Level:
        """Return an image level; StoreError if there is none such or the store has labels only."""
        pyramid = self.facts.pyramid
        if pyramid is None:
            raise StoreError(
                f"{self.location}: holds labels only; the image stayed in its slide, read it there"
            )
        if not 0 <= level < self.n_levels:
            raise StoreError(
                f"{self.location}: no image level {level}; it has 0 to {self.n_levels - 1}"
            )
        if level not in self._levels:
            found = Level(
                self.files,
                pyramid.paths[level],
                index=level,
                downsample=pyramid.downsamples[level],
                axes=pyramid.axes,
                is_label=False,
                unit_px=self.facts.unit_px,
                writable=self.writable and self.own,
                recent=self.recent,
            )
            if (found.channels, found.dtype) != (self.channels, self.dtype) or (
                level == 0 and found.shape != self.extent
            ):
                raise StoreError(
                    f"{self.location}: image level {level} is {found.channels} channels of "
                    f"{found.dtype}, {found.shape[0]} x {found.shape[1]} px, which its metadata "
                    "does not say; it was changed by something else"
                )
            if not self.own:
                step = whole_step(self.extent, found.shape, pyramid.steps[level])
                found.downsample, found.whole = step or found.downsample, step is not None
            self._levels[level] = found
        return self._levels[level]

    def whole_levels(self) -> list[Level]:
        """Return the image levels whose place over the finest one is known, that one first."""
        levels = (self.image(index) for index in range(self.n_levels))
        return [level for level in levels if level.whole]

    def level_shape(self, level: int) -> Shape:
        """Return the extent (y, x) of an image level, also where the store has labels only."""
        if self.has_image:
            return self.image(level).shape
        if not 0 <= level < self.n_levels:
            raise StoreError(f"{self.location}: no level {level} of {self.n_levels}")
        return downsampled(self.extent, level + 1)[-1]

    def _label_attributes(self) -> dict[str, Any]:
        return read_attributes(self.files, LABELS, self.version) or {}

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the labels that are there, read anew each time."""
        listed = names_in(ome_of(self._label_attributes(), self.version).get("labels"))
        return tuple(name for name in listed if is_safe_name(name))

    @property
    def masks(self) -> tuple[str, ...]:
        """Names of the labels that hold classes: what is left out are the objects of another."""
        return tuple(name for name in self.labels if "instances_of" not in self._label_record(name))

    def _label_record(self, name: str) -> dict[str, Any]:
        return read_own(read_attributes(self.files, f"{LABELS}/{name}", self.version) or {})

    def label(self, name: str) -> Label:
        """Return a label; StoreError lists those there are."""
        if name not in self.labels:
            known = ", ".join(self.labels) or "none"
            raise StoreError(f"{self.location}: no label {name!r}; there are: {known}")
        return Label(self, name)

    def create_label(
        self,
        name: str,
        *,
        classes: Sequence[LabelClass],
        level: int = 0,
        unit_px: int,
        dtype: str = "uint8",
        probabilities: bool = False,
        overwrite: bool = False,
    ) -> Label:
        """Create the arrays of a label pyramid over image level ``level`` and up.

        Level ``k`` of the label is half the size of level ``k - 1``, rounded up. It is listed among
        the store's labels only when all of it is there. ``probabilities``: with a pyramid for those
        of its classes.

        Raises StoreError if the name is taken (``overwrite`` replaces it) or no legal name.
        """
        check_label_name(self.location, name)
        if not self.writable:
            raise StoreError(f"{self.location}: opened for reading; open it with writable=True")
        if str(np.dtype(dtype)) not in LABEL_DTYPES:
            raise StoreError(
                f"{self.location}: label {name} of {dtype}; use one of {', '.join(LABEL_DTYPES)}"
            )
        if unit_px < 1:
            raise StoreError(f"{self.location}: a write unit of {unit_px} px; use 1 or more")
        if name in self.labels and not overwrite:
            raise StoreError(
                f"{self.location}: label {name} is there already; use --overwrite or another --name"
            )
        group = f"{LABELS}/{name}"
        self.files.check_inside(group)
        self._forget(name)
        if not self.own:
            put_own_folder(self.files, self.version)
            drop_consolidated(self.files, self.version)
        facts = LabelFacts(
            state="creating", image_level=level, unit_px=unit_px, probabilities=probabilities
        )
        self._write_label(group, {OWN: {"store": facts.model_dump(mode="json")}})
        extents = downsampled(self.level_shape(level), self.n_levels)
        base = self.level_downsample(level)
        with explained(self.location, f"create label {name}"):
            for index, extent in enumerate(extents):
                create_array(
                    self.files,
                    f"{group}/{index}",
                    version=self.version,
                    axes=("y", "x"),
                    shape=extent,
                    dtype=np.dtype(dtype),
                    unit_px=unit_px,
                    chunk_px=self.facts.chunk_px,
                    is_label=True,
                )
        if probabilities:
            create_probabilities(self, name, classes=classes, facts=facts)
        parts = {
            "multiscales": multiscales(
                self.version,
                name=name,
                axes=("y", "x"),
                downsamples=[base << index for index in range(len(extents))],
                place=self.place,
                method="mode",
            ),
            "image-label": image_label(self.version, classes, with_source=self.has_image),
        }
        ready = facts.model_copy(update={"state": "ready"}).model_dump(mode="json")
        self._write_label(group, {**ome_attributes(parts, self.version), OWN: {"store": ready}})
        self._list_labels([*(other for other in self.labels if other != name), name])
        return Label(self, name)

    def remove_label(self, name: str) -> None:
        """Remove a label with its records; nothing happens if there is none such.

        Raises StoreError for a name that is none of a label, or a store opened for reading.
        """
        check_label_name(self.location, name)
        if not self.writable:
            raise StoreError(f"{self.location}: opened for reading; open it with writable=True")
        self.files.check_inside(f"{LABELS}/{name}")
        self._forget(name)

    def level_downsample(self, level: int) -> int:
        """Return the level-0 px per px of an image level, a side.

        Raises StoreError where another program's level is not smaller by a whole number.
        """
        if not self.has_image:
            return 1 << level
        found = self.image(level)
        if not found.whole:
            rows, columns = found.shape
            raise StoreError(
                f"{self.location}: image level {level} of {rows} x {columns} px (y, x) is not the "
                f"image of {self.extent[0]} x {self.extent[1]} px made smaller by a whole number; "
                "what is found on it would be told at wrong places: take another level, or copy "
                "the image first with -o"
            )
        return found.downsample

    def _write_label(self, group: str, attributes: dict[str, Any]) -> None:
        write_attributes(self.files, group, self.version, attributes)

    def _forget(self, name: str) -> None:
        """Remove a label, finished or not: its records first, so that none outlives its pixels."""
        self.files.delete_tree(f"{JOURNAL}/{name}")
        if name in self.labels:
            self._list_labels([other for other in self.labels if other != name])
        self.files.delete(f"{TISSUE}/{name}.png")
        self.files.delete_tree(f"{PROBABILITIES}/{name}")
        self.files.delete_tree(f"{LABELS}/{name}")

    def _list_labels(self, names: Sequence[str]) -> None:
        attributes = self._label_attributes()
        parts = {**ome_of(attributes, self.version), "labels": list(names)}
        parts.pop("version", None) if self.version == "0.5" else None
        merged = {**attributes, **ome_attributes(parts, self.version)}
        write_attributes(self.files, LABELS, self.version, merged)

    def read_record(self) -> dict[str, Any]:
        """Return what the job wrote about itself: spec, versions, input fingerprint, …."""
        own = read_own(read_attributes(self.files, "", self.version) or {})
        return {key: value for key, value in own.items() if key != "store"}

    def write_record(self, record: dict[str, Any]) -> None:
        """Replace the record in one atomic write; ``record`` is JSON without a key ``store``."""
        write_record(self, "", record)

    def journal(self, label: str | None, fingerprint: str) -> Journal:
        """Return the journal of the image (None) or of a label, for one job's fingerprint."""
        if label is not None:
            check_label_name(self.location, label)

        def grid(level: int) -> Grid:
            return (self.image(level) if label is None else self.label(label).level(level)).grid

        return Journal(self.files, label, fingerprint, grid)

    def check_current(self, journal: Journal) -> None:
        """Raise MismatchError unless the image or label of a journal is still of its job.

        A worker may hang with a unit while its job is stopped and another begins the output anew.
        """
        group = "" if journal.label is None else f"{LABELS}/{journal.label}"
        own = read_own(read_attributes(self.files, group, self.version) or {})
        if own.get("fingerprint") != journal.fingerprint:
            what = f"label {journal.label}" if journal.label is not None else "the image"
            raise MismatchError(
                f"{self.location}: {what} was begun anew by another job, or taken away, while this "
                "one was at work; nothing more of it is written"
            )

    def clean_partial(self) -> int:
        """Remove the files that killed writers left unfinished; return how many."""
        return self.files.clean_partial()
