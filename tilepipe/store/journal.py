"""``Journal``: one small record per finished unit, and how they are believed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tilepipe.errors import JournalError, MismatchError
from tilepipe.spec import explain
from tilepipe.store.files import Files
from tilepipe.store.layout import OWN
from tilepipe.store.partial import PARTIAL
from tilepipe.tiling import Grid, Unit

JOURNAL = f"{OWN}/journal"
_IMAGE = "_image"
_LIMIT_BYTES = 64 << 10
"""A record is read back as untrusted input, all of a stage's at once: no more of each. What is
written stays below it, since each part of it is bounded where it is made (test_pipeline_record.py);
the largest are 256 boxes, 256 counts and 20 damaged tiles, some 50 KiB at the very most."""
_STAGE = r"^[a-z][a-z0-9-]{0,39}$"


class Record(BaseModel):
    """One unit that is done; read back as untrusted input."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format: int = Field(default=2, ge=2, le=2)
    stage: str = Field(pattern=_STAGE)
    level: int = Field(ge=0, le=63)
    iy: int = Field(ge=0)
    ix: int = Field(ge=0)
    checksum: str = Field(pattern=r"^[0-9a-f]{16}$")
    fingerprint: str = Field(min_length=1, max_length=200)
    facts: dict[str, Any] = Field(default_factory=dict)


class Journal:
    """The records of the image (``label`` None) or of a label, for one job's fingerprint.

    Records lie at ``tilepipe/journal/LABEL/STAGE/LEVEL/IY.IX.json`` (``_image`` for the image).
    ``level`` is the level of the image or of the label's own pyramid.
    """

    def __init__(
        self, files: Files, label: str | None, fingerprint: str, grid: Callable[[int], Grid]
    ) -> None:
        self.label = label
        self.fingerprint = fingerprint
        self.rejected: list[str] = []
        """Records that were not believed, each with its reason; their units count as not done."""
        self._files = files
        self._grid = grid
        self._folder = f"{JOURNAL}/{label if label is not None else _IMAGE}"

    @property
    def begun(self) -> bool:
        """Whether there is any record, of whatever job."""
        return any(True for _ in self._files.entries(self._folder))

    def recorded(
        self, stage: str, level: int, *, only: Collection[tuple[int, int]] | None = None
    ) -> Mapping[tuple[int, int], Record]:
        """Return the finished units of a stage at a level, by (iy, ix); ``only`` those, if given.

        A torn or forged record counts as not there and is told in ``rejected``.

        Raises MismatchError if a record belongs to another job.
        """
        folder = f"{self._folder}/{stage}/{level}"
        names = None if only is None else {_name(iy, ix) for iy, ix in only}
        keys = [
            f"{folder}/{entry.name}"
            for entry in self._files.entries(folder)
            if not entry.is_folder
            and not entry.name.endswith(PARTIAL)
            and (names is None or entry.name in names)
        ]
        if not keys:
            return {}
        grid = self._grid(level)
        rows, columns = grid.shape
        found: dict[tuple[int, int], Record] = {}
        for key, raw in self._files.get_many(keys, limit_bytes=_LIMIT_BYTES):
            try:
                record = self._believe(key, raw, stage, level)
                if record.iy >= rows or record.ix >= columns:
                    raise JournalError(f"the grid has {rows} x {columns} units")
            except JournalError as error:
                told = f"{key}: {error}"
                if told not in self.rejected:  # seen again where lost files are looked for
                    self.rejected.append(told)
                continue
            if record.fingerprint != self.fingerprint:
                raise MismatchError(self._mismatch(record))
            found[record.iy, record.ix] = record
        return found

    def _believe(self, key: str, raw: bytes, stage: str, level: int) -> Record:
        if not raw:
            raise JournalError("empty or unreadable")
        if len(raw) > _LIMIT_BYTES:
            raise JournalError(f"larger than {_LIMIT_BYTES} bytes")
        try:
            record = Record.model_validate_json(raw)
        except ValidationError as error:
            raise JournalError(explain(error)) from error
        name = key.rsplit("/", 1)[-1]
        if name != _name(record.iy, record.ix) or (record.stage, record.level) != (stage, level):
            raise JournalError("its content is about another unit")
        return record

    def _mismatch(self, record: Record) -> str:
        what = f"label {self.label}" if self.label is not None else "the image"
        return (
            f"{self._files.location}: {what} was begun by another job (fingerprint "
            f"{record.fingerprint[:16]}, this one is {self.fingerprint[:16]}): another model, "
            "weights, plan or input; use --overwrite to begin anew or another --name to keep both"
        )

    def write(
        self,
        stage: str,
        level: int,
        unit: Unit,
        *,
        checksum: str,
        facts: dict[str, Any] | None = None,
    ) -> None:
        """Record that a unit is done; call it when its pixels are safely written.

        Raises JournalError if the record would not be believed when read back.
        """
        try:
            raw = (
                Record(
                    stage=stage,
                    level=level,
                    iy=unit.iy,
                    ix=unit.ix,
                    checksum=checksum,
                    fingerprint=self.fingerprint,
                    facts=facts or {},
                )
                .model_dump_json()
                .encode()
            )
        except (ValidationError, ValueError) as error:
            reason = explain(error) if isinstance(error, ValidationError) else str(error)
            raise JournalError(f"{self._files.location}: a record is wrong: {reason}") from error
        if len(raw) > _LIMIT_BYTES:
            raise JournalError(
                f"{self._files.location}: a record of {len(raw)} bytes; the limit is {_LIMIT_BYTES}"
            )
        self._files.put(f"{self._folder}/{stage}/{level}/{_name(unit.iy, unit.ix)}", raw)

    def forget(self, stage: str | None = None) -> None:
        """Remove the records of a stage, or all: the units count as not done."""
        self._files.delete_tree(f"{self._folder}/{stage}" if stage else self._folder)


def _name(iy: int, ix: int) -> str:
    return f"{iy}.{ix}.json"
