"""Where long work stands, on stderr: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from tilepipe.steps import Tell, ignore

if TYPE_CHECKING:
    from rich.progress import Progress

EVERY_S = 5.0
RECENT_S = 10.0


def duration(seconds: float | None) -> str:
    """Return ``4 s``, ``3:05`` or ``2:10:00``."""
    if seconds is None:
        return "?"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class NowAndThen:
    """Every ``EVERY_S`` seconds it is time to tell something, first after as many or at once."""

    def __init__(self, *, at_once: bool = False) -> None:
        self._told_s = -float("inf") if at_once else time.monotonic()

    def is_time(self) -> bool:
        """Tell whether it is time; then not again for a while."""
        now_s = time.monotonic()
        if now_s - self._told_s < EVERY_S:
            return False
        self._told_s = now_s
        return True


class Pace:
    """How fast a step goes now: empty glass is read ten times as fast as tissue."""

    def __init__(self, began_s: float) -> None:
        self._seen = deque([(began_s, 0)])

    def of(self, now_s: float, done: int) -> float:
        """Return what was done a second in the last ``RECENT_S`` seconds; 0 if nothing was."""
        if now_s - self._seen[-1][0] >= RECENT_S / 10:
            self._seen.append((now_s, done))
        while len(self._seen) > 1 and now_s - self._seen[1][0] >= RECENT_S:
            self._seen.popleft()
        since_s, before = self._seen[0]
        return (done - before) / max(now_s - since_s, 1e-9)


def tell_machine(**facts: Any) -> None:
    """Write a line of JSON to stderr: ``{"event": "progress", …}``."""
    click.echo(json.dumps({"event": "progress", **facts}, default=str), err=True)


@contextmanager
def progress(name: str, *, quiet: bool, as_json: bool) -> Iterator[Tell]:
    """Show the steps of one command: of the file or store ``name``."""
    if quiet:
        yield ignore
    elif sys.stderr.isatty() and not as_json:
        with _bar() as bar:
            yield _Steps(name, bar=bar)
    else:
        yield _Steps(name, as_json=as_json)


class _Steps:
    """Hears of steps and shows the one that is under way."""

    def __init__(self, name: str, *, as_json: bool = False, bar: Progress | None = None) -> None:
        self._name = name
        self._as_json = as_json
        self._bar = bar
        self._what = ""
        self._heard_s = time.monotonic()
        self._pace = Pace(self._heard_s)
        self._clock = NowAndThen()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` px of the step ``what`` are done."""
        if what != self._what:  # it began when the one before was done
            self._what, self._pace = what, Pace(self._heard_s)
        self._heard_s = time.monotonic()
        px_per_s = self._pace.of(self._heard_s, done)
        mpix_per_s = px_per_s / 1e6
        left_s = (total - done) / px_per_s if px_per_s else None
        if self._bar is not None:
            if not self._bar.tasks or self._bar.tasks[-1].description != what:
                self._bar.add_task(what, total=total, told="")
            told = f"{mpix_per_s:.1f} MPix/s  left {duration(left_s)}"
            self._bar.update(self._bar.tasks[-1].id, completed=done, told=told)
        elif not self._clock.is_time():
            return
        elif self._as_json:
            tell_machine(
                name=self._name, what=what, done_px=done, total_px=total,
                mpix_per_s=mpix_per_s, left_s=left_s,
            )  # fmt: skip
        else:
            click.echo(
                f"{self._name}: {what} {done / max(1, total):.0%}; {mpix_per_s:.1f} MPix/s, "
                f"{duration(left_s)} left",
                err=True,
            )


def _bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        TextColumn("{task.percentage:3.0f} %"),
        TextColumn("{task.fields[told]}", markup=False),
        console=Console(stderr=True),
        transient=True,
    )
