"""The CSV beside the weights: one row per validation."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tilepipe.train.validate import KindScore

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


class TrainLog:
    """Rows in memory and on disk; rewritten whole, so that a resumed log has no row twice."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []

    def start(self, step: int) -> None:
        """Keep what an earlier part of this training wrote up to ``step``; else begin anew."""
        self.rows = []
        if step and self.path.is_file():
            with self.path.open(newline="", encoding="utf-8") as file:
                for values in csv.DictReader(file):
                    row = Row(
                        int(values["step"]),
                        float(values["elapsed_s"]),
                        float(values["lr"]),
                        float(values["loss"]),
                        float(values["metric"]),
                        values["scores"],
                    )
                    if row.step <= step:
                        self.rows.append(row)

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
        partial = self.path.with_name(self.path.name + ".partial")
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(FIELDS)
            for row in self.rows:
                writer.writerow([getattr(row, name) for name in FIELDS])
        partial.replace(self.path)
