"""The pure parts: tilings, ratios, differing pixels and the table. No torch, no files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

MARGIN_PX, LEAST_PX, STEP_PX = 92, 188, 16
"""Of the valid U-Net: px that it takes off each side, legal input sides."""
SMALLEST_TUNED_PX = 640
GROUPS = ("as run", "tuned")
Speed = Literal["cold", "steady"]
SPEEDS: tuple[Speed, ...] = ("cold", "steady")


@dataclass(frozen=True, slots=True)
class Row:
    """One run, or the reason why there is none."""

    who: str
    setting: str
    group: str = ""
    """"tilepipe", "as run", "tuned", or empty: outside the summary."""
    state: str = "ok"
    """ok, not installed, failed."""
    reason: str = ""
    px: int = 0
    """Of the mask."""
    wall_s: float | None = None
    """From the process's start to its end: slide on disk to mask on disk."""
    work_s: float | None = None
    """Of that, as the program itself says: without imports and loading the network."""
    peak_bytes: int | None = None
    """Resident memory of the process and its children, at its highest."""
    differing_px: int | None = None
    """Px whose class is not that of the whole image in float32."""
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def cold(self) -> float | None:
        """MPix/s of the whole process."""
        return _rate(self.px, self.wall_s)

    @property
    def steady(self) -> float | None:
        """MPix/s without imports and loading."""
        return _rate(self.px, self.work_s)

    @property
    def differing(self) -> float | None:
        """Share of px that differ, 0 to 1."""
        return None if self.differing_px is None or not self.px else self.differing_px / self.px

    def to_json(self) -> dict[str, Any]:
        """Return plain values, the rates among them."""
        rates = {"cold_mpix_per_s": self.cold, "steady_mpix_per_s": self.steady}
        return {**asdict(self), **rates, "differing": self.differing}


def _rate(px: int, seconds: float | None) -> float | None:
    return None if not seconds else px / seconds / 1e6


def ratio(ours: float | None, theirs: float | None) -> float | None:
    """Return how many times as fast we are, or None where one is unknown."""
    return None if ours is None or not theirs else ours / theirs


def count_differing(
    read_a: Callable[[int, int], NDArray[Any]],
    read_b: Callable[[int, int], NDArray[Any]],
    shape: tuple[int, int],
    *,
    rows: int = 1024,
) -> int:
    """Count px whose classes differ; masks are read as bands of rows [start, stop).

    Raises ValueError where a band has another shape than its mask should have.
    """
    found = 0
    for y0 in range(0, shape[0], rows):
        y1 = min(y0 + rows, shape[0])
        bands = [np.asarray(read(y0, y1)) for read in (read_a, read_b)]
        for band in bands:
            if band.shape != (y1 - y0, shape[1]):
                raise ValueError(
                    f"rows {y0} to {y1} of a mask are {band.shape}; want {(y1 - y0, shape[1])}"
                )
        found += int(np.count_nonzero(bands[0] != bands[1]))
    return found


def balanced_tiling(shape: tuple[int, int], largest_px: int) -> tuple[int, int]:
    """Return (input side, stride) of least work for an image of ``shape`` (y, x) px.

    The stride is a multiple of the pooling, the input legal and at most ``largest_px`` (or the
    smallest that serves). Among equal work, the larger tile.

    >>> balanced_tiling((8192, 8192), 1340)
    (1212, 1024)
    """
    largest = max(SMALLEST_TUNED_PX, largest_px - 2 * MARGIN_PX)
    strides = range(SMALLEST_TUNED_PX, largest // STEP_PX * STEP_PX + 1, STEP_PX)

    def cost(stride: int) -> tuple[int, int]:
        tiles = -(-shape[0] // stride) * -(-shape[1] // stride)
        return tiles * legal_input(stride) ** 2, -stride

    stride = min(strides, key=cost)
    return legal_input(stride), stride


def legal_input(stride_px: int) -> int:
    """Return the smallest legal input side whose output covers a stride."""
    wanted = max(LEAST_PX, stride_px + 2 * MARGIN_PX)
    return LEAST_PX + -(-(wanted - LEAST_PX) // STEP_PX) * STEP_PX


def best(rows: Iterable[Row], group: str, speed: Speed) -> Row | None:
    """Return the fastest row of a group, or None if none ran."""
    known = [row for row in rows if row.group == group and _speed(row, speed)]
    return max(known, key=lambda row: _speed(row, speed) or 0.0, default=None)


def _speed(row: Row | None, speed: Speed) -> float | None:
    return None if row is None else row.cold if speed == "cold" else row.steady


def summary(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Ratios of every tilepipe row to the best alternative of each group, at either speed."""
    found = []
    for ours in rows:
        if ours.group != "tilepipe" or ours.state != "ok":
            continue
        entry: dict[str, Any] = {"ours": ours.setting}
        for group in GROUPS:
            for speed in SPEEDS:
                theirs = _speed(best(rows, group, speed), speed)
                entry[f"{group}, {speed}"] = ratio(_speed(ours, speed), theirs)
        found.append(entry)
    return found


HEAD = ("program", "setting", "wall s", "cold", "steady", "ratio", "ratio", "peak GB", "differs")
UNDER = ("", "", "", "MPix/s", "MPix/s", "cold", "steady", "", "from exact")


def table(rows: Sequence[Row]) -> str:
    """Return the rows as aligned text; ratios are to the first tilepipe row."""
    ours = next((row for row in rows if row.group == "tilepipe" and row.state == "ok"), None)
    lines: list[Sequence[str]] = [HEAD, UNDER]
    notes = []
    for row in rows:
        if row.state != "ok":
            lines.append((row.who, row.setting, row.state, *[""] * 6))
            notes.append(f"{row.who}, {row.setting}: {row.state}: {row.reason}")
            continue
        lines.append((
            row.who,
            row.setting,
            _shown(row.wall_s, ".1f"),
            _shown(row.cold, ".2f"),
            _shown(row.steady, ".2f"),
            _shown(ratio(ours.cold, row.cold) if ours else None, ".2f"),
            _shown(ratio(ours.steady, row.steady) if ours else None, ".2f"),
            _shown(None if row.peak_bytes is None else row.peak_bytes / 1e9, ".2f"),
            share_text(row.differing_px, row.px),
        ))  # fmt: skip
    return "\n".join([*_aligned(lines, heads=2), "", *_verdict(rows), *notes])


def _verdict(rows: Sequence[Row]) -> list[str]:
    """The rivals by name, and how many times as fast each tilepipe row is."""
    text = []
    for group in GROUPS:
        for speed in SPEEDS:
            rival = best(rows, group, speed)
            if rival is not None:
                rate = _shown(_speed(rival, speed), ".2f")
                text.append(f"best {group}, {speed}: {rival.who}, {rate} MPix/s")
    keys = [f"{group}, {speed}" for group in GROUPS for speed in SPEEDS]
    lines = [("tilepipe", *(f"x best {key}" for key in keys))]
    lines += [
        (entry["ours"], *(_shown(entry[key], ".2f") for key in keys)) for entry in summary(rows)
    ]
    return [*text, "", *_aligned(lines, left=1)] if text else text


def _aligned(lines: Sequence[Sequence[str]], *, heads: int = 1, left: int = 2) -> list[str]:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    text.insert(heads, "-" * max(len(line) for line in text))
    return text


def share_text(differing_px: int | None, px: int) -> str:
    """Return a share in %, with "0" only for none at all."""
    if differing_px is None or not px:
        return "-"
    return "0" if differing_px == 0 else f"{100 * differing_px / px:.2g} %"


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
