"""The CSV beside the weights: one row per validation."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tilepipe.errors import TrainError
from tilepipe.models.checkpoint import taking_the_name_of
from tilepipe.train.validate import KindScore

_LONGEST_FIELD = 1 << 28
"""Scores of thousands of kinds are longer than a field may be that Python reads of itself."""
FIELDS = ("step", "elapsed_s", "lr", "loss", "metric", "scores")


@dataclass(frozen=True, slots=True)
class Row:
    """One validation."""

    step: int
    elapsed_s: float
    lr: float
    loss: float
    """Mean since the last row."""
    metric: float
    scores: str
    """``kind dice f1`` of each kind, separated by ``;``."""


def _row(values: dict[str, str]) -> Row:
    if None in values.values():
        raise ValueError("a row is too short")
    return Row(
        int(values["step"]),
        float(values["elapsed_s"]),
        float(values["lr"]),
        float(values["loss"]),
        float(values["metric"]),
        values["scores"],
    )


@contextmanager
def _long_fields() -> Iterator[None]:
    before = csv.field_size_limit(_LONGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)


class TrainLog:
    """Rows in memory and on disk; rewritten whole, so that a resumed log has no row twice."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []

    def start(self, step: int) -> None:
        """Keep what an earlier part of this training wrote up to ``step``; else begin anew.

        Raises TrainError if that cannot be read.
        """
        self.rows = []
        if not step or not self.path.is_file():
            return
        try:
            with self.path.open(newline="", encoding="utf-8") as file, _long_fields():
                rows = [_row(values) for values in csv.DictReader(file)]
        except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
            raise TrainError(
                f"{self.path}: not the log of a training ({error!r}); move it away and resume: "
                "the weights do not need it"
            ) from error
        self.rows = [row for row in rows if row.step <= step]

    def add(
        self,
        step: int,
        elapsed_s: float,
        lr: float,
        loss: float,
        metric: float,
        scores: Sequence[KindScore],
    ) -> None:
        """Add a row (replacing one of the same step) and write the file."""
        text = "; ".join(
            f"{score.kind or 'all'} {score.dice:.4f}"
            + ("" if score.f1 is None else f" {score.f1:.4f}")
            for score in scores
        )
        self.rows = [row for row in self.rows if row.step < step]
        self.rows.append(Row(step, round(elapsed_s, 1), lr, loss, metric, text))
        with (
            taking_the_name_of(self.path) as partial,
            partial.open("w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.writer(file)
            writer.writerow(FIELDS)
            for row in self.rows:
                writer.writerow([getattr(row, name) for name in FIELDS])
